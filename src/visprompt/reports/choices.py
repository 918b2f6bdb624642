"""Runs of `split=tune` as grids: how many points, and which of them validation chooses."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visprompt.reports.runs import Run, Values, differing, grouped, held, method_place, task_place
from visprompt.reports.settings import UNRECORDED, before_the_choice, labels, telling, words
from visprompt.results import choose


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs among which validation chooses.

    Attributes:
        label: The method, and what tells this grid from its others on the task.
        method: Its name.
        task: The task.
        pruning: Whether they are the points of a chain's prune grid, after everything else was chosen.
        runs: The points.
        chosen: The one that validation chooses by the rule of `results.choose`; None where all diverged.
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
    def diverged(self) -> int:
        """Number of points whose loss was not finite."""
        return sum(run.result.status == "diverged" for run in self.runs)


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
    for found in grouped(tune, lambda run: (run.base, _pruning(run))).values():
        made[found[0].method, found[0].task].append(found)
    order = sorted(made, key=lambda key: (method_place(key[0]), task_place(key[1])))
    return [grid for key in order for grid in _labelled(made[key], finals)]


def chosen(runs: Sequence[Run]) -> Run | None:
    """The run that validation chooses by the rule of `results.choose`; None where there is none.

    Where its rule leaves a tie, what keeps fewer tokens and parameters is taken in a prune grid, the smaller values of
    what was tried in another.
    """
    ordered = sorted(runs, key=_size)
    return choose([run.result for run in ordered], ordered)


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


def _labelled(groups: Sequence[list[Run]], finals: Mapping[tuple[Any, ...], list[Run]]) -> list[Grid]:
    known = zip(held(groups), groups, strict=True)
    told = telling([before_the_choice(one) | dict(_pruning(found[0])) for one, found in known])
    names = labels([[found[0].method, *said] for found, said in zip(groups, told, strict=True)])
    made = [_grid(label, found, finals.get(found[0].base, [])) for label, found in zip(names, groups, strict=True)]
    return sorted(made, key=lambda grid: (grid.pruning, grid.label))


def _grid(label: str, runs: Sequence[Run], finals: Sequence[Run]) -> Grid:
    best, pruning = chosen(runs), runs[0].prunes
    if pruning:
        finals = [run for run in finals if _pruning(run) == _pruning(runs[0])]
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
