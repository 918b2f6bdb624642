"""Whether one row is better than another: paired tests over common tasks, ranks, bootstrap intervals.

Two rows are paired by task; a task counts once, with its mean over seeds. Wilcoxon's signed-rank test is
two-sided here; the one-sided test ("greater"), which the VPT paper reports, is given as well. With few tasks
no p-value can be small: with n pairs the exact two-sided test reaches 2 / 2^n at best.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from visprompt.errors import UserError

RESAMPLES = 10_000
LEVEL = 0.95
_LEAST = 4  # tasks; with three, 1 of 27 resamples (over 2.5 %) is one task thrice: the interval is the range
_DIGITS = 9  # differences that are equal up to the rounding of float64 are ties


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One row compared with another, over the tasks that both have.

    Attributes:
        tasks: The tasks that both have.
        difference: Mean difference, the first row's accuracy minus the other's, as a share.
        interval: Bootstrap confidence interval of it over the tasks; None for fewer than four tasks.
        better: Tasks on which the first row is better.
        equal: Tasks on which they are equal, which the signed-rank test leaves out.
        worse: Tasks on which it is worse.
        wilcoxon: Two-sided p-value of the signed-rank test; None for fewer than two unequal tasks.
        greater: Its one-sided p-value, for the alternative that the first row is better.
        t: Two-sided p-value of the paired t-test; None if all differences are the same.
        smallest: The smallest p-value of the two-sided signed-rank test with so many unequal tasks.
    """

    tasks: tuple[str, ...]
    difference: float
    interval: tuple[float, float] | None
    better: int
    equal: int
    worse: int
    wilcoxon: float | None
    greater: float | None
    t: float | None
    smallest: float | None


def smallest_p(pairs: int) -> float:
    """Return the smallest p-value of the exact two-sided test: 2 of the 2^pairs patterns of signs."""
    return min(1.0, 2 / 2**pairs)


def gap(one: float, other: float) -> float:
    """Return one accuracy minus another; 0 if they are equal up to the rounding of float64."""
    return round(one - other, _DIGITS)


def compare(one: Mapping[str, float], other: Mapping[str, float]) -> Paired:
    """Test whether two rows differ, over their common tasks.

    Args:
        one: Accuracies by task, as shares.
        other: Those of the other row.

    Returns:
        The comparison over their common tasks.

    Raises:
        UserError: They have no task in common.
    """
    tasks = common_tasks([one, other])
    if not tasks:
        raise UserError(
            "two rows without a common task were to be compared: give rows that share at least one"
        )
    differences = np.array([gap(one[task], other[task]) for task in tasks])
    unequal = differences[differences != 0]
    wilcoxon, greater = signed_rank(unequal.tolist()) if len(unequal) > 1 else (None, None)
    return Paired(
        tasks=tasks,
        difference=float(differences.mean()),
        interval=bootstrap(differences.tolist()) if len(tasks) >= _LEAST else None,
        better=int((differences > 0).sum()),
        equal=len(tasks) - len(unequal),
        worse=int((differences < 0).sum()),
        wilcoxon=wilcoxon,
        greater=greater,
        t=float(stats.ttest_1samp(differences, 0.0).pvalue) if len(np.unique(differences)) > 1 else None,
        smallest=smallest_p(len(unequal)) if len(unequal) else None,
    )


def signed_rank(differences: Sequence[float]) -> tuple[float, float]:
    """Return exact p-values of Wilcoxon's signed-rank test, also with ties, for which scipy approximates.

    Args:
        differences: Differences other than 0.

    Returns:
        The two-sided p-value, and the one-sided one for the alternative that differences are greater than 0.
    """
    values = np.asarray(differences)
    ranks = np.rint(2 * stats.rankdata(np.abs(values))).astype(int)  # doubled: mean ranks of ties are halves
    ways = np.zeros(ranks.sum() + 1)  # ways[w]: share of all patterns of signs whose positive ranks sum to w
    ways[0] = 1.0
    for rank in ranks:
        ways = (ways + np.concatenate([np.zeros(rank), ways[:-rank]])) / 2
    observed = ranks[values > 0].sum()
    greater, less = float(ways[observed:].sum()), float(ways[: observed + 1].sum())
    return min(1.0, 2 * min(greater, less)), min(1.0, greater)


def average_ranks(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each row's mean rank over the tasks that all have; 1 is the best, ties share a mean rank.

    Args:
        rows: Accuracies by task, by row.

    Returns:
        Mean rank by row; empty if there is no common task.
    """
    tasks = common_tasks(rows.values())
    if not tasks:
        return {}
    scores = np.round([[row[task] for task in tasks] for row in rows.values()], _DIGITS)
    ranks = stats.rankdata(-scores, axis=0).mean(axis=1)
    return dict(zip(rows, ranks.tolist(), strict=True))


def common_tasks(rows: Collection[Mapping[str, float]]) -> tuple[str, ...]:
    """Return the tasks that all rows have, in the order of the first one."""
    first = next(iter(rows), {})
    return tuple(task for task in first if all(task in row for row in rows))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap confidence interval of a mean.

    Args:
        values: Differences by task, or the scores of a cell's seeds.
        seed: Seed of the resampling; the same values and seed give the same interval.

    Returns:
        The ends of the 95 % interval, from 10,000 resamples.

    Raises:
        UserError: There are fewer than two values.
    """
    if len(values) < 2:
        raise UserError(f"{len(values)} values have no bootstrap interval: give two or more")
    options = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "rng": seed}
    low, high = stats.bootstrap((values,), np.mean, **options).confidence_interval
    return float(low), float(high)


def seed_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Return the bootstrap interval of a mean over seeds; None for fewer than three."""
    return bootstrap(scores) if len(scores) >= 3 else None
