"""A chart as numbers: lines of points, what its axes are, and the same in words for those who cannot see it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from visprompt.reports.render import Number, Table

MOST_LINES = 8  # more in one chart cannot be told apart
_TOLD = 12  # points of a line that the words for it name; of a longer one its ends


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Attributes:
        x: Where it stands.
        y: Its height.
        spread: Sample standard deviation of `y` over seeds; None of a single seed.
    """

    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        label: What the legend says of it.
        points: In the order of `x`.
    """

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one axis.

    Attributes:
        name: Of its files, without an ending.
        title: What it shows.
        x_label: What the horizontal axis is, with its unit.
        y_label: What the vertical axis is, with its unit.
        caption: What is to be known of it, in whole sentences.
        lines: What is drawn.
        x_scale: "linear", "log", or "symlog": logarithmic with a place for 0.
        y_scale: "linear" or "log".
        front: Whether the lines are single points, of which those are marked that no other point beats: none is higher
            with as small an `x`.
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
        """The chart in words, with its numbers as far as they can be listened to."""
        said = "; ".join(_told(line) for line in self.lines)
        best = f" On the front: {', '.join(line.label for line in front(self.lines))}." if self.front else ""
        return f"{self.y_label} against {self.x_label}. {said}.{best}"

    @property
    def values(self) -> Table:
        """Its numbers."""
        rows = tuple(
            (line.label, Number(p.x, f"{p.x:g}"), Number(p.y, f"{p.y:g}", p.spread, f"{p.spread or 0:g}"))
            for line in self.lines
            for p in line.points
        )
        return Table(self.title, ("line", self.x_label, self.y_label), rows)


def front(lines: Iterable[Line]) -> list[Line]:
    """The Pareto front: of lines of a single point those that no other beats, from the smallest `x` on."""
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
    """A chart of many lines as several with as few in each as can be told apart, about as many in each."""
    if len(chart.lines) <= MOST_LINES:
        return [chart]
    size = ceil(len(chart.lines) / ceil(len(chart.lines) / MOST_LINES))
    parts = [chart.lines[i : i + size] for i in range(0, len(chart.lines), size)]
    return [
        replace(chart, name=f"{chart.name}_{i}", title=f"{chart.title} ({i} of {len(parts)})", lines=lines)
        for i, lines in enumerate(parts, 1)
    ]


def file_name(*words: str) -> str:
    """Words as the name of a file, without an ending; cut where a file system would refuse it."""
    return re.sub(r"[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")[:150]


def spread_scale(values: Sequence[float]) -> str:
    """The scale on which positive values are told apart: "log" where they span more than one power of ten."""
    return "log" if min(values) > 0 and max(values) > 10 * min(values) else "linear"
