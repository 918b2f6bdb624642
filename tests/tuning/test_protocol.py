"""The protocol: what is tried, what is chosen and by which figure, and that the whole resumes."""

import json
import shutil
from dataclasses import replace

import pytest

from helpers.cli import composed, frozen, tiny
from helpers.damage import rewrite
from helpers.miniatures import write_folder
from visprompt.errors import UserError
from visprompt.runs import compose, run, unit
from visprompt.runs.engine import local
from visprompt.runs.result import Cell, read_result
from visprompt.tuning import dry_run, protocol

pytestmark = frozen


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


def tune(logs, *arguments):
    given = tiny(logs, "callbacks=none", f"table={logs}/table.md", "seeds=[1,2]", *arguments)
    with composed("tune", *(option for option in given if not option.startswith("method."))) as cfg:
        return (dry_run if cfg.dry_run else protocol).tune(cfg)


@pytest.fixture(scope="module")
def tuned(logs):
    return tune(logs, "methods=[linear,vpt_deep]", "recipe.epochs=2")


def results(logs):
    return [read_result(path.parent) for path in logs.rglob("result.json")]


def test_a_grid_on_tune_then_seeds_on_final_with_the_chosen_point(logs, tuned):
    found = [result for result in results(logs) if result.method["name"] == "vpt_deep"]
    grid = [result for result in found if result.split == "tune"]
    final = [result for result in found if result.split == "final"]
    assert sorted(result.recipe["lr"] for result in grid) == [0.2, 0.4]
    assert {result.seed for result in grid} == {42}
    best = max(result.metrics["val/acc"] for result in grid)
    chosen = min(result.recipe["lr"] for result in grid if result.metrics["val/acc"] == best)
    assert sorted((result.seed, result.recipe["lr"]) for result in final) == [(1, chosen), (2, chosen)]


@pytest.mark.parametrize(
    ("splits", "options", "sentence"),
    [
        (("train", "val"), (), r"pets has no test images: add test/<class>/ folders"),
        (("train", "test"), (), r"pets has no val images: add val/<class>/ folders"),
        (
            ("train", "val"),
            ("data.test=none",),
            r"^src/tune.py makes a table of test scores, but data.test=none",
        ),
    ],
)
@pytest.mark.parametrize("dry", ["false", "true"])
def test_missing_images_are_known_before_the_grid(tmp_path, splits, options, sentence, dry):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 6, splits=splits)
    given = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    with pytest.raises(UserError, match=sentence):
        tune(tmp_path / "logs", *given, "methods=[linear]", *options, f"dry_run={dry}")
    assert not (tmp_path / "logs" / "pets").exists()
    assert not (tmp_path / "data").exists()


def test_the_table_names_the_score_of_its_tasks():
    cells = {("linear", "digits_masks"): Cell((0.5, 0.7)), ("bias", "digits"): Cell((0.9,))}
    one = {("linear", "digits_masks"): cells["linear", "digits_masks"]}
    assert protocol._table(one, {"digits_masks": "mean IoU"}).splitlines() == [
        "| test mean IoU (%), ± sample standard deviation (n - 1) | digits_masks |",
        "| :-- | --: |",
        "| linear | 60.0 ± 14.1 |",
    ]
    both = protocol._table(cells, {"digits_masks": "mean IoU", "digits": "accuracy"}).splitlines()
    assert both[0] == (
        "| test score (%), ± sample standard deviation (n - 1) | digits_masks (mean IoU) | digits (accuracy) |"
    )
    assert both[2:] == ["| linear | 60.0 ± 14.1 | missing |", "| bias | missing | 90.0 |"]


def test_the_table_holds_mean_and_deviation_of_the_test_scores(logs, tuned):
    lines = (logs / "table.md").read_text().splitlines()
    assert lines[0] == "| test accuracy (%), ± sample standard deviation (n - 1) | digits |"
    for line, method in zip(lines[2:], ("linear", "vpt_deep"), strict=True):
        found = (r for r in results(logs) if r.method["name"] == method and r.split == "final")
        one, two = (result.metrics["test/acc"] for result in found)
        mean, std = 50 * (one + two), 100 * abs(one - two) / 2**0.5
        assert line == f"| {method} | {mean:.1f} ± {std:.1f} |"
    scores = [r.score for r in results(logs) if r.split == "final"]
    assert tuned == pytest.approx(sum(scores) / len(scores))


def test_a_second_call_trains_nothing(logs, tuned, monkeypatch):
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("a finished run was trained again"))
    assert tune(logs, "methods=[linear,vpt_deep]", "recipe.epochs=2") == tuned


def test_nothing_is_chosen_where_a_point_of_the_grid_failed(logs, tuned, monkeypatch):
    real, faults = local.run_unit, [{"result": None, "reason": "the disk is gone"}, {"reason": "it diverged"}]
    monkeypatch.setattr(local, "run_unit", lambda jobs: [replace(real(jobs)[0], **faults.pop(0))])
    run = r"digits/vpt_deep recipe\.lr=0\.2 split=tune seed=42"
    with pytest.raises(UserError, match=rf"^{run}: the disk is gone$"):
        tune(logs, "methods=[vpt_deep]", "recipe.epochs=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("methods=[]",),
            r"methods=\[\] does not fit: give a list methods=\[\.\.\.\] of at least one entry, none of them "
            r"twice",
        ),
        (("methods=linear",), r"methods=linear does not fit: give a list methods=\[\.\.\.\]"),
        (("seeds=[]",), r"seeds=\[\] does not fit"),
        (("seeds=[1,2,1]",), r"seeds=\[1, 2, 1\] does not fit: .* none of them twice"),
        (("seeds=3",), "seeds=3 does not fit"),
        (("methods=[linear]", "+method.depth=1"), r"unknown option of method linear 'depth'"),
        (("methods=[vpt_dep]",), "unknown method 'vpt_dep': did you mean vpt_deep"),
        (("methods=[null]",), "unknown method 'None'"),
        (
            ("rerun=true",),
            r"^rerun=true, which debug=\.\.\. sets too, would run the whole grid anew at each call: give "
            r"another",
        ),
        (
            ("hydra.mode=MULTIRUN",),
            r"^src/tune\.py is one command with one table: give methods=\[\.\.\.\], tasks=",
        ),
        (("++recipe.grid={recipe.lr:[]}",), r"recipe\.grid\.recipe\.lr=\[\] gives nothing to try"),
        (
            ("++recipe.grid={recipe.lrr:[1]}",),
            r"unknown key of recipe\.grid 'recipe\.lrr': did you mean recipe\.lr",
        ),
        (
            ("++recipe.grid={recip.lr:[1]}",),
            r"unknown key of recipe\.grid 'recip\.lr': did you mean recipe\.lr",
        ),
        (
            ("++recipe.grid={recipe.lr.x:[1]}",),
            r"unknown key of recipe\.grid 'recipe\.lr\.x': did you mean recipe\.lr",
        ),
        (("recipe.grid=3",), r"recipe\.grid=3 is not a grid: give dotted keys, each with a list of values"),
        (
            ("+recipe.grid={seed:[1,2]}",),
            r"recipe\.grid\.seed is set by the protocol itself: take it out of the grid",
        ),
        (
            ("methods=[e2vpt]", "+recipe.grid={method.prune_tokens:[[20],[50]]}"),
            r"recipe\.grid\.method\.prune_tokens is set by the protocol itself",
        ),
    ],
)
def test_bad_input_is_one_sentence(logs, arguments, message):
    with pytest.raises(UserError, match=message):
        tune(logs, *arguments)


def test_all_grids_are_checked_before_anything_is_run(logs, monkeypatch):
    monkeypatch.setattr(local, "run_unit", lambda _: pytest.fail("a run was begun"))
    with pytest.raises(UserError, match=r"unknown key of recipe\.grid 'method\.num_kv_tokens'"):
        tune(logs, "methods=[e2vpt,linear]", "+recipe.grid={method.num_kv_tokens:[2]}")


def test_what_the_command_line_gives_is_tried_in_no_other_value(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(protocol.console, "_width", 300)
    tried = []
    monkeypatch.setattr(local, "run_unit", lambda jobs: tried.extend(jobs) or [unit.Outcome("", None, "no")])
    with pytest.raises(UserError, match=r": no; .*: no \(2 runs failed\)$"):
        tune(tmp_path, "methods=[vpt_deep]", "recipe.lr=0.3", "++recipe.grid={recipe.weight_decay:[0.0,0.1]}")
    assert [(job.recipe.lr, job.recipe.weight_decay) for job in tried] == [(0.3, 0), (0.3, 0.1)]
    assert capsys.readouterr().out == "digits/vpt_deep: with a single value in the grid: recipe.lr=0.3\n"


def test_an_option_that_is_null_by_default_can_be_tried(logs):
    with composed(
        "tune", *tiny(logs, "callbacks=none", "+recipe.grid={method.depth:[1,2],compile:[true]}")
    ) as cfg:
        (job,) = compose.jobs(cfg)
    points = protocol.grid_points(job.grid)
    assert points == [
        {"recipe.lr": lr, "method.depth": d, "compile": True} for lr in (0.2, 0.4) for d in (1, 2)
    ]
    assert [job.vary(one).method.depth for one in points] == [1, 2, 1, 2]
    assert job.method.depth is None


@pytest.mark.parametrize(("given", "seeds"), [("released", [42, 44, 82, 100, 800]), ("[3]", [3])])
def test_the_released_seeds(logs, monkeypatch, given, seeds):
    """Those of tune_vtab.py in VPT's released code."""
    asked = []

    def nothing(job, given):
        asked.append(given)
        yield []
        return []

    monkeypatch.setattr(protocol, "tune_one", nothing)
    with pytest.raises(ZeroDivisionError):  # of no finished cell there is no mean
        tune(logs, "methods=[linear]", f"seeds={given}")
    assert asked == [seeds]


def test_no_grid_is_one_point():
    assert protocol.grid_points(None) == protocol.grid_points({}) == [{}]


def test_results_that_cannot_be_averaged_leave_the_other_cells_as_they_are(logs, tuned, tmp_path):
    shutil.copytree(logs, tmp_path, dirs_exist_ok=True)
    found = [(path, json.loads(path.read_text())) for path in tmp_path.rglob("result.json")]
    path, stored = next((p, s) for p, s in found if s["method"]["name"] == "linear" and s["split"] == "final")
    rewrite(path, data=stored["data"] | {"form": "of an older version"})
    with pytest.raises(UserError, match=r"^digits/linear: runs that differ in more than the seed or have .*"):
        tune(tmp_path, "methods=[linear,vpt_deep]", "recipe.epochs=2")
    (old, new) = ((folder / "table.md").read_text().splitlines() for folder in (logs, tmp_path))
    assert new == [*old[:2], old[3]]


def test_results_are_plain_json(logs, tuned):
    for path in logs.rglob("result.json"):
        assert "NaN" not in path.read_text()
        assert json.loads(path.read_text())["schema"] == 1
