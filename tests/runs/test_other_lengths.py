"""A run of more epochs starts from the beginning, and says why."""

import pytest

from helpers.cli import frozen, tiny_job, tiny_run
from visprompt.runs import other_lengths, run, run_all

pytestmark = frozen
SHORT = ("+trainer.limit_train_batches=1", "+trainer.limit_test_batches=1", "recipe.warmup_epochs=0")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    return logs, {epochs: _finished(logs, f"recipe.epochs={epochs}") for epochs in (1, 2)}


def _finished(logs, *words):
    one = tiny_run(logs, *SHORT, *words)
    run.run_job(one)
    return one.folder


def test_runs_that_differ_only_in_their_length_are_found(made):
    logs, folders = made
    for words, found in {
        ("recipe.epochs=3",): [(1, folders[1]), (2, folders[2])],
        ("recipe.epochs=2",): [(1, folders[1])],
        ("recipe.epochs=3", "recipe.warmup_epochs=1"): [(1, folders[1]), (2, folders[2])],
        ("recipe.epochs=3", "seed=1"): [],
        ("recipe.epochs=3", "recipe.lr=0.1"): [],
        ("recipe.epochs=3", "recipe.mixup=0.2"): [],
        ("recipe.epochs=3", "data.fraction=0.5"): [],
        ("recipe.epochs=3", "+trainer.gradient_clip_val=1"): [],
    }.items():
        one = tiny_run(logs, *SHORT, *words)
        assert other_lengths.finished(one.folder, one.identity) == found, words


def test_a_longer_run_says_why_it_starts_from_the_beginning(made, capsys):
    logs, folders = made
    run_all.run_all([tiny_job(logs, *SHORT, "recipe.epochs=3")])
    assert (
        f"the finished run of 2 epochs in {folders[2]} is not continued: its learning rate was scheduled for 2 "
        "epochs, so this run of 3 epochs starts from the beginning"
    ) in capsys.readouterr().out
    run_all.run_all([tiny_job(logs, *SHORT, "recipe.epochs=3")])
    assert "is not continued" not in capsys.readouterr().out
