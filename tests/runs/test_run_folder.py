"""A run that is killed at any step of its writing: the same command ends as if nothing had happened."""

import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.cli import content, equal, frozen, tensors, tiny_run
from helpers.epochs import trained
from helpers.leases import at_work
from visprompt.reports.load import survey
from visprompt.runs import run
from visprompt.runs.result import read_result
from visprompt.runs.run_lock import AtWork, tidy

pytestmark = frozen
SHORT = ("+trainer.limit_train_batches=1", "+trainer.limit_test_batches=1", "recipe.epochs=2")
STEPS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes after it reaches the disk either."""


@contextmanager
def killed_at(step):
    """Lets so many steps reach the disk and none after them."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counted(getattr(os, name), asked, step))
        yield


def counted(original, asked, step):
    def call(*given, **options):
        asked.append(given)
        if len(asked) > step:
            raise Killed
        return original(*given, **options)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    one = tiny_run(tmp_path_factory.mktemp("whole"), *SHORT)
    run.run_job(one)
    return one


def is_killed(one, step):
    """Runs until a step; returns whether the run came to it."""
    with killed_at(step):
        try:
            run.run_job(one)
        except Killed:
            return True
    return False


def attempt_of(folder):
    """Attempt of the result that a folder holds, None where there is none."""
    result = read_result(folder)
    return result and result.attempt


def names(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("lease-")
    )


def check(folder, whole, attempt):
    """A folder holds exactly what an uninterrupted run leaves: files, bits and figures, and one free lease."""
    (lease,) = folder.glob("lease-*")
    assert '"state":"free"' in lease.read_text()
    assert names(folder) == [
        *("classes.csv", "config.yaml", "confusion.csv", "lock", "metrics.csv"),
        *("result.json", "tuned.safetensors"),
    ]
    result, reference = read_result(folder), read_result(whole.folder)
    assert (result.attempt, result.metrics, result.per_class) == (
        attempt,
        reference.metrics,
        reference.per_class,
    )
    assert equal(tensors(folder), tensors(whole.folder))
    assert (folder / "metrics.csv").read_bytes() == (whole.folder / "metrics.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rerun", [False, True])
def test_killed_at_any_step_the_same_command_ends_as_an_uninterrupted_run(tmp_path, whole, rerun):
    options = (*SHORT, "rerun=true") if rerun else SHORT
    step, dead = 0, True
    while dead:
        one = tiny_run(tmp_path / str(step), *options)
        if rerun:
            shutil.copytree(whole.folder, one.folder)
        before = content(one.folder)
        dead = is_killed(one, step)
        if dead and not (one.folder / ".complete").exists() and attempt_of(one.folder) == 0:
            assert before.items() <= content(one.folder).items(), (
                "the old result stands until the new one is complete"
            )
        again = run.run_job(tiny_run(tmp_path / str(step), *options)) if dead else None
        done = read_result(one.folder).attempt
        assert again is None or again.attempt == done
        assert done in ((1, 2) if rerun else (0,)), "complete before it was killed: the next is a new attempt"
        check(one.folder, whole, done)
        step += 1
    assert step > 40


def train(logs, *options, die_in=None):
    """Epochs that a command begins."""
    return trained(tiny_run(logs, *SHORT, *options), die_in)


def test_a_rerun_never_goes_on_with_the_unfinished_original(tmp_path, whole):
    assert train(tmp_path, die_in=1) == [0, 1]
    assert train(tmp_path, "rerun=true", die_in=1) == [0, 1]
    assert train(tmp_path, "rerun=true") == [1], "its own attempt it does go on with"
    check(next(tmp_path.glob("digits/*/*")), whole, 1)


def test_an_unfinished_rerun_of_a_run_without_result_is_gone_on_with_by_the_plain_command(tmp_path, whole):
    assert train(tmp_path, "rerun=true", die_in=1) == [0, 1]
    assert train(tmp_path) == [1]
    check(next(tmp_path.glob("digits/*/*")), whole, 1)


def left_over(tmp_path, whole):
    """A finished run's folder with the resume state of its own attempt, as a kill between two steps leaves it."""
    train(tmp_path, die_in=1)
    (folder,) = tmp_path.glob("digits/*/*")
    resume = shutil.copytree(folder / "resume", tmp_path / "resume")
    train(tmp_path)
    shutil.copytree(resume, folder / "resume")
    for name in (".result.json.12345678", ".tmpGFUK0p", "resume/.metrics.csv.abcdefgh"):
        (folder / name).write_bytes(b"half")
    (folder / ".tuned.safetensors.ab3_xy9z").mkdir()
    (folder / ".tuned.safetensors.ab3_xy9z" / ".tmpGFUK0p").write_bytes(b"half")
    with at_work(folder):
        pass
    return folder


def test_a_rerun_never_goes_on_with_a_state_of_the_finished_attempt(tmp_path, whole):
    folder = left_over(tmp_path, whole)
    assert train(tmp_path, "rerun=true") == [0, 1]
    check(folder, whole, 1)


@pytest.mark.parametrize("reader", ["train", "tidy", "survey"])
def test_the_next_look_at_a_finished_run_removes_what_a_killed_process_left(tmp_path, whole, reader):
    folder = left_over(tmp_path, whole)
    look = {
        "train": lambda: train(tmp_path),
        "tidy": lambda: tidy(folder),
        "survey": lambda: survey([tmp_path / "digits"]),
    }
    look[reader]()
    check(folder, whole, 0)


def test_who_is_at_work_is_told_to_all_ranks():
    error = pickle.loads(pickle.dumps(AtWork("process 4711 on thor", Path("logs/x"))))
    assert (error.who, error.folder) == ("process 4711 on thor", Path("logs/x"))
    assert str(error) == "process 4711 on thor is working on this run in logs/x: wait for it, or end it"


def test_a_folder_at_work_is_left_alone(tmp_path, whole):
    folder = left_over(tmp_path, whole)
    before = names(folder)
    with at_work(folder):
        tidy(folder)
    assert names(folder) == before


def test_an_unfinished_rerun_of_a_finished_run_is_kept(tmp_path, whole):
    train(tmp_path)
    train(tmp_path, "rerun=true", die_in=1)
    assert train(tmp_path) == []
    (folder,) = tmp_path.glob("digits/*/*")
    assert (folder / "resume" / "state.safetensors").is_file()
    assert train(tmp_path, "rerun=true") == [1]
    check(folder, whole, 1)


def test_a_complete_attempt_that_is_not_yet_in_place_is_read(tmp_path, whole):
    train(tmp_path)
    (folder,) = tmp_path.glob("digits/*/*")
    (folder / ".complete").mkdir()
    (folder / "resume").mkdir()
    for name in ("metrics.csv", "result.json"):  # the state and the config were already moved
        (folder / name).rename(folder / ".complete" / name)
    assert list(survey([tmp_path]).runs.attempt) == [0]
    check(folder, whole, 0)
