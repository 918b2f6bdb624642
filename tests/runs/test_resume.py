"""A run is skipped, resumed or run anew with equal bits, held by one process, and loses nothing to a full disk."""

import csv
import os
import shutil
from contextlib import contextmanager

import pytest
import torch

from helpers.cli import content, equal, frozen, tensors, tiny_run
from helpers.leases import at_work, holder
from visprompt.errors import UserError
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import attempt_files, run, run_all, run_folder
from visprompt.runs.result import read_result

pytestmark = frozen
SHORT = ("+trainer.limit_train_batches=5", "+trainer.limit_test_batches=1", "+trainer.limit_val_batches=1")
NOISY = {
    "prompt dropout": ("method.dropout=0.1",),
    "stochastic depth": ("method=full", "method.drop_path=0.5", "recipe.lr=0.02"),
    "frozen features": ("method=linear",),
    "released": (
        "method=full",
        "method.dropout=0.1",
        "recipe.optimizer=vpt_adamw",
        "recipe.schedule=per_epoch",
        "recipe.lr=0.02",
    ),
    "tune": ("split=tune",),
    "mixing": (
        "recipe.mixup=0.5",
        "recipe.cutmix=0.5",
        "recipe.sampling=balanced",
        "recipe.class_weights=balanced",
    ),
    "accumulation": ("method.dropout=0.1", "trainer.accumulate_grad_batches=2", "seed=5"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run and its result for any options."""
    done, logs = {}, tmp_path_factory.mktemp("whole")

    def get(*options):
        if options not in done:
            one = short_run(logs, *options)
            done[options] = one, run.run_job(one)
        return done[options]

    return get


def short_run(logs, *options):
    return tiny_run(logs, *SHORT, *options)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_run_is_skipped_and_nothing_of_it_is_written(whole, monkeypatch):
    one, result = whole()
    before = {file: file.stat().st_mtime_ns for file in one.folder.iterdir()}
    monkeypatch.setattr(run, "_train", None)  # is not called
    assert run.run_job(short_run(one.folder.parents[2])) == result
    after = {file: file.stat().st_mtime_ns for file in one.folder.iterdir()}
    kept = [
        {file.name: t for file, t in times.items() if file.name != "lock" and not file.match("lease-*")}
        for times in (before, after)
    ]
    assert kept[0] == kept[1]


def test_a_rerun_replaces_the_old_result_only_when_it_is_complete(tmp_path, whole, monkeypatch):
    one, result = whole()
    again = short_run(tmp_path, "rerun=true")
    shutil.copytree(one.folder, again.folder)
    before, seen = content(again.folder), []
    original = TuningModule.on_train_epoch_end

    def look(self):
        seen.append((read_result(again.folder) == result, equal(tensors(again.folder), tensors(one.folder))))
        original(self)

    monkeypatch.setattr(TuningModule, "on_train_epoch_end", look)
    second = run.run_job(again)
    assert seen == [(True, True)] * 3
    assert second.attempt == 1
    assert second.metrics == result.metrics
    assert equal(tensors(again.folder), tensors(one.folder))
    assert set(content(again.folder)) == set(before)
    assert run.run_job(again).attempt == 2


def test_a_rerun_that_dies_leaves_the_old_result_and_goes_on_later(tmp_path, whole):
    one, result = whole()
    again = short_run(tmp_path, "rerun=true")
    shutil.copytree(one.folder, again.folder)
    before = content(again.folder)
    with dying(epoch=1, batch=3), pytest.raises(ZeroDivisionError):
        run.run_job(again)
    after = content(again.folder)
    assert before == {name: digest for name, digest in after.items() if not name.startswith("resume")}
    assert run.run_job(short_run(tmp_path)) == result
    assert run.run_job(again).attempt == 1
    assert not (again.folder / "resume").exists()


@contextmanager
def dying(epoch, batch):
    """A context in which training raises in the middle of an epoch."""
    original = TuningModule.training_step

    def step(module, images, batch_idx):
        if (module.current_epoch, batch_idx) == (epoch, batch):
            raise ZeroDivisionError
        return original(module, images, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuningModule, "training_step", step)
        yield


@pytest.mark.parametrize(
    ("noise", "epoch"),
    [
        ("prompt dropout", 1),
        *(pytest.param(noise, 1, marks=pytest.mark.slow) for noise in NOISY if noise != "prompt dropout"),
        ("prompt dropout", 0),
        ("prompt dropout", 2),
    ],
)
def test_a_run_that_died_goes_on_to_the_same_bits(tmp_path, whole, noise, epoch):
    one, result = whole(*NOISY[noise])
    half = short_run(tmp_path, *NOISY[noise])
    with dying(epoch=epoch, batch=3), pytest.raises(ZeroDivisionError):
        run.run_job(half)
    assert read_result(half.folder) is None
    assert (half.folder / "resume" / "state.safetensors").exists() == (epoch > 0)
    torch.manual_seed(99)  # whatever a process did before
    resumed = run.run_job(short_run(tmp_path, *NOISY[noise]))
    assert equal(tensors(half.folder), tensors(one.folder))
    assert resumed.metrics == result.metrics
    assert resumed.per_class == result.per_class
    assert rows(half.folder) == rows(one.folder)
    assert set(content(half.folder)) == set(content(one.folder))


@pytest.mark.parametrize("split", ["final", "tune"])
def test_a_run_that_died_after_its_last_epoch_is_only_scored(tmp_path, whole, split, monkeypatch):
    one, result = whole(f"split={split}")
    half = short_run(tmp_path, f"split={split}")
    with monkeypatch.context() as patch:
        patch.setattr(attempt_files, "save_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.run_job(half)
    monkeypatch.setattr(TuningModule, "training_step", lambda *_: pytest.fail("trains again"))
    resumed = run.run_job(short_run(tmp_path, f"split={split}"))
    assert equal(tensors(half.folder), tensors(one.folder))
    assert resumed.metrics == result.metrics
    assert rows(half.folder) == rows(one.folder)


def test_a_run_that_died_between_its_state_and_its_result_is_finished_later(tmp_path, whole, monkeypatch):
    one, result = whole()
    half = short_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(attempt_files, "write_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.run_job(half)
    assert read_result(half.folder) is None
    assert run.run_job(short_run(tmp_path)).metrics == result.metrics
    assert rows(half.folder) == rows(one.folder)
    assert not (half.folder / "resume").exists()


def test_a_cut_or_another_run_s_state_or_result_is_said_and_the_run_starts_again(tmp_path, whole, caplog):
    one, result = whole()
    other, _ = whole("seed=1")
    for name, sentence in (
        ("tuned.safetensors", "is not the state that result.json recorded: its size differs"),
        ("result.json", "is damaged: it is cut off or not JSON"),
        ("", "is not the state that result.json recorded: it is another run's or attempt's"),
    ):
        again = short_run(tmp_path / (name or "other"))
        shutil.copytree(one.folder, again.folder)
        if name:
            os.truncate(again.folder / name, 100)
        else:
            shutil.copy(other.folder / "tuned.safetensors", again.folder)
        caplog.clear()
        assert run.run_job(again).metrics == result.metrics
        assert equal(tensors(again.folder), tensors(one.folder))
        file = again.folder / (name or "tuned.safetensors")
        assert [m for m in caplog.messages if "damaged" in m or "recorded" in m] == [
            f"{file} {sentence}: the run starts again"
        ]


def test_another_run_s_finished_folder_is_not_this_run_s(tmp_path, whole, monkeypatch):
    other, _ = whole("seed=1")
    mine = short_run(tmp_path)
    shutil.copytree(other.folder, mine.folder)
    before = content(mine.folder)
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("trains"))
    sentence = (
        f"{mine.folder}/result.json is another run's (its seed is 1, this run's is 0): move or delete the "
        "files in that folder"
    )
    with pytest.raises(UserError) as error:
        run.run_job(mine)
    assert str(error.value) == sentence
    (outcome,) = run_all.run_all([mine.job])
    assert (outcome.result, outcome.reason) == (None, sentence)
    assert content(mine.folder) == before


def test_another_run_s_complete_attempt_is_not_put_in_place(tmp_path, whole):
    halves = [short_run(tmp_path, f"seed={seed}") for seed in (0, 1)]
    for half in halves:
        with dying(epoch=1, batch=0), pytest.raises(ZeroDivisionError):
            run.run_job(half)
    other, here = whole("seed=1")[0].folder, halves[0].folder / "resume"
    shutil.rmtree(here)
    shutil.copytree(halves[1].folder / "resume", here)
    for name in ("result.json", "tuned.safetensors", "metrics.csv", "config.yaml"):
        (halves[0].folder / ".complete").mkdir(exist_ok=True)
        shutil.copy(other / name, halves[0].folder / ".complete")
    with pytest.raises(UserError) as error:
        run.run_job(short_run(tmp_path))
    assert str(error.value) == (
        f"{here}/state.safetensors is the resume state of another run (its seed is 1, this run's is 0): "
        "delete it to start over"
    )
    assert read_result(halves[0].folder) is None


def test_a_damaged_result_of_a_complete_attempt_is_scored_again(tmp_path, whole, monkeypatch, caplog):
    _, result = whole()
    half = short_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "put_in_place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.run_job(half)
    os.truncate(half.folder / ".complete" / "result.json", 100)
    monkeypatch.setattr(TuningModule, "training_step", lambda *_: pytest.fail("trains again"))
    assert run.run_job(short_run(tmp_path)).metrics == result.metrics
    assert caplog.messages[0] == (
        f"{half.folder}/.complete/result.json is damaged: it is cut off or not JSON: the attempt is scored again"
    )


def test_a_damaged_resume_state_is_one_sentence(tmp_path):
    half = short_run(tmp_path)
    with dying(epoch=1, batch=0), pytest.raises(ZeroDivisionError):
        run.run_job(half)
    os.truncate(half.folder / "resume" / "state.safetensors", 1000)
    with pytest.raises(
        UserError, match=r"state\.safetensors is not a readable resume .* delete it to start over"
    ):
        run.run_job(short_run(tmp_path))


def test_another_seed_s_resume_state_is_refused(tmp_path):
    halves = [short_run(tmp_path, f"seed={seed}") for seed in (0, 1)]
    for half in halves:
        with dying(epoch=1, batch=0), pytest.raises(ZeroDivisionError):
            run.run_job(half)
    here, there = (half.folder / "resume" / "state.safetensors" for half in halves)
    shutil.copy(there, here)
    with pytest.raises(UserError) as error:
        run.run_job(short_run(tmp_path, "seed=0"))
    assert str(error.value) == (
        f"{here} is the resume state of another run (its seed is 1, this run's is 0): delete it to start over"
    )
    assert read_result(halves[0].folder) is None


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    one = short_run(tmp_path)
    with (
        at_work(one.folder),
        pytest.raises(
            UserError, match=r"^process 4711 on thor is working on this run in .*: wait for it, or end it$"
        ),
    ):
        run.run_job(one)
    assert run.run_job(one).status == "finished"
    assert holder(one.folder) is None


def test_the_holder_of_a_run_is_this_process(tmp_path, monkeypatch):
    one, seen = short_run(tmp_path, "recipe.epochs=1", "recipe.warmup_epochs=0"), []
    monkeypatch.setattr(run, "_train", lambda *_: seen.append(holder(one.folder)))
    run.run_job(one)
    assert seen[0].startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    one = short_run(tmp_path)
    (tmp_path / "digits").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"cannot write to .*: .*; choose another folder with paths.log_dir="):
        run.run_job(one)


@pytest.mark.parametrize("name", ["state.safetensors", "metrics.csv", "tuned.safetensors", "result.json"])
def test_a_full_disk_leaves_what_is_finished(tmp_path, whole, name, monkeypatch):
    one, result = whole()
    again = short_run(tmp_path, "rerun=true")
    shutil.copytree(one.folder, again.folder)
    replace = os.replace

    def full(source, target, **options):
        if os.path.basename(target) == name:  # noqa: PTH119  # os.replace takes any form of path
            raise OSError(28, "No space left on device")
        replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            UserError, match=rf"cannot write .*{name}: .*No space left on device; free some space"
        ):
            run.run_job(again)
    stored = read_result(again.folder)
    assert stored == result
    assert equal(tensors(again.folder), tensors(one.folder))
    assert not [file for file in again.folder.rglob("*") if file.name.startswith(".")], (
        "half-written files are removed"
    )
    assert run.run_job(again).attempt == 1
