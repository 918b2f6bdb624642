"""Several states of one backbone: each run's score from one pass over the test set, one CSV file of all."""

import csv
from dataclasses import replace

import pytest
import torch

from helpers import miniatures
from helpers.cli import composed, frozen, tiny_run
from visprompt.errors import UserError
from visprompt.models.scores import in_percent
from visprompt.runs import evaluate, predict, run
from visprompt.runs.score_each import Finished, by_test_set

pytestmark = frozen
RUNS = {
    "deep": (),
    "linear": ("method=linear", "recipe.lr=0.4"),
    "other seed": ("seed=1",),
    "other task": ("data=demo/digits_loc",),
    "full": ("method=full", "recipe.lr=0.02"),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def trained(logs):
    """The folder and the result of every run."""
    jobs = {name: tiny_run(logs, "recipe.epochs=2", *options) for name, options in RUNS.items()}
    return {name: (job.folder, run.run_job(job)) for name, job in jobs.items()}


def score(trained, names, *arguments):
    folders = ",".join(str(trained[name][0]) for name in names)
    with composed(
        "eval", f"run=[{folders}]", "average=false", "trainer=cpu", "callbacks=none", *arguments
    ) as cfg:
        return evaluate.evaluate(cfg)


def test_each_run_has_the_score_that_it_had_alone(trained, capsys, monkeypatch):
    prepared, original = [], run.prepare
    monkeypatch.setattr(evaluate.run, "prepare", lambda job: prepared.append(job.task) or original(job))
    mean = score(trained, RUNS)
    own = [result.score for _, result in trained.values()]
    assert mean == pytest.approx(sum(own) / len(own), abs=1e-6)
    lines = capsys.readouterr().out.splitlines()
    # those of one test set first, in the order given
    order = ["deep", "linear", "other seed", "full", "other task"]
    found = [line for line in lines if ": test/acc " in line]
    for line, name in zip(found, order, strict=True):
        folder, result = trained[name]
        share, shown = f"{100 * result.score:.2f} %", in_percent(result.score, result.interval)
        assert line == f"{folder}: test/acc {shown} on 797 images (the run itself: {share})"
    assert len(prepared) == 2, "one pass over each test set"


def test_runs_of_one_test_set_are_one_group(trained):
    runs = [Finished(folder, evaluate.load_state(folder), result) for folder, result in trained.values()]
    groups = [[one.folder for one in group] for group in by_test_set(runs)]
    own = {name: folder for name, (folder, _) in trained.items()}
    assert groups == [[own[n] for n in ("deep", "linear", "other seed", "full")], [own["other task"]]]
    deep = runs[0]
    state = replace(deep.state, backbone=dict(deep.state.backbone) | {"sha256": "1" * 64})
    assert by_test_set([deep, replace(deep, state=state)]) == [[deep], [replace(deep, state=state)]]


def rows(logs, trained, names, images, output, *arguments):
    folders = ",".join(str(trained[name][0]) for name in names)
    given = (f"state=[{folders}]", f"images={images}", f"output={output}", "device=cpu", *arguments)
    with composed("predict", f"weights={logs / 'weights.safetensors'}", *given) as cfg:
        chosen = ("output", "batch_size", "device", "weights", "overwrite", "max_pixels")
        predict.predict(cfg.state, cfg.images, **{name: cfg[name] for name in chosen})
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_csv_file_of_several_states(logs, trained, tmp_path):
    images = miniatures.write_folder(tmp_path / "images", ("a", "b"), 2)
    names = ["deep", "other task", "full"]
    found = rows(logs, trained, names, images, tmp_path / "all.csv", "batch_size=3")
    alone = {name: rows(logs, trained, [name], images, tmp_path / f"{name}.csv") for name in names}
    # two states are of one task: all are named by their folders
    shown = {name: str(trained[name][0]) for name in names}
    expected = [
        {"path": one["path"], "task": shown[name], "class": one["class"], "probability": one["probability"]}
        for i in range(4)
        for name in names
        for one in [alone[name][i]]
    ]
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert float(row.pop("probability")) == pytest.approx(float(other.pop("probability")), abs=2e-6)
        assert row == other


def test_states_of_different_tasks_are_named_by_them(logs, trained, tmp_path):
    images = miniatures.write_folder(tmp_path / "images", ("a", "b"), 1)
    found = rows(logs, trained, ["deep", "other task"], images, tmp_path / "all.csv")
    assert [row["task"] for row in found] == ["digits", "digits_loc"] * 2


def test_runs_of_another_precision_are_scored_in_their_own(trained):
    runs = [Finished(folder, evaluate.load_state(folder), result) for folder, result in trained.values()]
    half = replace(runs[0], result=runs[0].result.model_copy(update={"precision": "bf16-mixed"}))
    assert [len(group) for group in by_test_set([*runs, half])] == [4, 1, 1]
    assert [len(group) for group in by_test_set([*runs, half], "32-true")] == [5, 1]
    with pytest.raises(UserError, match=r"^run=\[\.\.\.\] names a run twice: give each run once$"):
        score(trained, ["deep", "deep"])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("32-true", None)]
)
def test_all_weights_have_the_type_of_the_precision(trained, monkeypatch, precision, dtype):
    types, original = [], evaluate.Bank
    monkeypatch.setattr(evaluate, "Bank", lambda *a, **k: types.append(k["dtype"]) or original(*a, **k))
    assert score(trained, ["linear"], f"precision={precision}") == pytest.approx(
        trained["linear"][1].score, abs=0.02
    )
    assert types == [dtype]


@pytest.mark.parametrize("chosen", [[], ["deep", "deep"]])
def test_no_state_and_one_state_twice_are_refused(logs, trained, tmp_path, chosen):
    with pytest.raises(
        UserError, match=r"^state=\[\.\.\.\] is empty or names a state twice: give each state once$"
    ):
        rows(logs, trained, chosen, tmp_path, tmp_path / "out.csv")
