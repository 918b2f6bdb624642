"""Charts of accuracy along one setting: prompt length, prompt depth, share of the training data.

The runs of a line differ only in this setting, and in what validation chooses for each of its values:
learning rate, weight decay and the like. A line shows test accuracies of `split=final` or, if a sweep of
`split=tune` has more points, validation accuracies; a chart shows only one of the two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from visprompt.models.kind import KINDS
from visprompt.reports.charts import Chart, Line, Point, file_name, in_parts, spread_scale
from visprompt.reports.choices import chosen
from visprompt.reports.load import UNPRUNED, groups
from visprompt.reports.settings import UNRECORDED, built, labels, scope, task_place, telling, text
from visprompt.runs.result import Cell, Result, cell

# determined by the share of the data, and by the depth
_FOLLOWING = frozenset({"data.sizes", "backbone.carried_blocks"})


@dataclass(frozen=True)
class Axis:
    """A setting along which runs differ.

    Attributes:
        name: Its name in titles.
        key: Dotted key of the setting.
        label: Label of the axis.
        value: Returns the value of a run; None if the run does not have the setting.
        beside: Settings that separate lines although a grid may choose them, because sweeps vary them
            together with this one.
    """

    name: str
    key: str
    label: str
    value: Callable[[Result], float | None]
    beside: tuple[str, ...] = ()


def _length(result: Result) -> float | None:
    return _number(result.method.get("num_tokens"))


def _depth(result: Result) -> float | None:
    """Return the number of blocks with prompts, as it was built: the option may be null, which means all."""
    return _number(result.tuned.get("depth", result.method["depth"])) if "depth" in result.method else None


def _fraction(result: Result) -> float | None:
    share = _number(result.data.get("fraction"))
    return None if share is None else 100 * share


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


LENGTH = Axis("prompt length", "method.num_tokens", "number of prompt tokens", _length)
DEPTH = Axis(
    "prompt depth", "method.depth", "number of blocks with prompts", _depth, beside=("method.num_tokens",)
)
FRACTION = Axis("training data", "data.fraction", "share of each class's training images (%)", _fraction)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """A line in the making.

    Attributes:
        method: Name of the method.
        base: The settings that final runs share with the runs of their grids, without the axis, as one text.
        settings: The settings that distinguish it from other lines.
        points: In the order of the axis.
    """

    method: str
    base: str
    settings: Mapping[str, str]
    points: tuple[Point, ...]


def along(runs: pd.DataFrame, axis: Axis) -> list[Chart]:
    """Return charts of accuracy against a setting, for each task that has a line of two points or more.

    Returns:
        Charts in the order of the catalog. A task that has lines of test accuracies and lines of validation
        accuracies has a chart of each.
    """
    runs = runs.assign(x=[axis.value(result) for result in runs["result"]])
    runs = _with_lines(runs[runs["x"].notna()], axis)
    charts = []
    for own in sorted(groups(runs, ["task"]), key=lambda own: task_place(own["task"].iat[0])):
        task = own["task"].iat[0]
        tried = own[(own["split"] == "tune") & (own["pruning"] == UNPRUNED)]
        final = own[(own["split"] == "final") & (own["status"] == "finished")]
        tested = _sweeps(final, "recorded", partial(_tested, tried=tried, axis=axis))
        validated = _sweeps(tried, "before", _validated)
        longest = {sweep.base: len(sweep.points) for sweep in validated}
        tested = [sweep for sweep in tested if len(sweep.points) >= longest.get(sweep.base, 0)]
        shown = {sweep.base for sweep in tested}
        score = KINDS[own["result"].iat[0].kind].words
        charts += _chart(task, axis, score, tested, "")
        others = [sweep for sweep in validated if sweep.base not in shown]
        charts += _chart(task, axis, score, others, _val_set(tried))
    return charts


def _with_lines(runs: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """Add columns to group runs into lines: dicts of settings without the axis, and the same as texts.

    Columns:
        before, before_line: What a final run shares with its grid, for lines of validation accuracies.
        recorded, recorded_line: All settings that were neither chosen nor determined by the axis, for lines
        of test accuracies.
    """
    before, recorded = [], []
    for run in runs.to_dict("records"):
        beside = {key: run[key] for key in axis.beside}
        reach = {
            key: scope(key, run["method"]) for key in run if "." in key or key in ("precision", "trainer")
        }
        kept = {key: run[key] for key in reach if reach[key] != "chosen" and key not in _FOLLOWING}
        known = {key: value for key, value in kept.items() if value != UNRECORDED}
        recorded.append({key: value for key, value in known.items() if key != axis.key} | beside)
        before.append({key: value for key, value in run["shared"].items() if key != axis.key} | beside)
    lines = {
        f"{name}_line": [text([method, told]) for method, told in zip(runs["method"], tolds, strict=True)]
        for name, tolds in (("before", before), ("recorded", recorded))
    }
    return runs.assign(before=before, recorded=recorded, **lines)


def _sweeps(runs: pd.DataFrame, by: str, settle: Callable[[pd.DataFrame], Cell | None]) -> list[_Sweep]:
    """Return lines of two points or more among runs of one task."""
    found = []
    for alike in groups(runs, [f"{by}_line"]):
        at = sorted(groups(alike, ["x"]), key=lambda own: own["x"].iat[0])
        cells = [(own["x"].iat[0], settle(own)) for own in at]
        points = tuple(
            Point(x, 100 * scores.mean, 100 * scores.std if len(scores.scores) > 1 else None)
            for x, scores in cells
            if scores is not None
        )
        if len(points) > 1:
            first = alike.iloc[0]
            found.append(_Sweep(first["method"], first["before_line"], first[by], points))
    return found


def _tested(runs: pd.DataFrame, tried: pd.DataFrame, axis: Axis) -> Cell | None:
    """Return the test accuracies at one value, of the recipe that validation chose; None if it is unknown."""
    keys = [
        key for key in runs.columns if "." in key and scope(key, runs["method"].iat[0]) in ("chosen", "task")
    ]
    variants = groups(runs, [*keys, axis.key])
    if len(variants) > 1:
        same = [*axis.beside, "base", "x"]
        best = chosen(tried[(tried[same] == runs[same].iloc[0]).all(axis=1)], runs)
        variants = [own for own in variants if best is not None and own["choice"].iat[0] == best["choice"]]
    return cell(built(result) for own in variants for result in own["result"]) if len(variants) == 1 else None


def _validated(runs: pd.DataFrame) -> Cell | None:
    """Return the validation accuracies at one value, of the best recipe; None if all runs diverged."""
    best = chosen(runs, runs[:0])
    if best is None:
        return None
    alike = runs[(runs["choice"] == best["choice"]) & (runs["status"] == "finished")]
    results = [*alike["result"], best["result"]]
    return Cell(tuple({result.seed: result.score for result in results}.values()))  # one of each seed


def _val_set(runs: pd.DataFrame) -> str:
    sizes = {name for result in runs["result"] for name in result.data.get("sizes", {})}
    return " and ".join(sorted(name for name in sizes if name.startswith("val"))) or "validation images"


def _chart(task: str, axis: Axis, score: str, sweeps: Sequence[_Sweep], val_set: str) -> list[Chart]:
    """Return a chart, or several if there are many lines; `val_set` is "" for test scores."""
    if not sweeps:
        return []
    told = telling([sweep.settings for sweep in sweeps])
    names = labels([[sweep.method, *said] for sweep, said in zip(sweeps, told, strict=True)])
    lines = [Line(name, sweep.points) for name, sweep in zip(names, sweeps, strict=True)]
    measured = f"Test {score} after the last epoch, mean over seeds"
    if val_set:
        measured = f"Runs that were not trained on {val_set}, scored there after the last epoch"
    chart = Chart(
        name=file_name("accuracy by", axis.name, task, "validation" if val_set else ""),
        title=f"{score[0].upper()}{score[1:]} by {axis.name}, {task}"
        + (f", on {val_set}" if val_set else ""),
        x_label=axis.label,
        y_label=f"validation {score}, {val_set} (%)" if val_set else f"test {score} (%)",
        caption=f"{measured}; if a value has several recipes, the one that validation chose. Bars: sample "
        "standard deviation over seeds, if there are several.",
        lines=tuple(sorted(lines, key=lambda line: line.label)),
        x_scale=spread_scale([point.x for line in lines for point in line.points]),
    )
    return in_parts(chart)
