"""Draws charts with matplotlib, for light and for dark pages; the same numbers give the same bytes.

Colours are those of Okabe and Ito, which colour-blind readers can distinguish. Lines also differ in marker
and dash, so that a print in black and white can be read; if a chart has so many lines that these repeat, the
lines are numbered. matplotlib's global state is not changed.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from visprompt.reports.charts import Chart, Line, Point, front
from visprompt.reports.writers import Table
from visprompt.text import visible

WIDTH = 5.0  # inches
_HEIGHT = 3.1
_LEGEND_ROW = 0.2
_HALF_A_LINE = 34  # characters of a label, at most, in a legend of two columns
_MOST_LABELLED, _LONGEST = 14, 24  # points, at most, that are labelled directly, and characters of a label
_MOST_TICKS = 8  # values, at most, that each get a tick
MARKERS = "osD^vPX<>phd*"
_OTHER_SCRIPTS = (
    *(
        "Noto Sans CJK JP",
        "Noto Sans CJK SC",
        "WenQuanYi Zen Hei",
        "Droid Sans Fallback",
        "Hiragino Sans",
        "PingFang SC",
    ),
    *(
        "Yu Gothic",
        "Microsoft YaHei",
        "Malgun Gothic",
        "Apple SD Gothic Neo",
        "Noto Sans",
        "Noto Emoji",
        "Symbola",
    ),
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "visprompt",  # names of elements, random otherwise
    "svg.fonttype": "path",  # looks the same on a machine without the font
}


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Attributes:
        name: "light" or "dark".
        ink: Colour of text and axes.
        faint: Colour of the grid.
        paper: Colour of the page; the background of a figure is transparent.
        colours: Colours of lines: Okabe and Ito's without their yellow, which is hard to see on white.
        shades: Colours of a colour map from 0 to 1, which differ in lightness also in black and white.
    """

    name: str
    ink: str
    faint: str
    paper: str
    colours: tuple[str, ...]
    shades: tuple[str, ...]


_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LIGHT = Theme(
    "light",
    "#1b1f24",
    "#dde1e6",
    "#ffffff",
    (*_OKABE_ITO, "#000000"),
    ("#ffffff", "#6cb2d9", "#0072B2", "#00263b"),
)
DARK = Theme(
    "dark",
    "#e4e7eb",
    "#363c44",
    "#15181c",
    (*_OKABE_ITO, "#FFFFFF"),
    ("#15181c", "#0072B2", "#6cb2d9", "#f2f9fd"),
)


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure of the report.

    Attributes:
        name: Name of its files, without an extension.
        title: What it shows.
        caption: What to know about it, in whole sentences.
        alt: Alternative text for those who cannot see it, with numbers.
        draw: Draws it in the colours of a theme.
        values: Its numbers as a table; None if they are too many.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Theme], Figure]
    values: Table | None = None


def plots(charts: Sequence[Chart]) -> list[Plot]:
    """Return charts as figures; lines with the same label look the same in all of them."""
    places: dict[str, int] = {}
    for label in (line.label for chart in charts for line in chart.lines):
        places.setdefault(label, len(places))
    return [
        Plot(chart.name, chart.title, chart.caption, chart.alt, partial(draw, chart, places), chart.values)
        for chart in charts
    ]


def svg(plot: Plot, theme: Theme) -> str:
    """Return a figure as SVG, with a transparent background and text as paths."""
    return _saved(plot, theme, "svg", transparent=True).decode()


def png(plot: Plot) -> bytes:
    """Return a figure as PNG on white, at 200 dpi."""
    return _saved(plot, LIGHT, "png", dpi=200, facecolor=LIGHT.paper)


def plain(text: str, most: int = 60) -> str:
    """Return text for matplotlib: without math mode, shown in legends despite a leading "_", not too long."""
    text = visible(text)
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return ("\u200b" if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _saved(plot: Plot, theme: Theme, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with _styled(theme):
        metadata = {"Title": visible(plot.title)} | ({"Date": None, "Creator": None} if form == "svg" else {})
        plot.draw(theme).savefig(out, format=form, metadata=metadata, **options)
    return out.getvalue()


@cache
def _fonts() -> list[str]:
    """Return the font that comes with matplotlib, then those for other scripts that are on this machine."""
    return ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in font_manager.get_font_names())]


@contextmanager
def _styled(theme: Theme) -> Iterator[None]:
    """Set matplotlib's defaults and this file's style, whatever the user's matplotlibrc says."""
    named = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "axes.titlecolor",
    )
    colours: dict[str, Any] = dict.fromkeys(named, theme.ink) | {
        "grid.color": theme.faint,
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, value in (_STYLE | colours | {"font.family": _fonts()}).items():
            matplotlib.rcParams[name] = value  # type: ignore[index]  # names are text
        with warnings.catch_warnings():
            # it is drawn as a box; the name is in the text next to the figure
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
            yield


def draw(chart: Chart, places: Mapping[str, int], theme: Theme) -> Figure:
    """Draw a chart.

    Args:
        chart: The chart.
        places: A number for every label, which decides colour, marker and dash.
        theme: Colours of the page.
    """
    longest = max(len(line.label) for line in chart.lines)
    columns = 1 if longest > _HALF_A_LINE else 2
    rows = ceil(len(chart.lines) / columns)
    direct = chart.front and len(chart.lines) <= _MOST_LABELLED and longest <= _LONGEST
    figure = Figure(figsize=(WIDTH, _HEIGHT + (0 if direct else _LEGEND_ROW * rows)), layout="constrained")
    axes = figure.add_subplot()
    best = front(chart.lines) if chart.front else []
    if best:
        x, y = zip(*((line.points[0].x, line.points[0].y) for line in best), strict=True)
        axes.step(x, y, where="post", color=theme.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
    looks = [
        _draw_line(axes, line, places[line.label], theme, hollow=chart.front and line not in best)
        for line in chart.lines
    ]
    names = [plain(line.label) for line in chart.lines]
    numbers = (
        [str(i) for i in range(1, len(names) + 1)] if not direct and len(set(looks)) < len(looks) else []
    )
    axes.margins(*((0.1, 0.13) if direct else (0.04, 0.06)))
    _scale(axes, chart)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if direct or numbers:
        _label_points(figure, axes, chart.lines, numbers or names, best)
    if not direct:
        for i, number in enumerate(numbers):
            axes.containers[i].set_label(f"{number}  {names[i]}")
        figure.legend(
            loc="outside lower center", ncols=columns, handlelength=3.2, columnspacing=1.5, labelspacing=0.35
        )
    return figure


def _draw_line(axes: Axes, line: Line, place: int, theme: Theme, hollow: bool) -> tuple[str, Any, bool]:
    """Draw a line; return what distinguishes it without colour: marker, dash, whether it is hollow."""
    colour = theme.colours[place % len(theme.colours)]
    marker = MARKERS[place % len(MARKERS)]
    dash = _DASHES[(place + place // len(theme.colours)) % len(_DASHES)] if len(line.points) > 1 else ""
    spreads = [point.spread or 0.0 for point in line.points]
    axes.errorbar(
        [point.x for point in line.points],
        [point.y for point in line.points],
        yerr=spreads if any(spreads) else None,
        label=plain(line.label),
        color=colour,
        linestyle=dash,
        marker=marker,
        markerfacecolor="none" if hollow else colour,
        markeredgecolor=colour if hollow else theme.ink,
        markeredgewidth=1.2 if hollow else 0.5,
        markersize=5 if len(line.points) > 1 else 7,
        markevery=ceil(len(line.points) / 10),
        elinewidth=0.9,
        capsize=2.5,
    )
    return marker, dash, hollow


def _label_points(
    figure: Figure, axes: Axes, lines: Sequence[Line], texts: Sequence[str], best: Sequence[Line]
) -> None:
    """Label the first point of each line where it overlaps least with points, labels and the front."""
    figure.draw_without_rendering()  # only now it is known where the axes are
    unit, frame = figure.dpi / 72, axes.get_window_extent()
    taken = [_around(axes, line.points[0], 5 * unit) for line in lines]
    for one, other in pairwise(line.points[0] for line in best):
        corner = Point(other.x, one.y)
        taken += [_between(axes, one, corner, 2 * unit), _between(axes, corner, other, 2 * unit)]
    for line, said in sorted(zip(lines, texts, strict=True), key=lambda pair: pair[0].points[0].x):
        point = (line.points[0].x, line.points[0].y)
        x, y = axes.transData.transform(point)
        text = axes.annotate(said, point, (0, 0), textcoords="offset points", fontsize=8.5, in_layout=False)
        width, height = text.get_window_extent().width, text.get_window_extent().height
        across = {"right": x + 6 * unit, "left": x - 6 * unit - width, "middle": x - width / 2}
        along = {"level": y - height / 2, "above": y + 5 * unit, "below": y - 5 * unit - height}
        places = [(a, b) for b in along for a in across if (a, b) != ("middle", "level")]
        boxes = [Bbox.from_bounds(across[a], along[b], width, height) for a, b in places]
        chosen = min(boxes, key=lambda box: round(_covered(box, taken) + _area(box) - _common(box, frame)))
        taken.append(chosen)
        text.set_position(((chosen.x0 - x) / unit, (chosen.y0 - y) / unit))


def _around(axes: Axes, point: Point, reach: float) -> Bbox:
    """Return the bounding box of a point and its error bar, in pixels."""
    spread = point.spread or 0.0
    return _between(axes, Point(point.x, point.y - spread), Point(point.x, point.y + spread), reach)


def _between(axes: Axes, one: Point, other: Point, reach: float) -> Bbox:
    """Return the bounding box of a horizontal or vertical line between two points, in pixels."""
    (x0, y0), (x1, y1) = axes.transData.transform([(one.x, one.y), (other.x, other.y)])
    return Bbox.from_extents(x0 - reach, min(y0, y1) - reach, x1 + reach, max(y0, y1) + reach)


def _covered(box: Bbox, others: Sequence[Bbox]) -> float:
    return sum(_common(box, other) for other in others)


def _common(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else _area(both)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)


def _scale(axes: Axes, chart: Chart) -> None:
    """Set scales and ticks; if there are few values along `x`, each gets a tick."""
    values = sorted({point.x for line in chart.lines for point in line.points})
    axes.set_yscale(chart.y_scale)
    if chart.y_scale == "log":
        heights = [point.y for line in chart.lines for point in line.points]
        if max(heights) < 100 * min(heights):  # powers of ten alone would be one or two
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if chart.x_scale == "symlog":
        _scale_with_zero(axes, values)
        return
    axes.set_xscale(chart.x_scale)
    if not chart.front and len(values) <= _MOST_TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    elif chart.x_scale == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scale_with_zero(axes: Axes, values: Sequence[float]) -> None:
    """Set a scale of powers of ten that also has a 0."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = floor(log10(min(positive))), ceil(log10(max(positive)))
    axes.set_xscale("symlog", linthresh=10.0**low, linscale=0.5)
    powers = range(low, max(high, low + 1) + 1)
    axes.set_xticks(
        [0, *(10.0**power for power in powers)], ["0", *(f"$10^{{{power}}}$" for power in powers)]
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.3 * 10.0**low, 3 * max(*positive, 10.0 ** (low + 1)))
