"""Runs of `split=tune` as grids: how many points, and which of them validation chooses."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from visprompt.reports.runs import Run, Values, differing, grouped, held, method_place, task_place
from visprompt.reports.settings import UNRECORDED, before_the_choice, labels, telling, text, words
from visprompt.runs.result import Result, choose


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs among which validation chooses.

    Attributes:
        label: The method, and what tells this grid from its others on the task.
        method: Its name.
        task: The task.
        pruning: Whether they are the points of a chain's prune grid, after everything else was chosen.
        runs: The runs, of each point one for each seed.
        chosen: A run of the point that validation chooses, see `chosen`; None where all diverged.
        choice: What it has that others have not, in words.
        used: What the final runs of the same protocol have, in words; the choice itself, unless the points are of more
            than one grid, or final runs took something that validation did not choose.
    """

    label: str
    method: str
    task: str
    pruning: bool
    runs: tuple[Run, ...]
    chosen: Run | None
    choice: str
    used: tuple[str, ...]

    @property
    def points(self) -> list[list[Run]]:
        """The runs of each point."""
        return list(grouped(self.runs, _point).values())

    @property
    def diverged(self) -> int:
        """Number of points of which a run's loss was not finite."""
        return sum(_judged(point).status == "diverged" for point in self.points)

    @property
    def score(self) -> float | None:
        """Validation accuracy of the chosen point, its mean over seeds; None where all diverged."""
        return next((_judged(point).score for point in self.points if self.chosen in point), None)


def grids(runs: Sequence[Run]) -> list[Grid]:
    """Groups runs of `split=tune` by what they were points of, and chooses.

    Args:
        runs: Each once, as `read_runs` returns them.

    Returns:
        Grids in the order of `METHODS` and of the catalog, those of settings before those of pruning.
    """
    tune = [run for run in runs if run.result.split == "tune"]
    finals = grouped((run for run in runs if run.result.split == "final"), lambda run: run.base)
    made: dict[tuple[str, str], list[list[Run]]] = defaultdict(list)
    for found in grouped(tune, _grid_of).values():
        made[found[0].method, found[0].task].append(found)
    order = sorted(made, key=lambda key: (method_place(key[0]), task_place(key[1])))
    return [grid for key in order for grid in _labelled(made[key], finals)]


def chosen(runs: Sequence[Run], finals: Iterable[Run] = ()) -> Run | None:
    """A run of the point that validation chooses by the rule of `results.choose`; None where there is none.

    A point is judged by its mean over seeds. Where the rule leaves a tie, what keeps fewer tokens and parameters is
    taken in a prune grid. In another the first point of the grid was taken, which no record tells: the one that has
    final runs or, where that does not tell either, the one of smaller values.

    Args:
        runs: Of `split=tune`.
        finals: Final runs of the same protocol; their scores are not read.
    """
    taken = {run.choice for run in finals}
    points = grouped(sorted(runs, key=lambda run: (run.choice not in taken, _size(run))), _point).values()
    return choose([_judged(point) for point in points], [point[0] for point in points])


def _point(run: Run) -> object:
    """What runs of one point have in common; of a chain, which belongs to a seed, every link is one."""
    return text(dict(run.result.method)) if run.prunes else run.choice


def _judged(point: Sequence[Run]) -> Result:
    """What stands for a point: its mean over seeds, or a run that diverged."""
    worst = min((run.result for run in point), key=lambda result: result.score)
    mean = fmean(run.result.score for run in point)
    return worst if worst.status == "diverged" else worst.model_copy(update={"metrics": {"val/acc": mean}})


def _size(run: Run) -> tuple[object, ...]:
    tuned = run.result.tuned
    kept = (tuned["kept_tokens"], tuned["parameters"]) if run.prunes and run.result.status == "finished" else ()
    return (len(kept), *kept, [_number(value) for _, value in run.choice])


def _number(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _pruning(run: Run) -> Values:
    """What tells the prune grids of a method from its other grid, and from each other: one for each seed."""
    return (("method.pruning", f"of seed {run.result.seed}" if run.prunes else "none"),)


def _grid_of(run: Run) -> object:
    """What runs of one grid have in common: a chain tries its prunings when everything else is chosen."""
    return (run.base, _pruning(run), run.choice if run.prunes else ())


def _labelled(groups: Sequence[list[Run]], finals: Mapping[tuple[Any, ...], list[Run]]) -> list[Grid]:
    known = zip(held(groups), groups, strict=True)
    told = telling([before_the_choice(one) | dict(_pruning(found[0])) for one, found in known])
    chains = telling([dict(found[0].choice) if found[0].prunes else {} for found in groups])
    names = labels([[found[0].method, *said, *more] for found, said, more in zip(groups, told, chains, strict=True)])
    made = [_grid(label, found, finals.get(found[0].base, [])) for label, found in zip(names, groups, strict=True)]
    return sorted(made, key=lambda grid: (grid.pruning, grid.label))


def _grid(label: str, runs: Sequence[Run], finals: Sequence[Run]) -> Grid:
    pruning = runs[0].prunes
    if pruning:
        finals = [run for run in finals if _grid_of(run) == _grid_of(runs[0])]
    best = chosen(runs, finals)
    keys = differing(run.choice for run in (*runs, *finals))
    return Grid(
        label=label,
        method=runs[0].method,
        task=runs[0].task,
        pruning=pruning,
        runs=tuple(runs),
        chosen=best,
        choice=_in_words(best, keys, pruning) if best else "",
        used=tuple(sorted({_in_words(run, keys, pruning) for run in finals})),
    )


def _in_words(run: Run, keys: Sequence[str], pruning: bool) -> str:
    if pruning:
        tuned = run.result.tuned
        return f"{tuned['kept_tokens']} tokens, {tuned['parameters']:,} parameters"
    return ", ".join(words(key, run.settings.get(key, UNRECORDED)) for key in keys)
