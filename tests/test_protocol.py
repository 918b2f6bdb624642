"""The protocol: what is tried, what is chosen and by which figure, and that the whole resumes."""

import json
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from cli import composed, frozen, tiny
from visprompt import compose, loop, protocol, run
from visprompt.errors import UserError
from visprompt.results import read_result

pytestmark = frozen


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


def tune(logs, *arguments):
    given = tiny(logs, "callbacks=none", f"table={logs}/table.md", "seeds=[1,2]", *arguments)
    with composed("tune", *(option for option in given if not option.startswith("method."))) as cfg:
        return protocol.tune(cfg)


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


def test_the_table_holds_mean_and_deviation_of_the_test_scores(logs, tuned):
    lines = (logs / "table.md").read_text().splitlines()
    assert lines[0] == "| test accuracy (%) | digits |"
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


@pytest.fixture(scope="module")
def example(logs, tuned):
    return next(result for result in results(logs) if result.split == "tune" and result.method["name"] == "vpt_deep")


def point(example, score, lr, decay, length):
    recipe = {**example.recipe, "lr": lr, "weight_decay": decay}
    method = {**example.method, "num_tokens": length}
    return replace(example, metrics={"val/acc": score, "test/acc": 1 - score}, recipe=recipe, method=method)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([(0.5, 1, 0.1, 5), (0.6, 9, 0.0, 50)], 1),  # the best on validation
        ([(0.5, 2, 0.1, 5), (0.5, 1, 0.0, 50)], 1),  # then the smallest learning rate
        ([(0.5, 1, 0.0, 5), (0.5, 1, 0.1, 50)], 1),  # then the largest weight decay
        ([(0.5, 1, 0.1, 50), (0.5, 1, 0.1, 5)], 1),  # then the shortest prompt
        ([(0.5, 1, 0.1, 5), (0.5, 1, 0.1, 5)], 0),
    ],
)
def test_ties_on_validation_have_one_answer(example, found, chosen):
    points = [{"index": i} for i in range(len(found))]
    assert protocol.choose([point(example, *one) for one in found], points) == points[chosen]


def test_a_diverged_or_failed_point_is_never_chosen(example):
    diverged = replace(example, status="diverged", metrics={})
    worst = point(example, 0.0, 1, 0.1, 5)
    assert diverged.score == float("-inf")
    assert protocol.choose([diverged, None, worst], [{"i": 0}, {"i": 1}, {"i": 2}]) == {"i": 2}
    assert protocol.choose([diverged, None], [{"i": 0}, {"i": 1}]) is None


def test_a_score_of_a_final_run_cannot_decide(logs, tuned):
    final = next(result for result in results(logs) if result.split == "final")
    with pytest.raises(UserError, match="split=final was offered to a choice: only val200 may decide"):
        protocol.choose([final], [{}])


def test_nothing_is_chosen_where_a_point_of_the_grid_failed(logs, tuned, monkeypatch):
    real = protocol.run_all

    def one_fails(jobs):
        outcomes = real(jobs)
        return [loop.Outcome(outcomes[0].name, None, "the disk is gone"), *outcomes[1:]]

    monkeypatch.setattr(protocol, "run_all", one_fails)
    with pytest.raises(UserError, match=r"^1 runs failed: digits/vpt_deep: the disk is gone$"):
        tune(logs, "methods=[vpt_deep]", "recipe.epochs=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("methods=[]",), r"an empty protocol: give methods=\[\.\.\.\] and seeds=\[\.\.\.\] at least one entry each"),
        (("seeds=[]",), "an empty protocol"),
        (("methods=[linear]", "+method.depth=1"), r"unknown option of method linear 'depth'"),
        (("methods=[vpt_dep]",), "unknown method 'vpt_dep': did you mean vpt_deep"),
        (("++recipe.grid={recipe.lr:[]}",), r"recipe\.grid\.recipe\.lr=\[\] is no choice"),
        (("++recipe.grid={recipe.lrr:[1]}",), r"unknown key of recipe\.grid 'recipe\.lrr': did you mean recipe\.lr"),
        (("++recipe.grid={recip.lr:[1]}",), r"unknown key of recipe\.grid 'recip\.lr': did you mean recipe\.lr"),
    ],
)
def test_bad_input_is_one_sentence(logs, arguments, message):
    with pytest.raises(UserError, match=message):
        tune(logs, *arguments)


def test_an_option_that_is_null_by_default_can_be_tried(logs):
    with composed("tune", *tiny(logs, "callbacks=none", "+recipe.grid={method.depth:[1,2],seed:[3]}")) as cfg:
        (job,) = compose.jobs(cfg)
    points = protocol.grid_points(OmegaConf.to_container(job.recipe.grid))
    assert points == [{"recipe.lr": lr, "method.depth": d, "seed": 3} for lr in (0.2, 0.4) for d in (1, 2)]
    assert [protocol._vary(job, one).method.depth for one in points] == [1, 2, 1, 2]
    assert job.method.depth is None


def test_results_are_plain_json(logs, tuned):
    for path in logs.rglob("result.json"):
        assert "NaN" not in path.read_text()
        assert json.loads(path.read_text())["schema"] == 1
