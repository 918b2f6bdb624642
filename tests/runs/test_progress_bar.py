"""The bar of a run counts epochs from 1, and shows the time left of all runs of the command."""

import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from helpers.cli import tiny_run
from visprompt.runs import one_by_one, progress_bar
from visprompt.runs.one_by_one import OneByOne
from visprompt.runs.progress_bar import RunProgressBar
from visprompt.runs.run import run_job

WORDS = "callbacks=default trainer.enable_progress_bar=true recipe.epochs=3 recipe.warmup_epochs=0"
WORDS = (*WORDS.split(), "data.fraction=0.25")  # four steps an epoch


@pytest.fixture
def shown(monkeypatch):
    """What the bar of a run shows after each training step, each of which takes ten seconds."""
    clock = SimpleNamespace(now=1000.0)
    for module in (progress_bar, one_by_one):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    lines = []
    end = RunProgressBar.on_train_batch_end

    def recorded(bar, *arguments):
        clock.now += 10
        end(bar, *arguments)
        console = Console(
            width=200, record=True, file=SimpleNamespace(write=str, flush=str), color_system=None
        )
        console.print(bar.progress.make_tasks_table([bar.train_progress_bar]))
        lines.append(" ".join(console.export_text().split()))

    monkeypatch.setattr(RunProgressBar, "on_train_batch_end", recorded)
    return lines


def told(line):
    """The epoch and the time left, without the bar, the batches and their figures."""
    found = re.fullmatch(r"(.*epoch \d of \d) .* (\d+/\d+) (\S+ left(?: of \d runs)?) .*", line)
    return found.groups()


def test_a_run_shows_its_epoch_from_1_and_its_time_left(tmp_path, shown):
    run_job(tiny_run(tmp_path, *WORDS))
    assert len(shown) == 3 * 4
    assert told(shown[0]) == ("epoch 1 of 3", "1/4", "0:01:50 left")  # eleven steps of ten seconds
    assert told(shown[3]) == ("epoch 1 of 3", "4/4", "0:01:20 left")
    assert told(shown[4]) == ("epoch 2 of 3", "1/4", "0:01:10 left")
    assert told(shown[-1]) == ("epoch 3 of 3", "4/4", "0:00:00 left")


def test_a_run_that_ends_within_an_epoch_shows_the_time_until_then(tmp_path, shown):
    run_job(tiny_run(tmp_path, *WORDS, "recipe.max_steps=6"))
    assert told(shown[0]) == ("epoch 1 of 2", "1/4", "0:00:50 left")
    assert told(shown[-1]) == ("epoch 2 of 2", "2/4", "0:00:00 left")


def test_a_run_of_several_shows_the_time_left_of_all(tmp_path, shown):
    runs = OneByOne(3)
    for seed in (1, 1, 2):  # the second finds the result of the first
        with runs.running(1):
            run_job(tiny_run(tmp_path, *WORDS, f"seed={seed}"))
    assert len(shown) == 2 * 12
    assert told(shown[0]) == ("run 1 of 3, epoch 1 of 3", "1/4", "0:05:50 left of 3 runs")
    assert told(shown[12]) == ("run 3 of 3, epoch 1 of 3", "1/4", "0:01:50 left of 3 runs")
    assert one_by_one.current() is None


def test_runs_that_are_only_shown_say_nothing_about_those_that_follow(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(one_by_one, "time", SimpleNamespace(monotonic=lambda: clock.now))
    runs = OneByOne(6)
    for seconds, trained in ((1, False), (100, True), (2, False), (300, True)):
        with runs.running(1):
            if trained:
                runs.trains()
            clock.now += seconds
    assert (runs.done, runs.total) == (4, 6)
    with pytest.raises(KeyError), runs.running(1):
        raise KeyError
    assert runs.done == 4
    with runs.running(1):
        assert runs.seconds_after(this=7.0) == 200.0  # one run as long as the mean of two
    with runs.running(3):  # a chain made more runs than were expected
        assert runs.total == 8
