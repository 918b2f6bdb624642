"""The entry points as commands: what a user types, sees and gets."""

import csv
import json
import os
import re
import subprocess
import time

import pytest

from helpers import miniatures
from helpers.cli import call, command, content, tiny
from helpers.wide import case
from visprompt.data.catalog import SUITES

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run of the command: where its results are, and what it said."""
    logs = tmp_path_factory.mktemp("logs")
    done = call("train", *tiny(logs, "callbacks=none"))
    assert done.returncode == 0, done.stderr
    (folder,) = (logs / "digits" / "vpt_deep").iterdir()
    return logs, folder, done


def test_the_table_says_what_was_reached_and_what_it_took(trained):
    _, folder, done = trained
    result = json.loads((folder / "result.json").read_text())
    shown = done.stdout.replace("\n", "")
    assert f"{100 * result['metrics']['test/acc']:.2f} %" in shown
    assert f"{result['tuned']['parameters']:,} (" in shown
    assert f"{100 * result['tuned']['share']:.2f} % of the backbone" in shown
    for row in ("tuned state", "training time", "peak memory", "folder"):
        assert row in shown
    assert folder.name in shown
    assert done.stderr == ""


@pytest.mark.slow
def test_the_same_command_shows_the_stored_result_and_writes_nothing(trained):
    logs, folder, done = trained
    before = content(folder), (folder / "result.json").stat().st_mtime_ns
    again = call("train", *tiny(logs, "callbacks=none"))
    assert again.returncode == 0, again.stderr
    assert "finished before" in again.stdout
    assert "rerun=true" in again.stdout
    assert (content(folder), (folder / "result.json").stat().st_mtime_ns) == before
    assert again.stdout.splitlines()[-5:] == done.stdout.splitlines()[-5:]


@pytest.mark.slow
def test_eval_repeats_the_score(trained):
    _, folder, _ = trained
    done = call("eval", f"run={folder}", "trainer=cpu", "callbacks=none")
    assert done.returncode == 0, done.stderr
    score = 100 * json.loads((folder / "result.json").read_text())["metrics"]["test/acc"]
    said = rf"test/acc {score:.2f} % \(95 % interval [\d.]+ to [\d.]+\) on 797 images \(the run itself: {score:.2f} %\)"
    assert re.search(said, done.stdout.replace("\n", " "))


@pytest.mark.slow
def test_predict_labels_what_can_be_read(trained, tmp_path):
    _, folder, _ = trained
    miniatures.write_folder(tmp_path / "images", ("a", "b"), 2)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    weights = folder.parents[2] / "weights.safetensors"
    output = tmp_path / "out.csv"
    done = call(
        "predict",
        f"state={folder}",
        f"images={tmp_path / 'images'}",
        f"output={output}",
        f"weights={weights}",
    )
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout.replace("\n", "")
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        shares = {str(digit): float(row[str(digit)]) for digit in range(10)}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert shares[row["class"]] == max(shares.values()) == float(row["probability"])


# The words are checked in one process too (test_compose.py): fast are one of a setting and one of another program.
WRONG = [
    ("train", ["method=vpt_dep"], "unknown method 'vpt_dep': did you mean vpt_deep"),
    ("eval", [], "run has no default: give run=..."),
    ("train", ["data=demo/digit"], "unknown data 'demo/digit': did you mean demo/digits"),
    ("train", ["backbone=demoo"], "unknown backbone 'demoo': did you mean demo"),
    ("train", ["recipe.lrr=1"], "unknown key 'recipe.lrr': did you mean recipe.lr"),
    ("train", ["experiment=demo_dep"], "unknown experiment 'demo_dep': did you mean demo_deep"),
]


@pytest.mark.parametrize(
    ("script", "arguments", "message"), [case(*words, fast=words in WRONG[:2]) for words in WRONG]
)
def test_a_wrong_word_is_one_sentence_within_seconds(script, arguments, message):
    started = time.monotonic()
    done = call(script, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert time.monotonic() - started < 30  # torch is not even imported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "status", "out", "lines"),
    [
        (
            "train",
            ["-m", "method=linear,vpt_depe"],
            2,
            "error: unknown method 'vpt_depe': did you mean vpt_deep",
            1,
        ),
        (
            "train",
            ["paths.log_dir=/etc/passwd/x"],
            2,
            "error: paths.log_dir=/etc/passwd/x cannot hold what is",
            1,
        ),
        (
            "eval",
            ["seed=1", "--info", "config"],
            2,
            "error: seed belongs to src/train.py, not to src/eval.py",
            1,
        ),
        (
            "train",
            ["experiment=vtab_natural_deep", "trainer=ddp", "--cfg", "job"],
            0,
            "# cifar, the first of 7 tasks",
            0,
        ),
        ("train", ["seed=1", "-c", "hydra", "-p", "hydra.run"], 0, "# @package hydra.run\ndir: ", 2),
        (
            "predict",
            ["batch_size=8", "--help"],
            0,
            "What each key means: the comments of configs/predict.yaml",
            0,
        ),
        ("tune", ["tasks=demo", "-sc", "bash"], 0, "export _HYDRA_OLD_COMP", 0),
        ("report", ["runs=x", "--info", "searchpath"], 0, "", 0),
    ],
)
def test_flags_of_hydra_behind_settings(script, arguments, status, out, lines):
    done = call(script, *arguments)
    printed, other = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
    assert (done.returncode, other) == (status, "")
    assert printed.startswith(out)
    assert not lines or len(printed.strip().splitlines()) == lines


@pytest.mark.slow
def test_relative_paths_are_those_of_the_place_where_the_command_was_typed(tmp_path):
    miniatures.write_folder(tmp_path / "birds", ("a", "b"), 10)
    own = ("data=folder", "data.root=birds", "data.store_dir=stores", "method=linear")
    given = (
        *tiny(tmp_path, *own, "callbacks=none"),
        "paths.log_dir=logs",
        "hydra.job.chdir=true",
        "recipe.epochs=1",
    )
    given = [one for one in given if not one.startswith("recipe.warmup")]
    done = subprocess.run(
        command("train", *given, "recipe.warmup_epochs=0"),
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"birds", "stores", "logs", "weights.safetensors"}
    assert len(list((tmp_path / "logs" / "birds" / "linear").glob("*/result.json"))) == 1


def test_an_unknown_task_and_missing_weights_are_one_sentence_each(tmp_path):
    done = call("train", "tasks=[digits,digit_loc]", f"paths.log_dir={tmp_path}")
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: unknown task 'digit_loc': did you mean digits_loc")
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_missing_weights_without_network_fail_at_once_and_say_how_to_get_them(tmp_path):
    started = time.monotonic()
    done = call("train", "backbone=vit_b16_in21k", f"paths.log_dir={tmp_path}")
    assert done.returncode == 2
    assert "the weights of backbone vit_base_patch16_224.orig_in21k are not on this machine" in done.stderr
    assert "set backbone.weights=data/backbones/vit_base_patch16_224.orig_in21k.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_three_tasks_in_one_run_and_a_multirun(tmp_path):
    done = call("train", *tiny(tmp_path, "callbacks=none", "tasks=demo"))
    assert done.returncode == 0, done.stderr
    assert {path.parents[2].name for path in tmp_path.rglob("result.json")} == set(SUITES["demo"])
    options = [option for option in tiny(tmp_path / "m", "callbacks=none") if not option.startswith("seed=")]
    many = call("train", "-m", *options, "seed=1,2")
    assert many.returncode == 0, many.stderr
    seeds = {json.loads(path.read_text())["seed"] for path in (tmp_path / "m").rglob("result.json")}
    assert seeds == {1, 2}


@pytest.mark.slow
def test_tensorboard_and_wandb_write_offline(tmp_path):
    for logger in ("tensorboard", "wandb"):
        done = call(
            "train", *tiny(tmp_path / logger, "callbacks=none", f"logger={logger}"), WANDB_MODE="offline"
        )
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
    assert list((tmp_path / "wandb").rglob("*.wandb"))
