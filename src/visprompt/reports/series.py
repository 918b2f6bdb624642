"""Charts of a table's rows: accuracy against tuned parameters, and how their runs trained. Accuracies in per cent."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from math import isfinite
from pathlib import Path
from statistics import fmean

from visprompt.data.catalog import SUITES
from visprompt.reports.charts import Chart, Line, Point, file_name, in_parts, spread_scale
from visprompt.reports.choices import Grid
from visprompt.reports.collect import Row
from visprompt.reports.comparable import Protocol, protocols
from visprompt.reports.runs import Run, task_place
from visprompt.reports.summary import FLAT
from visprompt.reports.tables import groups

_Curve = Mapping[int, float]  # by epoch, the first being 1
_LEAST = 2  # points or lines: fewer are read off the tables


def by_parameters(rows: Sequence[Row]) -> list[Chart]:
    """Accuracy against tuned parameters, with the Pareto front, among rows under one protocol.

    Args:
        rows: Rows.

    Returns:
        For each protocol a chart of the mean over each group of which two rows have all tasks, and one of each task on
        which other rows stand than in the chart of its group.
    """
    charts = []
    for protocol in protocols(rows):
        for name, tasks in _groups(protocol.rows).items():
            whole = [row for row in protocol.rows if all(task in row.cells for task in tasks)] if len(tasks) > 1 else []
            whole = whole if len(whole) >= _LEAST else []
            if whole:
                charts += _scatter(protocol, whole, tasks, f"mean of {len(tasks)} tasks, {name}")
            for task in () if name == FLAT else tasks:
                with_task = [row for row in protocol.rows if task in row.cells]
                if len(with_task) >= _LEAST and len(with_task) > len(whole):
                    charts += _scatter(protocol, with_task, (task,), task)
    return charts


def _groups(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The groups of tasks, after all tasks of VTAB-1k as one."""
    found = groups(rows)
    return ({FLAT: SUITES["vtab_all"]} if found.keys() & {"vtab_natural", "vtab_specialized"} else {}) | found


def _scatter(protocol: Protocol, rows: Sequence[Row], tasks: Sequence[str], of: str) -> list[Chart]:
    lines = tuple(Line(protocol.name(row), (_point(row, tasks),)) for row in rows)
    least = min(line.points[0].x for line in lines)
    chart = Chart(
        name=file_name("accuracy by parameters", of, protocol.words),
        title=protocol.titled(f"Accuracy by tuned parameters, {of}"),
        x_label="tuned parameters, without the head",
        y_label="test accuracy (%)",
        caption="Mean over seeds"
        + (", bars: sample standard deviation" if any(line.points[0].spread for line in lines) else "")
        + ". Filled and joined: no other is as good with as few tuned parameters.",
        lines=lines,
        x_scale="log" if least > 0 else "symlog",
        front=True,
    )
    return [chart]


def _point(row: Row, tasks: Sequence[str]) -> Point:
    """A row's mean over tasks; the spread over seeds is that of a single task."""
    cells = [row.cells[task] for task in tasks]
    spread = 100 * cells[0].std if len(cells) == 1 and len(cells[0].scores) > 1 else None
    parameters = [fmean(r.result.tuned["parameters"] for r in row.runs if r.task == task) for task in tasks]
    return Point(fmean(parameters), 100 * fmean(found.mean for found in cells), spread)


def training(rows: Sequence[Row], grids: Sequence[Grid]) -> list[Chart]:
    """Loss and accuracy over the epochs, as far as the runs' folders still hold their metrics.

    Args:
        rows: Their runs of `split=final` are drawn, averaged over seeds.
        grids: The runs that validation chose are drawn with their accuracy on the validation images.

    Returns:
        Up to three charts for each task, in the order of the catalog.
    """
    charts = []
    for task in sorted({task for row in rows for task in row.cells} | {grid.task for grid in grids}, key=task_place):
        final = {row.label: [run for run in row.runs if run.task == task] for row in rows if task in row.cells}
        chosen = {grid.label: [grid.chosen] for grid in grids if grid.task == task and grid.chosen and not grid.pruning}
        averaged = "Final runs, mean over seeds."
        charts += _curves(f"Training loss, {task}", final, "train/loss", "training loss", averaged)
        charts += _curves(f"Training accuracy, {task}", final, "train/acc", "training accuracy (%)", averaged)
        of_one = "For each grid the run that validation chose; the accuracy after the last epoch is what it chose by."
        title = f"Validation accuracy while training, {task}"
        charts += _curves(title, chosen, "val/acc", "validation accuracy (%)", of_one)
    return charts


def _curves(title: str, groups: Mapping[str, Sequence[Run]], metric: str, y_label: str, caption: str) -> list[Chart]:
    """A chart of one metric, or several where the lines are many; none where no run recorded it."""
    is_loss = metric.endswith("loss")
    scale = 1 if is_loss else 100
    lines, partial = [], []
    for label, runs in groups.items():
        kept = [curve for run in runs if (curve := history(run, metric))]
        points = tuple(Point(epoch, scale * value) for epoch, value in _mean(kept).items())
        if len(points) >= _LEAST:
            lines.append(Line(label, points))
            partial += [f"{label} {len(kept)} of {len(runs)}"] if len(kept) < len(runs) else []
    if not lines:
        return []
    told = f" Of some runs no such metrics are left, and these are in no mean; there are: {', '.join(partial)}."
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


def _mean(curves: Sequence[_Curve]) -> _Curve:
    """The mean at the epochs that all have; none of no curve."""
    common = sorted(set.intersection(*map(set, curves))) if curves else ()
    return {epoch: fmean(curve[epoch] for curve in curves) for epoch in common}


def history(run: Run, metric: str) -> _Curve:
    """A figure that a run logged after each epoch.

    Args:
        run: The run.
        metric: Its name, "train/loss" for example.

    Returns:
        Finite values by epoch, the first epoch being 1; none where the folder holds no metrics, or not those that the
        result recorded.
    """
    found: dict[int, float] = {}
    for row in _rows(run.folder / "metrics.csv", run.result.files.get("metrics.csv")):
        with suppress(KeyError, TypeError, ValueError):  # a column that is not there, or a cell that is empty
            if isfinite(value := float(row[metric])):
                found[int(row["epoch"]) + 1] = value
    return found


def _rows(path: Path, recorded: str | None) -> Iterable[Mapping[str, str]]:
    """Rows of a CSV whose sha256 is the recorded one; results of older versions recorded none."""
    try:
        data = path.read_bytes()
        if recorded is not None and sha256(data).hexdigest() != recorded:
            return []
        return list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    except (OSError, ValueError, csv.Error):
        return []
