"""Charts as numbers: lines of points, labels of the axes, and the alternative text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import fmean

import pandas as pd

from visprompt.data.catalog import SUITES
from visprompt.models.kind import KINDS, SINGLE_LABEL
from visprompt.reports.choices import Grid
from visprompt.reports.load import history
from visprompt.reports.published import FLAT
from visprompt.reports.rows import Protocol, Row, protocols
from visprompt.reports.settings import task_place
from visprompt.reports.summary import score_words
from visprompt.reports.tables import task_groups
from visprompt.reports.writers import Number, Table

MOST_LINES = 8  # more in one chart cannot be told apart
_LEAST = 2  # points or lines: fewer are read off the tables
_FRONT = "Filled and joined: the Pareto front; no other is as good with as few tuned parameters."
_TOLD = 12  # points of a line that the words for it name; of a longer one its ends


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Attributes:
        x: Position along the horizontal axis.
        y: Position along the vertical axis.
        spread: Sample standard deviation of `y` over seeds; None for a single seed.
    """

    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        label: Its label in the legend.
        points: In the order of `x`.
    """

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one axis.

    Attributes:
        name: Name of its files, without an extension.
        title: What it shows.
        x_label: Label of the horizontal axis, with its unit.
        y_label: Label of the vertical axis, with its unit.
        caption: What to know about it, in whole sentences.
        lines: What is drawn.
        x_scale: "linear", "log", or "symlog": logarithmic, but with a 0.
        y_scale: "linear" or "log".
        front: Whether each line is a single point and the Pareto front is marked: the points for which no
            other point with the same or a smaller `x` has a higher `y`.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    caption: str
    lines: tuple[Line, ...]
    x_scale: str = "linear"
    y_scale: str = "linear"
    front: bool = False

    @property
    def alt(self) -> str:
        """Return the alternative text, with as many of the numbers as can be listened to."""
        said = "; ".join(_told(line) for line in self.lines)
        best = f" On the front: {', '.join(line.label for line in front(self.lines))}." if self.front else ""
        return f"{self.y_label} against {self.x_label}. {said}.{best}"

    @property
    def values(self) -> Table:
        """Return its numbers as a table."""
        rows = tuple(
            (line.label, Number(p.x, f"{p.x:g}"), Number(p.y, f"{p.y:g}", p.spread, f"{p.spread or 0:g}"))
            for line in self.lines
            for p in line.points
        )
        return Table(self.title, ("line", self.x_label, self.y_label), rows)


def front(lines: Iterable[Line]) -> list[Line]:
    """Return the Pareto front of lines of one point, in the order of `x`; see `Chart.front`."""
    ordered = sorted(lines, key=lambda line: (line.points[0].x, -line.points[0].y))
    found: list[Line] = []
    for line in ordered:
        if not found or line.points[0].y > found[-1].points[0].y:
            found.append(line)
    return found


def _told(line: Line) -> str:
    shown = line.points if len(line.points) <= _TOLD else (line.points[0], line.points[-1])
    return f"{line.label}: " + ", ".join(f"{point.y:.3g} at {point.x:,.6g}" for point in shown)


def in_parts(chart: Chart) -> list[Chart]:
    """Divide a chart into charts of at most `MOST_LINES` lines, about as many in each."""
    if len(chart.lines) <= MOST_LINES:
        return [chart]
    size = ceil(len(chart.lines) / ceil(len(chart.lines) / MOST_LINES))
    parts = [chart.lines[i : i + size] for i in range(0, len(chart.lines), size)]
    return [
        replace(chart, name=f"{chart.name}_{i}", title=f"{chart.title} ({i} of {len(parts)})", lines=lines)
        for i, lines in enumerate(parts, 1)
    ]


def file_name(*words: str) -> str:
    """Return words as the name of a file, without an extension, and short enough for a file system."""
    return re.sub(r"[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")[:150]


def spread_scale(values: Sequence[float]) -> str:
    """Return "log" where positive values span more than one power of ten, else "linear"."""
    return "log" if min(values) > 0 and max(values) > 10 * min(values) else "linear"


# charts of a table's rows, in per cent


def by_parameters(rows: Sequence[Row]) -> list[Chart]:
    """Return charts of accuracy against tuned parameters with the Pareto front, one protocol in each.

    For each protocol and group of tasks there is a chart of the mean over the group, of the rows that have
    all its tasks (if there are two). A task has a chart as well if more rows have it than are in that chart.
    """
    charts = []
    for protocol in protocols(rows):
        groups = task_groups(protocol.rows)
        vtab = {FLAT: SUITES["vtab_all"]} if groups.keys() & {"vtab_natural", "vtab_specialized"} else {}
        for name, tasks in (vtab | groups).items():
            whole = (
                [row for row in protocol.rows if all(task in row.cells for task in tasks)]
                if len(tasks) > 1
                else []
            )
            whole = whole if len(whole) >= _LEAST else []
            if whole:
                charts.append(_scatter(protocol, whole, tasks, f"mean of {len(tasks)} tasks, {name}"))
            for task in () if name == FLAT else tasks:
                with_task = [row for row in protocol.rows if task in row.cells]
                if len(with_task) >= _LEAST and len(with_task) > len(whole):
                    charts.append(_scatter(protocol, with_task, (task,), task))
    return charts


def _scatter(protocol: Protocol, rows: Sequence[Row], tasks: Sequence[str], of: str) -> Chart:
    lines = tuple(Line(protocol.name(row), (_point(row, tasks),)) for row in rows)
    least = min(line.points[0].x for line in lines)
    score = score_words(rows, tasks)
    bars = ", bars: sample standard deviation" if any(line.points[0].spread for line in lines) else ""
    return Chart(
        name=file_name("accuracy by parameters", of, protocol.words),
        title=protocol.titled(f"{score[0].upper()}{score[1:]} by tuned parameters, {of}"),
        x_label="tuned parameters, without the head",
        y_label=f"test {score} (%)",
        caption=f"Mean over seeds{bars}. {_FRONT}",
        lines=lines,
        x_scale="log" if least > 0 else "symlog",
        front=True,
    )


def _point(row: Row, tasks: Sequence[str]) -> Point:
    """Return a row's mean over tasks; only the point of a single task has a spread over seeds."""
    cells = [row.cells[task] for task in tasks]
    spread = 100 * cells[0].std if len(cells) == 1 and len(cells[0].scores) > 1 else None
    parameters = [fmean(row.runs["parameters"][row.runs["task"] == task]) for task in tasks]
    return Point(fmean(parameters), 100 * fmean(cell.mean for cell in cells), spread)


def training(rows: Sequence[Row], grids: Sequence[Grid]) -> list[Chart]:
    """Return up to three charts of loss and accuracy by epoch for each task, of runs that have a metrics.csv.

    Args:
        rows: Rows, of whose final runs loss and accuracy on the training images are drawn, averaged over
            seeds.
        grids: Grids, of whose chosen runs the accuracy on the validation images is drawn.
    """
    averaged = "Final runs, mean over seeds."
    of_one = "For each grid the run that validation chose, by the score after the last epoch."
    charts = []
    for task in sorted(
        {task for row in rows for task in row.cells} | {grid.task for grid in grids}, key=task_place
    ):
        final = {row.label: row.runs[row.runs["task"] == task] for row in rows if task in row.cells}
        chosen = {
            grid.label: grid.chosen.to_frame().T
            for grid in grids
            if grid.task == task and grid.chosen is not None and not grid.pruning
        }
        charts += _curves(f"Training loss, {task}", final, "train/loss", "training loss", averaged)
        of_task = [part for part in (*final.values(), *chosen.values()) if len(part)]
        kind = KINDS[of_task[0]["result"].iat[0].kind] if of_task else SINGLE_LABEL
        hit, score = kind.hit_words, kind.words
        charts += _curves(
            f"Training {hit}, {task}", final, f"train/{kind.hit}", f"training {hit} (%)", averaged
        )
        title = f"Validation {score} while training, {task}"
        charts += _curves(title, chosen, f"val/{kind.score}", f"validation {score} (%)", of_one)
    return charts


def _curves(
    title: str, runs: Mapping[str, pd.DataFrame], metric: str, y_label: str, caption: str
) -> list[Chart]:
    """Return a chart of one metric, or several if there are many lines; no chart if no run recorded it."""
    is_loss = metric.endswith("loss")
    lines, partial = [], []
    for label, own in runs.items():
        curves = [history(*run, metric) for run in zip(own["folder"], own["result"], strict=True)]
        there = [curve for curve in curves if curve]
        points = tuple(Point(epoch, (1 if is_loss else 100) * value) for epoch, value in _mean(there).items())
        if len(points) >= _LEAST:
            lines.append(Line(label, points))
            partial += [f"{label} {len(there)} of {len(curves)}"] if len(there) < len(curves) else []
    if not lines:
        return []
    told = (
        f" Of some runs no such metrics are left, and these are in no mean; there are: {', '.join(partial)}."
    )
    chart = Chart(
        name=file_name(title),
        title=title,
        x_label="epoch",
        y_label=y_label,
        caption=caption + (told if partial else ""),
        lines=tuple(lines),
        y_scale=spread_scale([point.y for line in lines for point in line.points]) if is_loss else "linear",
    )
    return in_parts(chart)


def _mean(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean at the epochs that all curves have."""
    common = sorted(set.intersection(*map(set, curves))) if curves else ()
    return {epoch: fmean(curve[epoch] for curve in curves) for epoch in common}
