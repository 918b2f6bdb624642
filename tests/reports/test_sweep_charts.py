"""Charts of accuracy along one setting: prompt length, prompt depth, share of the training data."""

import numpy as np
import pytest

from helpers.written_runs import deep, points, result, table
from visprompt.reports.sweeps import DEPTH, FRACTION, LENGTH, along


def test_test_accuracy_by_length_is_the_mean_over_seeds_with_their_spread():
    (chart,) = along(table(deep(0.5, 1), deep(0.6, 10), deep(0.7, 10, seed=44), deep(0.8, 100)), LENGTH)
    (line,) = chart.lines
    assert line.label == "vpt_deep"
    assert [(p.x, p.spread) for p in line.points if p.spread is None] == [(1, None), (100, None)]
    assert line.points[1].y == pytest.approx(65)
    assert line.points[1].spread == pytest.approx(100 * np.std([0.6, 0.7], ddof=1))
    assert (chart.name, chart.x_scale) == ("accuracy_by_prompt_length_cifar", "log")
    assert (chart.x_label, chart.y_label) == ("number of prompt tokens", "test accuracy (%)")


def test_a_sweep_of_tune_runs_is_of_validation_accuracies_and_says_so():
    low = {"lr": 0.5}
    records = [
        deep(0.50, 1, "tune"),
        deep(0.60, 10, "tune"),
        deep(0.70, 10, "tune", recipe=low),
        deep(0.65, 50, "tune"),
        deep(0.10, 50, "tune", recipe=low, status="diverged"),
    ]
    (chart,) = along(table(*records), LENGTH)
    assert chart.y_label == "validation accuracy, val200 (%)"
    assert chart.name.endswith("_validation")
    assert [(p.x, p.y) for p in chart.lines[0].points] == [(1, 50.0), (10, 70.0), (50, 65.0)]


def test_test_and_validation_accuracies_are_never_in_one_chart():
    sweep = [deep(0.1 * i, tokens, "tune") for i, tokens in enumerate((1, 5, 10), 1)]
    final = [deep(0.5, 1), deep(0.6, 10)]
    (chart,) = along(table(*sweep, *final), LENGTH)
    assert "validation" in chart.y_label, "the sweep has more points"
    (chart,) = along(table(*sweep, *final, deep(0.7, 5)), LENGTH)
    assert chart.y_label == "test accuracy (%)"
    shallow = [result("cifar", "vpt_shallow", s, options={"num_tokens": n}) for n, s in ((1, 0.3), (50, 0.4))]
    test, validation = along(table(*sweep, *final, *shallow), LENGTH)
    assert [line.label for line in test.lines] == ["vpt_shallow"]
    assert [line.label for line in validation.lines] == ["vpt_deep"]


def test_of_several_recipes_at_one_length_the_one_that_validation_chose_stands_in_the_line():
    other = {"lr": 0.5}
    final = [deep(0.5, 1), deep(0.6, 10), deep(0.9, 10, recipe=other)]
    assert along(table(*final), LENGTH) == [], "nothing chose, and one point is no line"
    tried = [deep(0.4, 10, "tune"), deep(0.3, 10, "tune", recipe=other)]
    (chart,) = along(table(*final, *tried), LENGTH)
    assert [(p.x, p.y) for p in chart.lines[0].points] == [(1, 50.0), (10, 60.0)]


def test_depth_of_all_blocks_is_their_number_and_first_and_last_are_lines_of_their_own():
    def at(depth, start, score, built=None):
        tuned = {} if built is None else {"depth": built}
        return deep(score, split="tune", options={"depth": depth, "depth_from": start}, tuned=tuned)

    records = [at(3, "first", 0.5, 3), at(None, "first", 0.7, 12), at(3, "last", 0.4), at(6, "last", 0.6)]
    (chart,) = along(table(*records), DEPTH)
    assert {line.label: [(p.x, p.y) for p in line.points] for line in chart.lines} == {
        "vpt_deep, depth_from first": [(3, 50.0), (12, 70.0)],
        "vpt_deep, depth_from last": [(3, 40.0), (6, 60.0)],
    }


def test_of_lengths_and_depths_that_are_varied_together_each_is_a_line_along_the_other():
    found = table(
        *(
            deep(0.1 * depth + tokens / 100, tokens, "tune", options={"depth": depth})
            for depth in (1, 2, 3)
            for tokens in (5, 10)
        )
    )
    (by_depth,), (by_length,) = along(found, DEPTH), along(found, LENGTH)
    assert {line.label: [p.x for p in line.points] for line in by_depth.lines} == {
        "vpt_deep, num_tokens 10": [1, 2, 3],
        "vpt_deep, num_tokens 5": [1, 2, 3],
    }
    assert {line.label: [round(p.y, 6) for p in line.points] for line in by_length.lines} == {
        "vpt_deep, depth 1": [15, 20],
        "vpt_deep, depth 2": [25, 30],
        "vpt_deep, depth 3": [35, 40],
    }


def test_one_depth_that_was_written_in_two_ways_is_one_score_of_each_seed():
    def at(depth, score, built, **changes):
        return deep(score, options={"depth": depth}, tuned={"depth": built}, **changes)

    tried = [
        at(depth, score, depth or 12, split="tune") for depth, score in ((3, 0.5), (None, 0.7), (12, 0.7))
    ]
    (chart,) = along(table(*tried), DEPTH)
    assert points(chart.lines[0]) == [(3, 50, None), (12, 70, None)]
    final = [at(3, 0.5, 3), at(None, 0.7, 12), at(12, 0.6, 12, seed=44)]
    (chart,) = along(table(*final), DEPTH)
    assert points(chart.lines[0]) == [(3, 50, None), (12, 65, 100 * np.std([0.7, 0.6], ddof=1))]


def test_fractions_are_shares_in_per_cent_and_differ_in_nothing_else():
    records = [deep(0.2 + f / 2, data={"fraction": f, "sizes": {"train": 1000 * f}}) for f in (0.1, 0.5, 1.0)]
    other = deep(0.9, data={"fraction": 0.1}, backbone={"name": "other", "sha256": "b" * 64})
    (chart,) = along(table(*records, other), FRACTION)
    (line,) = chart.lines
    assert [(p.x, p.y) for p in line.points] == [
        (10, pytest.approx(25)),
        (50, pytest.approx(45)),
        (100, pytest.approx(70)),
    ]


def test_runs_on_other_images_are_lines_of_their_own():
    records = [deep(0.5 + n / 100, n) for n in (1, 10)]
    others = [deep(0.3 + n / 100, n, data={"fingerprint": "f" * 64}) for n in (1, 10)]
    (chart,) = along(table(*records, *others), LENGTH)
    assert [[p.y for p in line.points] for line in chart.lines] in (
        [[51, 60], [31, 40]],
        [[31, 40], [51, 60]],
    )
    assert len({line.label for line in chart.lines}) == 2


def test_every_task_has_a_chart_of_its_own_and_one_point_is_none():
    records = [
        result(task, "vpt_deep", 0.5, options={"num_tokens": n}) for task in ("svhn", "cifar") for n in (1, 2)
    ]
    charts = along(table(*records, result("dtd", "vpt_deep", 0.5, options={"num_tokens": 1})), LENGTH)
    assert [chart.title for chart in charts] == [
        "Accuracy by prompt length, cifar",
        "Accuracy by prompt length, svhn",
    ]
    assert [chart.x_scale for chart in charts] == ["linear", "linear"]
