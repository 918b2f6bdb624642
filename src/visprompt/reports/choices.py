"""Groups runs of `split=tune` into grids, and finds the point of each grid that validation chooses."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from visprompt.models.kind import KINDS
from visprompt.reports.load import UNPRUNED, columns, differing, groups, held
from visprompt.reports.settings import (
    UNRECORDED,
    before_the_choice,
    labels,
    method_place,
    task_place,
    telling,
    words,
)
from visprompt.runs.result import Result, choose


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Runs among which validation chooses.

    Attributes:
        label: The method, and what distinguishes this grid from the method's other grids on the task.
        method: Name of the method.
        task: Id of the task.
        pruning: Whether the points are prunings of one chain, tried after everything else was chosen.
        runs: The runs, one for each point and seed.
        chosen: A run of the point that validation chooses, see `chosen`; None if all diverged.
        choice: The settings that distinguish the chosen point from the others, in words.
        used: The same settings of the final runs of this protocol, in words. This is the choice alone, unless
            the points are of several grids, or final runs used what validation did not choose.
    """

    label: str
    method: str
    task: str
    pruning: bool
    runs: pd.DataFrame
    chosen: pd.Series | None
    choice: str
    used: tuple[str, ...]

    @property
    def points(self) -> list[pd.DataFrame]:
        """Return the runs of each point."""
        return groups(self.runs, ["point"])

    @property
    def diverged(self) -> int:
        """Return the number of points that have a diverged run."""
        return sum(_judged(point).status == "diverged" for point in self.points)

    @property
    def score(self) -> float | None:
        """Return the chosen point's validation accuracy, averaged over seeds; None if all points diverged."""
        if self.chosen is None:
            return None
        return _judged(self.runs[self.runs["point"] == self.chosen["point"]]).score


def grids(runs: pd.DataFrame) -> list[Grid]:
    """Return the grids in the order of methods and tasks, grids of settings before those of prunings."""
    finals = runs[runs["split"] == "final"]
    made: list[Grid] = []
    for tried in groups(runs[runs["split"] == "tune"], ["method", "task"]):
        parts = groups(tried, ["grid"])
        made += [_grid(label, part, finals) for label, part in zip(_labels(parts), parts, strict=True)]
    return sorted(
        made, key=lambda grid: (method_place(grid.method), task_place(grid.task), grid.pruning, grid.label)
    )


def chosen(runs: pd.DataFrame, finals: pd.DataFrame) -> pd.Series | None:
    """Return a run of the point that validation chooses by the rule of `result.choose`, or None.

    A point is judged by its mean over seeds. Among equally good prunings the one with fewer tokens and
    parameters is chosen. Among equally good settings the run took the first in the order of its grid, which
    is not recorded: here it is the point that has final runs, or else the one with the smaller values.

    Args:
        runs: Runs of one method with `split=tune`.
        finals: Final runs of the same protocol; their scores are not read.
    """
    taken = {*finals["choice"]}
    keys = _chosen_keys(runs)
    order = sorted(runs.index, key=lambda i: (runs["choice"][i] not in taken, *_size(runs.loc[i], keys)))
    points = groups(runs.loc[order], ["point"])
    return choose([_judged(point) for point in points], [point.iloc[0] for point in points])


def _judged(point: pd.DataFrame) -> Result:
    """Return one result for a point: with the mean score over seeds, or that of a diverged run."""
    worst: Result = min(point["result"], key=lambda result: result.score)
    mean = fmean(result.score for result in point["result"])
    return (
        worst
        if worst.status == "diverged"
        else worst.model_copy(update={"metrics": {f"val/{KINDS[worst.kind].score}": mean}})
    )


def _size(run: pd.Series, keys: Sequence[str]) -> tuple[object, ...]:
    tuned = run["result"].tuned
    is_link = run["pruning"] != UNPRUNED and run["status"] == "finished"
    left = (tuned["kept_tokens"], tuned["parameters"]) if is_link else ()
    return len(left), *left, [_number(run[key]) for key in keys]


def _number(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _chosen_keys(runs: pd.DataFrame) -> list[str]:
    """Return the settings that a grid varies."""
    return list(before_the_choice(dict.fromkeys(columns(runs, "chosen"), "")))


def _labels(parts: Sequence[pd.DataFrame]) -> list[str]:
    """Return the labels of a method's grids on a task."""
    first = [part.iloc[0] for part in parts]
    told = telling(
        [
            before_the_choice(known) | {"method.pruning": run["pruning"]}
            for known, run in zip(held(parts), first, strict=True)
        ]
    )
    links = telling([_recorded_choice(run, parts[0]) if run["pruning"] != UNPRUNED else {} for run in first])
    return labels([[run["method"], *one, *more] for run, one, more in zip(first, told, links, strict=True)])


def _recorded_choice(run: pd.Series, runs: pd.DataFrame) -> dict[str, str]:
    return {key: run[key] for key in _chosen_keys(runs) if run[key] != UNRECORDED}


def _grid(label: str, runs: pd.DataFrame, finals: pd.DataFrame) -> Grid:
    method, task, base, of_grid = (runs[key].iat[0] for key in ("method", "task", "base", "grid"))
    pruning = runs["pruning"].iat[0] != UNPRUNED
    finals = finals[finals["grid"] == of_grid] if pruning else finals[finals["base"] == base]
    best, keys = chosen(runs, finals), differing(pd.concat([runs, finals]), _chosen_keys(runs))
    choice = "" if best is None else _in_words(best, keys, pruning)
    used = {_in_words(run, keys, pruning) for _, run in finals.iterrows()}
    return Grid(
        **{"label": label, "method": method, "task": task, "pruning": pruning},
        **{"runs": runs, "chosen": best, "choice": choice, "used": tuple(sorted(used))},
    )


def _in_words(run: pd.Series, keys: Sequence[str], pruning: bool) -> str:
    if pruning:
        tuned = run["result"].tuned
        return f"{tuned['kept_tokens']} tokens, {tuned['parameters']:,} parameters"
    return ", ".join(words(key, run[key]) for key in keys)
