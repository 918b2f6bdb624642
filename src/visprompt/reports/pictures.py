"""Draws what a finished run says of its images: confusion matrix, t-SNE, attention."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from visprompt.reports.figures import MARKERS, WIDTH, Theme, plain

_LONGEST = 22  # characters of a class name that are shown
_SHORT = 11  # characters of a class name, of which four stand beside each other
MOST_NAMED = 24  # classes beside which there is room for a name
_HALF = 0.5  # of the shades: beyond it a number is written in the colour of the page
_MOST_COUNTED = 16  # classes in whose fields there is room for a number
_YELLOW = (240 / 255, 228 / 255, 66 / 255)  # Okabe and Ito's, brighter than a dimmed image in a gray print as well


def draw_confusion(counts: np.ndarray, names: Sequence[str], theme: Theme) -> Figure:
    """Draws a confusion matrix: shades are shares of a true class, figures are numbers of images.

    Args:
        counts: int [C, C], a row for every true class.
        names: Of the classes.
        theme: The page.
    """
    number = len(names)
    figure = Figure(figsize=(WIDTH, WIDTH * 0.9), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shades = LinearSegmentedColormap.from_list("shades", theme.shades)
    image = axes.imshow(100 * shares, cmap=shades, vmin=0, vmax=100, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("share of the true class (%)")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.grid(visible=False)
    if number <= MOST_NAMED:
        size = 8 if number <= _MOST_COUNTED else 6.5
        shown = [plain(name, _LONGEST) for name in names]
        axes.set_xticks(range(number), shown, rotation=90, fontsize=size)
        axes.set_yticks(range(number), shown, fontsize=size)
    for row, column in zip(*np.nonzero(counts), strict=True) if number <= _MOST_COUNTED else ():
        ink = theme.paper if shares[row, column] > _HALF else theme.ink
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=ink, fontsize=7)
    return figure


def draw_map(places: np.ndarray, labels: np.ndarray, names: Sequence[str], theme: Theme) -> Figure:
    """Draws images as points in the plane, a colour and a shape for each class; many classes share some.

    Args:
        places: float [N, 2].
        labels: int [N].
        names: Of the classes; there is a legend where they are few.
        theme: The page.
    """
    named = len(names) <= MOST_NAMED
    columns = 4 if max(map(len, names)) <= _SHORT else 2
    rows = ceil(len(names) / columns) if named else 0
    figure = Figure(figsize=(WIDTH, WIDTH * 0.85 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        x, y = places[labels == place].T
        colour = theme.colours[place % len(theme.colours)]
        marker = MARKERS[place % len(MARKERS)]
        axes.scatter(
            x, y, s=15, c=colour, marker=marker, edgecolors=theme.ink, linewidths=0.25, label=plain(name, _LONGEST)
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    axes.set_axis_off()
    if named:
        figure.legend(loc="outside lower center", ncols=columns, handletextpad=0.3, columnspacing=1, markerscale=1.4)
    return figure


def draw_attention(
    images: np.ndarray, patches: np.ndarray, bars: Sequence[tuple[str, np.ndarray]], titles: Sequence[str], theme: Theme
) -> Figure:
    """Draws images, the attention to their patches over them, and that to other tokens as bars.

    Args:
        images: float [N, H, W, 3], 0..1.
        patches: float [N, h, w], weights.
        bars: Names of other tokens and their weights, float [N, number].
        titles: Of the images.
        theme: The page.
    """
    figure = Figure(figsize=(WIDTH, 1.75 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 3, squeeze=False, width_ratios=(1, 1, 1.9))
    top = max((float(values.max()) for _, values in bars if values.size), default=1.0)
    for row, (left, middle, right) in enumerate(grid):
        left.imshow(images[row], interpolation="nearest")
        middle.imshow(_lit(images[row], patches[row]), interpolation="nearest")
        left.set_title("\n".join(map(plain, titles[row].split("\n"))), fontsize=8)
        middle.set_title(f"patches {100 * patches[row].sum():.0f} %", fontsize=8)
        left.set_axis_off()
        middle.set_axis_off()
        _draw_bars(right, [(name, values[row]) for name, values in bars if values.size], top, theme)
    return figure


def _lit(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A dimmed gray image, yellow where the attention lies; the most attended patch is all yellow.

    Args:
        image: float [H, W, 3], 0..1.
        weights: float [h, w].
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * weights.shape[0] // height
    columns = np.arange(width) * weights.shape[1] // width
    light = (weights / max(float(weights.max()), 1e-12))[rows][:, columns, None]
    dimmed = 0.5 * image.mean(-1, keepdims=True)
    return np.asarray(dimmed * (1 - 0.9 * light) + 0.9 * light * np.array(_YELLOW))


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, np.ndarray]], top: float, theme: Theme) -> None:
    """Bars of several kinds of tokens beside each other, each kind with its name and sum below it."""
    start = 0.0
    middles, names = [], []
    for place, (name, values) in enumerate(bars):
        x = start + np.arange(len(values))
        colour = theme.colours[place % len(theme.colours)]
        axes.bar(x, 100 * values, width=0.8, color=colour, edgecolor=theme.ink, linewidth=0.3)
        middles.append(float(x.mean()))
        names.append(f"{name}\n{100 * values.sum():.0f} %")
        start += len(values) + max(1.0, 0.06 * sum(len(found) for _, found in bars))
    axes.set_ylim(0, 105 * top)
    axes.set_xticks(middles, names, fontsize=7.5)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("weight (%)", fontsize=8)
