"""Accuracy along one setting: prompt length, prompt depth, share of the training data.

A line holds runs that differ in this setting alone, apart from what is chosen on validation at each of its values:
learning rate, weight decay and the like. It is of test accuracies of `split=final` or, where a sweep of `split=tune`
has more points, of validation accuracies; the two never stand in one chart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from visprompt.reports.charts import Chart, Line, Point, file_name, in_parts, spread_scale
from visprompt.reports.choices import chosen
from visprompt.reports.runs import Run, grouped, task_place
from visprompt.reports.settings import built, labels, telling
from visprompt.runs.result import Cell, cell


@dataclass(frozen=True)
class Axis:
    """A setting along which runs differ.

    Attributes:
        name: Its name in titles.
        key: The setting.
        label: What the axis says.
        value: Its value for a run; None where a run has none.
        beside: Settings that tell lines apart although a grid may choose them: what is varied together with this one.
    """

    name: str
    key: str
    label: str
    value: Callable[[Run], float | None]
    beside: tuple[str, ...] = ()

    def beside_of(self, run: Run) -> tuple[tuple[str, str], ...]:
        """What stands beside the axis, for a run."""
        return tuple(zip(self.beside, run.at(self.beside), strict=True))


def _length(run: Run) -> float | None:
    return _number(run.result.method.get("num_tokens"))


def _depth(run: Run) -> float | None:
    """Number of blocks with prompts: what was built, since the option says null for all of them."""
    if "depth" not in run.result.method:
        return None
    return _number(run.result.tuned.get("depth", run.result.method["depth"]))


def _fraction(run: Run) -> float | None:
    share = _number(run.result.data.get("fraction"))
    return None if share is None else 100 * share


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


LENGTH = Axis("prompt length", "method.num_tokens", "number of prompt tokens", _length)
DEPTH = Axis("prompt depth", "method.depth", "number of blocks with prompts", _depth, beside=("method.num_tokens",))
FRACTION = Axis("training data", "data.fraction", "share of each class's training images (%)", _fraction)


_FOLLOWING = frozenset({"data.sizes", "backbone.carried_blocks"})  # from the share of the data, and from the depth


@dataclass(frozen=True, eq=False)
class _Sweep:
    """A line in the making.

    Attributes:
        method: Name of the method.
        base: What runs of its grids have in common with its final runs, but for the axis.
        settings: What tells it from other lines.
        points: In the order of the axis.
    """

    method: str
    base: tuple[Any, ...]
    settings: Mapping[str, str]
    points: tuple[Point, ...]


_Settle = Callable[[list[Run]], Cell | None]


def along(runs: Sequence[Run], axis: Axis) -> list[Chart]:
    """Accuracy against a setting, for each task that has a line of two points or more.

    Args:
        runs: Each once, as `read_runs` returns them.
        axis: The setting.

    Returns:
        Charts in the order of the catalog; of a task with lines of test and of validation accuracies one of each.
    """
    by_task = grouped((run for run in runs if axis.value(run) is not None), lambda run: run.task)
    charts = []
    for task in sorted(by_task, key=task_place):
        tried = [run for run in by_task[task] if run.result.split == "tune" and not run.prunes]
        final = [run for run in by_task[task] if run.result.split == "final" and run.result.status == "finished"]
        tested = _sweeps(final, axis, partial(_tested, axis=axis, tried=tried), _recorded)
        validated = _sweeps(tried, axis, _validated, lambda run: run.base[1:])
        longest = {sweep.base: len(sweep.points) for sweep in validated}
        tested = [sweep for sweep in tested if len(sweep.points) >= longest.get(sweep.base, 0)]
        shown = {sweep.base for sweep in tested}
        charts += _chart(task, axis, tested, "")
        charts += _chart(task, axis, [sweep for sweep in validated if sweep.base not in shown], _val_set(tried))
    return charts


def _recorded(run: Run) -> tuple[tuple[str, str], ...]:
    """All settings but those that are chosen for the task, or follow from others."""
    facts = tuple(item for item in run.values("task") if item[0] not in _FOLLOWING)
    return (*run.values("row"), *run.values("family"), *facts)


def _sweeps(
    runs: Sequence[Run], axis: Axis, settle: _Settle, settings_of: Callable[[Run], tuple[tuple[str, str], ...]]
) -> list[_Sweep]:
    """Lines of two points or more among runs of one task."""

    def without_axis(run: Run) -> tuple[Any, ...]:
        return (run.method, *(item for item in settings_of(run) if item[0] != axis.key), *axis.beside_of(run))

    found = []
    for alike in grouped(runs, without_axis).values():
        at = grouped(alike, lambda run: axis.value(run) or 0.0)
        cells = {x: settle(at[x]) for x in sorted(at)}
        points = tuple(_point(x, scores) for x, scores in cells.items() if scores is not None)
        if len(points) > 1:
            one = alike[0]
            base = tuple(item for item in one.base[1:] if item[0] != axis.key)
            identity = (one.method, *base, *axis.beside_of(one))
            found.append(_Sweep(one.method, identity, dict(without_axis(one)[1:]), points))
    return found


def _point(x: float, scores: Cell) -> Point:
    return Point(x, 100 * scores.mean, 100 * scores.std if len(scores.scores) > 1 else None)


def _tested(runs: list[Run], axis: Axis, tried: Sequence[Run]) -> Cell | None:
    """Test accuracies at one value: of several recipes that which validation chose there, None where nothing chose."""
    variants = grouped(runs, lambda run: (run.values("chosen"), run.values("task"), run.settings.get(axis.key)))
    if len(variants) > 1:

        def place(run: Run) -> tuple[Any, ...]:
            return (run.base, axis.value(run), axis.beside_of(run))

        best = chosen([run for run in tried if place(run) == place(runs[0])], runs)
        variants = {key: found for key, found in variants.items() if best and found[0].choice == best.choice}
    return cell(built(run.result) for found in variants.values() for run in found) if len(variants) == 1 else None


def _validated(runs: list[Run]) -> Cell | None:
    """Validation accuracies at one value, of the recipe that they choose, one of each seed; None where all diverged."""
    best = chosen(runs)
    if best is None:
        return None
    alike = [run for run in runs if run.choice == best.choice and run.result.status == "finished"]
    return Cell(tuple({run.result.seed: run.result.score for run in (*alike, best)}.values()))


def _val_set(runs: Sequence[Run]) -> str:
    names = sorted({name for run in runs for name in run.result.data.get("sizes", {}) if name.startswith("val")})
    return " and ".join(names) or "validation images"


def _chart(task: str, axis: Axis, sweeps: Sequence[_Sweep], val_set: str) -> list[Chart]:
    """A chart, or several where the lines are many; `val_set` is "" where the accuracies are of the test set."""
    if not sweeps:
        return []
    told = telling([sweep.settings for sweep in sweeps])
    names = labels([[sweep.method, *said] for sweep, said in zip(sweeps, told, strict=True)])
    lines = tuple(Line(name, sweep.points) for name, sweep in sorted(zip(names, sweeps, strict=True), key=_first))
    measured = f"validation accuracy, {val_set} (%)" if val_set else "test accuracy (%)"
    trained_without = f"Runs that were not trained on {val_set}, scored there after the last epoch"
    chart = Chart(
        name=file_name("accuracy by", axis.name, task, "validation" if val_set else ""),
        title=f"Accuracy by {axis.name}, {task}" + (f", on {val_set}" if val_set else ""),
        x_label=axis.label,
        y_label=measured,
        caption=f"{trained_without if val_set else 'Test accuracy after the last epoch, mean over seeds'}; of several "
        "recipes at one value that which validation chose. Bars, where there are several seeds: sample standard "
        "deviation.",
        lines=lines,
        x_scale=spread_scale([point.x for line in lines for point in line.points]),
    )
    return in_parts(chart)


def _first(pair: tuple[str, _Sweep]) -> str:
    return pair[0]
