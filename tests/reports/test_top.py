"""The list of the best runs: by task, test and validation scores apart, with what tells the runs apart."""

import io

import pytest

from helpers.cli import composed
from helpers.written_runs import deep, result, table, write
from visprompt.errors import UserError
from visprompt.reports import report
from visprompt.reports.top import show_top
from visprompt.runs import settings
from visprompt.text import Terminal


def lines(*records, number=10):
    console = Terminal(width=300, file=io.StringIO())
    show_top(table(*records), number, console)
    return console.file.getvalue().splitlines()


def cells(said):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in said if line.startswith("│")]


def test_test_and_validation_scores_are_never_in_one_list():
    said = lines(
        deep(0.7, split="tune", seed=1),
        deep(0.6, metrics={"test/count": 1000}),
        result("cifar", "linear", 0.65),
        result("dtd", "linear", 0.5),
    )
    titles = [line.strip() for line in said if "score of split" in line]
    assert titles == [
        "cifar, test score of split=final: 2 runs",
        "cifar, validation score of split=tune: 1 run",
        "dtd, test score of split=final: 1 run",
    ]
    linear, prompts, tuned, _ = cells(said)
    assert linear == ["1", "linear", "lr 1.0", "42", "65.00 %", "9,216 + 7,690"]
    assert prompts[2] == "num_tokens 10, lr 1.0"
    assert prompts[4] == "60.00 % (56.9 to 63.0)"
    assert tuned[4:] == ["70.00 %", "9,216 + 7,690"]
    assert [line for line in said if ": run" in line and "split" not in line] == [
        *("1: run2", "2: run1", "1: run0", "1: run3")
    ]


def test_the_best_come_first_and_are_told_apart():
    scores = {0.25: 0.5, 1.0: 0.9, 5.0: 0.7}
    said = lines(*(deep(scores[lr], recipe={"lr": lr}, split="tune") for lr in scores), number=2)
    assert any(line.strip() == "cifar, validation score of split=tune: the 2 best of 3 runs" for line in said)
    assert [row[2] for row in cells(said)] == ["num_tokens 10, lr 1.0", "num_tokens 10, lr 5.0"]


def test_runs_without_a_score_are_not_listed():
    diverged = result("cifar", status="diverged", diverged_step=3)
    assert lines(diverged) == ["no run has a score: those that are there diverged, or had no test images"]
    assert len(cells(lines(diverged, result("cifar", "full")))) == 1


def test_top_writes_nothing(tmp_path, capsys):
    write(tmp_path / "logs", result("cifar"))
    before = sorted(tmp_path.rglob("*"))
    with composed("report", "top=3", f"paths.log_dir={tmp_path}/logs") as cfg:
        assert report.report(cfg) is None
    assert sorted(tmp_path.rglob("*")) == before
    assert "cifar, test score of split=final: 1 run" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["0", "many", "1.5"])
def test_top_is_a_number_of_runs(wrong):
    with (
        composed("report", f"top={wrong}") as cfg,
        pytest.raises(UserError, match=rf"^top={wrong} does not fit"),
    ):
        settings.check({"top": cfg.top})


def test_what_only_some_runs_record_tells_them_apart():
    said = lines(
        deep(0.9, seed=1),
        deep(0.8, seed=2, recipe={"mixup": 0.2}),
        deep(0.7, seed=3, data={"augment": "randaugment"}),
    )
    told = [row[2] for row in cells(said)]
    assert [("mixup 0.2" in one, "randaugment" in one) for one in told] == [
        (False, False),
        (True, False),
        (False, True),
    ]
