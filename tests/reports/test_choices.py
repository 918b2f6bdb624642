"""What was tried on the validation images, and what they chose."""

import pytest

from helpers.written_runs import changed, result, table
from visprompt.reports.choices import grids


def deep(task, length, split="final", score=0.5, **changes):
    return result(task, "vpt_deep", score, options={"num_tokens": length}, split=split, **changes)


def test_a_grid_counts_its_points_and_its_choice_is_the_protocols():
    points = [(0.8, 1.0, 0.001), (0.8, 0.5, 0.0), (0.8, 0.5, 0.001), (0.7, 0.1, 0.0)]
    records = [
        result(split="tune", score=s, recipe={"lr": lr, "weight_decay": decay}) for s, lr, decay in points
    ] + [result(split="tune", status="diverged", diverged_step=3, recipe={"lr": 50.0})]
    (grid,) = grids(table(*records, result()))
    assert (grid.label, grid.task, len(grid.runs), grid.diverged, grid.pruning) == (
        "linear",
        "cifar",
        5,
        1,
        False,
    )
    assert grid.choice == "lr 0.5, weight_decay 0.001"
    assert grid.chosen.result.score == 0.8


def test_what_the_rule_leaves_tied_goes_to_the_smaller_value():
    points = [
        result(method="vfpt", score=0.8, split="tune", options={"fourier_share": s}) for s in (0.7, 0.3, 0.5)
    ]
    (grid,) = grids(table(*points))
    assert grid.choice == "fourier_share 0.3"


def ranks(score, *of, split="tune"):
    return [result(method="vpt_low_rank", score=score, split=split, options={"rank": rank}) for rank in of]


def test_a_tie_goes_to_the_point_that_was_taken_whatever_its_score_on_the_test_set():
    (grid,) = grids(table(*ranks(0.8, 8, 4), *ranks(0.1, 8, split="final")))
    assert (grid.choice, grid.used) == ("rank 8", ("rank 8",))
    (grid,) = grids(table(*ranks(0.8, 8, 4), *ranks(0.9, 8, 4, split="final")))
    assert grid.choice == "rank 4"


def test_seeds_of_a_point_are_one_point_that_is_judged_by_its_mean():
    scores = {(1.0, 42): 0.7, (1.0, 44): 0.72, (5.0, 42): 0.9, (5.0, 44): 0.4}
    tried = [result(split="tune", score=s, seed=seed, recipe={"lr": lr}) for (lr, seed), s in scores.items()]
    (grid,) = grids(table(*tried))
    assert (len(grid.runs), len(grid.points), grid.choice) == (4, 2, "lr 1.0")
    assert grid.score == pytest.approx(0.71)
    lost = result(split="tune", seed=45, recipe={"lr": 1.0}, status="diverged", diverged_step=3)
    (grid,) = grids(table(*tried, lost))
    assert (grid.diverged, grid.choice, grid.score) == (1, "lr 5.0", pytest.approx(0.65))


def test_final_runs_that_took_something_else_are_said_to():
    tried = [deep("cifar", length, "tune", score) for length, score in ((1, 0.8), (10, 0.7))]
    (alone,) = grids(table(*tried, deep("cifar", 1, precision="bf16-mixed")))
    (as_chosen,) = grids(table(*tried, deep("cifar", 1), deep("cifar", 1, seed=44)))
    (other,) = grids(table(*tried, deep("cifar", 10), deep("cifar", 50)))
    assert (alone.choice, alone.used) == ("num_tokens 1", ())
    assert (as_chosen.choice, as_chosen.used) == ("num_tokens 1", ("num_tokens 1",))
    assert (other.choice, other.used) == ("num_tokens 1", ("num_tokens 10", "num_tokens 50"))


def test_a_grid_in_which_all_diverged_chose_nothing():
    (grid,) = grids(table(result(split="tune", status="diverged")))
    assert (grid.chosen, grid.choice) == (None, "")


def test_a_chains_prune_grid_is_one_of_its_own_for_each_seed():
    def link(seed, kept, score, mask):
        options = {"prune": True, "initial": "a", "token_mask": mask}
        tuned = {"kept_tokens": kept, "parameters": 100 * kept}
        return result("cifar", "e2vpt", score, split="tune", seed=seed, options=options, tuned=tuned)

    plain = result("cifar", "e2vpt", 0.6, split="tune", options={"prune": False, "initial": None})
    links = [link(42, 4, 0.7, None), link(42, 2, 0.7, [0, 1]), link(44, 1, 0.5, [1, 0])]
    final = changed(link(42, 2, 0.7, [0, 1]), split="final", metrics={"test/acc": 0.6})
    made = grids(table(*links, plain, final))
    assert [(grid.label, len(grid.runs), grid.pruning) for grid in made] == [
        ("e2vpt, pruning none", 1, False),
        ("e2vpt, pruning of seed 42", 2, True),
        ("e2vpt, pruning of seed 44", 1, True),
    ]
    assert [grid.choice for grid in made] == ["", "2 tokens, 200 parameters", "1 tokens, 100 parameters"]
    assert [grid.used for grid in made] == [("",), ("2 tokens, 200 parameters",), ()]


def test_chains_with_other_settings_have_prune_grids_of_their_own():
    def link(split, lr, length, kept, score):
        options = {"prune": True, "initial": "a", "num_tokens": length, "token_mask": [kept]}
        tuned = {"kept_tokens": kept, "parameters": 100 * kept}
        return result("cifar", "e2vpt", score, split=split, options=options, tuned=tuned, recipe={"lr": lr})

    tried = [
        link("tune", lr, n, kept, s)
        for lr, n, kept, s in ((1, 10, 9, 0.7), (1, 10, 2, 0.8), (5, 50, 40, 0.9))
    ]
    made = grids(table(*tried, link("final", 1, 10, 2, 0.5)))
    assert [(grid.label, len(grid.runs), grid.choice, grid.used) for grid in made] == [
        ("e2vpt, num_tokens 10", 2, "2 tokens, 200 parameters", ("2 tokens, 200 parameters",)),
        ("e2vpt, num_tokens 50", 1, "40 tokens, 4,000 parameters", ()),
    ]
