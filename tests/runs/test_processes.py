"""Runs of several processes and runs that are killed, with the real command."""

import signal
import subprocess
import time

import psutil
import pytest

from helpers.cli import call, command, equal, frozen, tensors, tiny, tiny_run
from helpers.miniatures import write_folder
from visprompt.runs.result import read_result
from visprompt.runs.run import run_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def ddp(folder, *arguments):
    return tiny(folder, "callbacks=none", "trainer=ddp_sim", *arguments)


def folder_of(logs):
    (found,) = (logs / "digits" / "vpt_deep").iterdir()
    return found


def started(logs, *arguments):
    """A command that has left its first resume state."""
    process = subprocess.Popen(command("train", *arguments), stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: list(logs.rglob("state.safetensors")))
    return process


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_two_ranks_reach_the_result_of_one_process(tmp_path):
    for name, trainer in (("two", "ddp_sim"), ("one", "cpu")):
        done = call("train", *ddp(tmp_path / name, "method.dropout=0", f"trainer={trainer}"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test/acc") == 1  # the run is made and shown once
    assert folder_of(tmp_path / "two").name == folder_of(tmp_path / "one").name
    two, one = (read_result(folder_of(tmp_path / name)) for name in ("two", "one"))
    assert (two.machine["devices"], one.machine["devices"]) == (2, 1)
    assert (two.metrics["test/count"], one.metrics["test/count"]) == (797, 797)
    ours, reference = (tensors(folder_of(tmp_path / name)) for name in ("two", "one"))
    # sums in another order, which AdamW's division by small numbers enlarges
    for (
        name,
        tensor,
    ) in reference.items():
        assert (ours[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name
    assert two.metrics["test/acc"] == pytest.approx(one.metrics["test/acc"], abs=2.5 / 797)


@frozen
def test_two_ranks_mix_draw_and_weigh_as_one_process_does(tmp_path):
    words = (
        *("data=demo/digits", "recipe.mixup=0.5", "recipe.cutmix=0.5", "recipe.class_weights=balanced"),
        *(
            "recipe.sampling=balanced",
            "recipe.label_smoothing=0.1",
            "recipe.batch_size=96",
            "method.dropout=0",
        ),
        *("recipe.optimizer=sgd", "recipe.lr=0.2"),
    )
    done = call("train", *ddp(tmp_path / "two", *words))
    assert done.returncode == 0, done.stderr
    one = tiny_run(tmp_path / "one", *words)
    result = run_job(one)
    folder = folder_of(tmp_path / "two")
    assert folder.name == one.folder.name
    two = read_result(folder)
    assert two.machine["devices"] == 2
    assert two.metrics["train/loss"] == pytest.approx(result.metrics["train/loss"], rel=1e-4)
    ours, reference = tensors(folder), tensors(one.folder)
    for name, tensor in reference.items():
        assert (ours[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


@frozen
def test_two_ranks_count_the_pixels_of_one_process_and_refuse_a_head_with_batch_norm(tmp_path):
    sgd = ("recipe.optimizer=sgd", "recipe.lr=0.2", "recipe.epochs=2", "method.dropout=0")
    words = ("data=demo/digits_masks", "data.fraction=0.1", *sgd)
    done = call("train", *ddp(tmp_path / "two", *words))
    assert done.returncode == 0, done.stderr
    one = tiny_run(tmp_path / "one", *words)
    result = run_job(one)
    two = read_result(tmp_path / "two" / "digits_masks" / "vpt_deep" / one.folder.name)
    assert (two.machine["devices"], two.metrics["test/count"]) == (2, 797)
    for name in ("train/loss", "test/pixel_acc", "test/miou"):
        assert two.metrics[name] == pytest.approx(result.metrics[name], rel=1e-3), name
    refused = call("train", *ddp(tmp_path / "two", *words, "recipe.head=setr_pup"))
    assert refused.returncode != 0
    assert "batch norm is trained here, and cannot be synchronised over CPU processes" in refused.stderr


@pytest.mark.parametrize("split", ["final", "tune"])
def test_fewer_images_than_devices_are_scored_each_once(tmp_path, split):
    root = write_folder(tmp_path / "shades", ("dark", "light"), 6, splits=("train",))
    for part in ("val", "test"):
        write_folder(root, ("dark",), 1, splits=(part,), seed=7)
    given = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    done = call("train", *ddp(tmp_path / "logs", *given, f"split={split}"), timeout=500)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "logs" / "shades" / "vpt_deep").iterdir()
    result = read_result(folder)
    scored = {"final": "test", "tune": "val"}[split]
    assert result.machine["devices"] == 2
    assert result.metrics[f"{scored}/count"] == 1
    assert result.metrics[f"{scored}/acc"] in (0.0, 1.0)


def test_a_killed_rank_takes_all_with_it_and_the_same_command_ends_with_the_same_bits(tmp_path):
    killed, whole = (
        ddp(tmp_path / name, "recipe.epochs=16", "method.dropout=0.1") for name in ("killed", "whole")
    )
    process = started(tmp_path / "killed", *killed)
    ranks = {p.environ()["LOCAL_RANK"]: p for p in psutil.Process(process.pid).children()}
    assert sorted(ranks) == ["0", "1"]
    ranks["0"].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: digits/vpt_deep: a rank ended with status -9" in errors
    assert not alive(ranks.values())
    assert read_result(folder_of(tmp_path / "killed")) is None
    for arguments in (killed, whole):
        done = call("train", *arguments)
        assert done.returncode == 0, done.stderr
    assert equal(tensors(folder_of(tmp_path / "killed")), tensors(folder_of(tmp_path / "whole")))


def test_a_killed_command_leaves_no_rank_behind(tmp_path):
    process = started(tmp_path, *ddp(tmp_path, "recipe.epochs=200"))
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    assert wait_for(lambda: not alive(ranks), 10)


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    killed, whole = (
        tiny(tmp_path / name, "callbacks=none", "recipe.epochs=24") for name in ("killed", "whole")
    )
    process = started(tmp_path / "killed", *killed)
    process.kill()
    process.communicate()
    assert read_result(folder_of(tmp_path / "killed")) is None
    for arguments in (killed, whole):
        done = call("train", *arguments)
        assert done.returncode == 0, done.stderr
    assert equal(tensors(folder_of(tmp_path / "killed")), tensors(folder_of(tmp_path / "whole")))


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    arguments = tiny(tmp_path, "callbacks=none", "recipe.epochs=60")
    process = started(tmp_path, *arguments)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    done = call("train", *arguments)
    assert done.returncode == 0, done.stderr
    assert len((folder_of(tmp_path) / "metrics.csv").read_text().splitlines()) == 61
