"""What a report says beyond its tables: what was tried, which rows are missing, and what its figures are called."""

from datetime import UTC, datetime

from helpers.written_runs import result, write
from visprompt.data.catalog import SUITES
from visprompt.reports.load import survey
from visprompt.reports.page import contents

MADE = datetime(2026, 11, 21, 20, 30, tzinfo=UTC)
ALL_TRIED = "All settings of a method on a task with final runs have a grid on the validation images among these runs."


def told(logs):
    return contents(survey([logs]), [logs], MADE)


def protocol(logs):
    return dict(told(logs).facts)["Protocol"][1]


def tried(logs, *rates, **changes):
    for lr in rates:
        write(logs, result(split="tune", recipe={"lr": lr}, **changes))


def test_a_grid_is_one_of_the_same_protocol_with_two_points(tmp_path):
    few = (
        "Settings of a method on a task with final runs: {}; with a grid on the validation images among these runs: {};"
    )
    write(tmp_path, result())
    tried(tmp_path, 1.0, 5.0, precision="bf16-mixed")
    tried(tmp_path, 1.0)
    tried(tmp_path, 1.0, seed=44)  # another seed is no other point
    assert protocol(tmp_path).startswith(few.format(1, 0))
    tried(tmp_path, 5.0)
    assert protocol(tmp_path) == ALL_TRIED
    write(tmp_path, result(data={"fraction": 0.1}))
    assert protocol(tmp_path).startswith(few.format(2, 1))


def test_a_prune_grid_is_no_grid_of_settings(tmp_path):
    for number, split in enumerate(("tune", "tune", "final")):
        options = {"prune": True, "initial": "a", "token_mask": [number]}
        write(tmp_path, result(method="e2vpt", split=split, options=options, tuned={"kept_tokens": number}))
    assert "runs: 1; with a grid on the validation images among these runs: 0;" in protocol(tmp_path)


def test_a_row_that_no_full_row_is_under_one_protocol_with_is_shown_to_lack_it(tmp_path):
    for task in SUITES["demo"]:
        for method in ("linear", "full"):
            write(tmp_path, result(task, method))
    write(tmp_path, result("digits", "bias", precision="bf16-mixed"))
    (accuracy, *_) = told(tmp_path).sections
    assert [(row[0], str(row[1])) for row in accuracy.tables["wins"].rows] == [
        ("linear, precision 32-true", "0 of 3"),
        ("bias, precision bf16-mixed", "no full row of the same protocol"),
    ]


def test_no_two_figures_share_a_file(tmp_path):
    for task in ("2", "\u72ac", "\u732b", "dark"):
        folder = write(tmp_path, result(task))
        (folder / "metrics.csv").write_text("epoch,train/loss,train/acc\n0,2,0.2\n1,1,0.4\n")
    names = [plot.name for section in told(tmp_path).sections for plot in section.plots]
    files = [f"{name}{ending}" for name in names for ending in (".svg", "_dark.svg")]
    assert len(names) == 8
    assert len(set(files)) == 16
