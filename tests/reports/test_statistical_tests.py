"""Tests, ranks and intervals against values worked out by hand, by enumeration, or by scipy."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from visprompt.errors import UserError
from visprompt.reports.statistical_tests import (
    average_ranks,
    bootstrap,
    common_tasks,
    compare,
    gap,
    seed_interval,
    signed_rank,
    smallest_p,
)


def pair(differences):
    """Two rows with given differences in per cent."""
    one = {f"task{i}": 0.5 + difference / 100 for i, difference in enumerate(differences)}
    return one, dict.fromkeys(one, 0.5)


def enumerated(differences):
    """p-values by trying all patterns of signs on the mean ranks."""
    ranks = stats.rankdata(np.abs(differences))
    observed = ranks[np.asarray(differences) > 0].sum()
    sums = np.array([ranks[np.array(signs)].sum() for signs in product([False, True], repeat=len(ranks))])
    greater, less = (sums >= observed).mean(), (sums <= observed).mean()
    return min(1, 2 * min(greater, less)), greater


def test_the_signed_rank_test_by_hand():
    """Ranks 1, 2, 3, 4; positive 2 + 3 + 4 = 9 of 10: of 16 patterns only two reach 9."""
    assert signed_rank([-0.1, 0.2, 0.3, 0.4]) == (0.25, 0.125)
    assert signed_rank([0.1, 0.2, 0.3, 0.4]) == (0.125, 0.0625)
    assert signed_rank([-0.1, -0.2, -0.3, -0.4]) == (0.125, 1.0)


@pytest.mark.parametrize("count", [2, 5, 13, 19, 24])
def test_the_signed_rank_test_is_scipys_exact_one_without_ties(count):
    differences = np.random.default_rng(count).normal(0.3, size=count)
    expected = [
        stats.wilcoxon(differences, alternative=side, method="exact").pvalue
        for side in ("two-sided", "greater")
    ]
    assert signed_rank(differences.tolist()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_signed_rank_test_is_exact_with_ties_too(seed):
    generator = np.random.default_rng(seed)
    differences = generator.integers(1, 4, 10) * generator.choice([-1, 1], 10)
    assert signed_rank(differences.tolist()) == pytest.approx(enumerated(differences), rel=1e-12)


@pytest.mark.parametrize(
    ("pairs", "smallest"), [(1, 1.0), (4, 0.125), (5, 0.0625), (6, 0.03125), (19, 2 / 2**19)]
)
def test_few_tasks_bound_the_p_value_from_below(pairs, smallest):
    assert smallest_p(pairs) == smallest
    best = [i + 1.0 for i in range(pairs)]
    assert signed_rank(best)[0] == pytest.approx(smallest)


def test_a_comparison_of_two_rows():
    one, other = pair([4.0, -1.0, 2.0, 3.0])
    found = compare(one | {"only here": 0.9}, other | {"only there": 0.1})
    assert found.tasks == ("task0", "task1", "task2", "task3")
    assert found.difference == pytest.approx(0.02)
    assert (found.better, found.equal, found.worse) == (3, 0, 1)
    assert (found.wilcoxon, found.greater, found.smallest) == (0.25, 0.125, 0.125)
    # mean 2, standard deviation sqrt((4 + 9 + 0 + 1) / 3), t = 2 / (s / 2) with 3 degrees of freedom
    t = 2 / (sqrt(14 / 3) / 2)
    assert found.t == pytest.approx(2 * stats.t.sf(t, 3))
    scores = [[row[task] for task in found.tasks] for row in (one, other)]
    assert found.t == pytest.approx(stats.ttest_rel(*scores).pvalue)


def test_equal_tasks_and_ties_are_handled():
    found = compare(*pair([0.0, 1.0, -1.0, 2.0, 3.0]))
    assert (found.better, found.equal, found.worse) == (3, 1, 1)
    assert (found.wilcoxon, found.greater) == pytest.approx(enumerated([1, -1, 2, 3]))
    assert found.smallest == 0.125  # of the four that differ


def test_what_is_equal_but_for_rounding_is_a_tie():
    found = compare({"a": 0.1 + 0.2, "b": 0.5, "c": 0.7}, {"a": 0.3, "b": 0.4, "c": 0.6})
    assert (found.better, found.equal) == (2, 1)
    assert found.t == pytest.approx(stats.ttest_1samp([0.0, 0.1, 0.1], 0.0).pvalue)
    assert (gap(0.1 + 0.2, 0.3), gap(0.5, 0.4)) == (0.0, 0.1)


@pytest.mark.parametrize("differences", [[1.0], [0.0, 0.0]])
def test_too_few_tasks_have_no_test(differences):
    found = compare(*pair(differences))
    assert (found.wilcoxon, found.greater, found.t, found.interval) == (None, None, None, None)


def test_an_interval_over_tasks_needs_four_of_them():
    """Of three it would be the range.

    The least is drawn three times in 1 of 27 resamples, more than 2.5 %.
    """
    assert compare(*pair([1.0, 2.0, 6.0])).interval is None
    low, high = compare(*pair([1.0, 2.0, 3.0, 6.0])).interval
    assert 0.01 < low < 0.03 < high < 0.06


def test_equal_differences_have_no_t_test():
    found = compare(*pair([1.0, 1.0, 1.0]))
    assert (found.t, found.wilcoxon) == (None, 0.25)


def test_rows_without_a_common_task_are_an_error():
    with pytest.raises(UserError, match="two rows without a common task"):
        compare({"a": 0.5}, {"b": 0.5})


def test_average_ranks_by_hand():
    """On a: 1, 2, 3; on b the first two share 1.5; c is not common."""
    rows = {
        "x": {"a": 0.9, "b": 0.7, "c": 0.1},
        "y": {"a": 0.8, "b": 0.7},
        "z": {"a": 0.7, "b": 0.6, "c": 0.9},
    }
    assert average_ranks(rows) == {"x": 1.25, "y": 1.75, "z": 3.0}
    assert common_tasks(rows.values()) == ("a", "b")


def test_no_common_task_no_ranks():
    assert average_ranks({"x": {"a": 0.5}, "y": {"b": 0.5}}) == {}
    assert common_tasks([]) == ()


def test_a_bootstrap_interval_by_hand():
    """Of ten zeros and ones, half of each, a resample holds a binomial number of ones.

    2.5 % of it lie below 2.
    """
    low, high = stats.binom.ppf([0.025, 0.975], 10, 0.5) / 10
    assert bootstrap([0.0] * 5 + [1.0] * 5) == (low, high) == (0.2, 0.8)


def test_a_bootstrap_interval_is_the_same_every_time():
    values = [0.1, 0.25, 0.3, 0.6, 0.65]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)


def test_a_bootstrap_interval_agrees_with_scipys():
    values = np.random.default_rng(3).normal(0.05, 0.02, 19)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap(values.tolist()) == pytest.approx((theirs.low, theirs.high), abs=3e-4)
    assert compare(*pair((100 * values).tolist())).interval == pytest.approx(
        (theirs.low, theirs.high), abs=3e-4
    )


def test_a_single_value_has_no_interval():
    with pytest.raises(UserError, match="1 values have no bootstrap interval: give two or more"):
        bootstrap([0.5])


def test_only_three_seeds_or_more_have_an_interval():
    """Three times the same seed is drawn in 1 of 27 resamples, more than 2.5 %.

    Of three it is their range.
    """
    assert seed_interval([0.5, 0.6]) is None
    assert seed_interval([0.5, 0.6, 0.7]) == pytest.approx((0.5, 0.7))
    assert seed_interval([0.5, 0.6, 0.7, 0.9])[0] > 0.5
