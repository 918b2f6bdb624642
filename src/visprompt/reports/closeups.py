"""Close-ups of some runs: learning curve, scoring, t-SNE, attention and latency; most need the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visprompt.errors import UserError
from visprompt.models.kind import KINDS, SINGLE_LABEL
from visprompt.reports import curves, inspection
from visprompt.reports.charts import file_name
from visprompt.reports.figures import MARKERS, WIDTH, Plot, Theme, plain
from visprompt.reports.inspection import Latency, Opened
from visprompt.reports.load import LeftOut
from visprompt.reports.rows import Row, protocols
from visprompt.reports.score_figures import MOST_NAMED, show_scores
from visprompt.reports.writers import Entry, Table, decimal
from visprompt.text import visible

_IMAGES = 4  # images whose attention is drawn
_LONGEST = 22  # characters of a class name that are shown
_SHORT = 11  # characters of a class name, of which four fit next to each other
# Okabe and Ito's, brighter than a dimmed image in a gray print as well
_YELLOW = (240 / 255, 228 / 255, 66 / 255)


@dataclass(frozen=True, eq=False)
class Closeups:
    """Figures and tables of some runs.

    Attributes:
        plots: Figures, grouped by run.
        tables: Tables of classes by the names of their files.
        latency: Latency and throughput; None if no run could be measured.
        left_out: What could not be shown, and why.
    """

    plots: tuple[Plot, ...]
    tables: Mapping[str, Table]
    latency: Table | None
    left_out: tuple[LeftOut, ...]


def typical(rows: Sequence[Row]) -> list[Path]:
    """Return a run of each row of one protocol on one task: those for which there are most such runs."""
    shared = [
        dict.fromkeys(
            row.runs["folder"][row.runs["task"] == task].iat[0] for row in protocol.rows if task in row.cells
        )
        for protocol in protocols(rows)
        for task in dict.fromkeys(task for row in protocol.rows for task in row.cells)
    ]
    longest = max(shared, key=len, default={})
    return list(longest)


def look(
    folders: Sequence[Path],
    names: Mapping[Path, str],
    device: str,
    *,
    data_dir: str | None,
    weights: str | None,
) -> Closeups:
    """Open runs one after another and draw and measure what is possible for each.

    Args:
        folders: Folders of finished runs.
        names: Labels of runs in the rows of tables, by resolved folder; other runs are called by method and
            folder.
        device: See `inspection.open_run`.
        data_dir: See `inspection.open_run`.
        weights: See `inspection.open_run`.
    """
    plots: list[Plot] = []
    tables: dict[str, Table] = {}
    measured: list[tuple[str, Latency]] = []
    left_out: list[LeftOut] = []
    placed: dict[bytes, np.ndarray] = {}  # before tuning, runs on one backbone and task have equal features

    def attempt(what: str, show: Callable[..., list[Any]], opened: Opened, *arguments: Any) -> list[Any]:
        try:
            return show(opened, *arguments)
        except UserError as error:
            left_out.append(LeftOut(opened.folder, f"{what} is not shown: {error}"))
            return []

    for folder in folders:
        try:
            opened = inspection.open_run(folder, device, data_dir=data_dir, weights=weights)
        except UserError as error:
            left_out.append(LeftOut(folder, f"not seen closely: {error}"))
            continue
        name = names.get(folder.resolve(), f"{opened.result.method['name']} {folder.name}")
        name = f"{name}, {opened.result.task}, seed {opened.result.seed}"
        plots += curves.plots(opened.folder, opened.result, name)
        for shown in attempt("scoring", show_scores, opened, name):
            if isinstance(shown, Table):
                tables[f"scoring_{len(tables) + 1}"] = shown
            else:
                plots.append(shown)
        plots += attempt("t-SNE", _maps, opened, name, placed)
        plots += attempt("attention", _attention, opened, name)
        measured += [(name, found) for found in attempt("latency", inspection.latency, opened)]
        del opened  # its classifier, before the next one is built
    return Closeups(tuple(plots), tables, _latency_table(measured) if measured else None, tuple(left_out))


def _maps(opened: Opened, name: str, placed: dict[bytes, np.ndarray]) -> list[Plot]:
    kind = KINDS[opened.result.kind]
    if kind is not SINGLE_LABEL:
        have = "each pixel has one" if kind.dense else "an image may have several"
        raise UserError(f"it needs one class for each image, and here {have}")
    found = inspection.features(opened)
    key = found.before.tobytes()
    if key not in placed:
        placed[key] = inspection.embed(found.before)
    names, set_name = opened.datamodule.class_names, opened.set_name
    about = f"{len(found.labels)} images of {set_name}; distances between groups mean little in t-SNE."
    few = len(names) <= MOST_NAMED
    looks = f"The {len(names)} classes " + (
        "differ in colour and shape."
        if few
        else "are too many for a legend, and some of them share colour or shape."
    )
    plots = []
    for when, places in (("before", placed[key]), ("after", inspection.embed(found.after))):
        title = f"t-SNE {when} tuning, {name}"
        of = "the frozen backbone" if when == "before" else "the tuned classifier, which its head reads"
        caption = f"Features of {of}: {about}" + ("" if few else f" {looks}")
        alt = f"Points in the plane for {about} {looks}"
        plots.append(
            Plot(file_name(title), title, caption, alt, partial(draw_map, places, found.labels, names))
        )
    return plots


def _attention(opened: Opened, name: str) -> list[Plot]:
    if KINDS[opened.result.kind].dense:
        raise UserError(
            "it is drawn for the tokens that an image's class is read from, and here each pixel has one"
        )
    rows = np.linspace(0, len(opened.dataset) - 1, _IMAGES).round().astype(int)
    found = inspection.attention(opened, sorted(set(rows.tolist())))
    names = [visible(label) for label in opened.datamodule.class_names]
    tokens = {"class": found.prefix, "prompts": found.prompts, "keys, values": found.keys_values}
    bars = [(kind, weights.mean(1)) for kind, weights in tokens.items() if weights.size]
    named = partial(opened.classifier.kind.label_name, class_names=names)
    trues, takens = (
        [named(label) or "no class" for label in side.tolist()] for side in (found.labels, found.predicted)
    )
    pairs = list(zip(trues, takens, strict=True))
    titles = [true + ("" if true == taken else f",\ntaken for {taken}") for true, taken in pairs]
    patches = found.patches.mean(1)
    shares = [("patches", patches.reshape(len(pairs), -1)), *bars]
    said = "; ".join(
        f"{title.replace(chr(10), ' ')}: "
        + ", ".join(f"{kind} {100 * w[i].sum():.0f} %" for kind, w in shares)
        for i, title in enumerate(titles)
    )
    title = f"Attention in the last block, {name}"
    caption = (
        f"Weights of {found.asking} in block {found.block + 1}, mean over {found.patches.shape[1]} heads: "
        "the image, its patches, the yellower the more weight lies there, and the weights of the other "
        "tokens."
    )
    alt = f"Attention of {found.asking} to {len(pairs)} images. {said}."
    draw = partial(draw_attention, found.images, patches, bars, titles)
    return [Plot(file_name(title), title, caption, alt, draw)]


def _latency_table(measured: Sequence[tuple[str, Latency]]) -> Table:
    rows: list[tuple[Entry, ...]] = [
        (
            name,
            decimal(found.batch_size, 0),
            decimal(1000 * found.seconds, 3),
            f"{1000 * found.low:.3f} to {1000 * found.high:.3f}",
            decimal(1 / found.seconds, 0),
            f"{found.device} ({found.threads} thread{'s' * (found.threads > 1)})"
            if found.device == "cpu"
            else found.device,
            found.precision,
        )
        for name, found in measured
    ]
    header = (
        "run",
        "images at a time",
        "ms per image",
        "quartiles",
        "images per second",
        "measured on",
        "precision",
    )
    note = "Logits of images that are on the device already, not compiled; the median of the repetitions."
    return Table("Latency and throughput", header, tuple(rows), (note,))


# the pictures


def draw_map(places: np.ndarray, labels: np.ndarray, names: Sequence[str], theme: Theme) -> Figure:
    """Draw images as points in the plane, with a colour and marker by class; many classes share some.

    Args:
        places: float [N, 2].
        labels: int [N].
        names: Names of the classes; there is a legend if there are few.
        theme: Colours of the page.
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
            x,
            y,
            s=15,
            c=colour,
            marker=marker,
            edgecolors=theme.ink,
            linewidths=0.25,
            label=plain(name, _LONGEST),
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    axes.set_axis_off()
    if named:
        figure.legend(
            loc="outside lower center", ncols=columns, handletextpad=0.3, columnspacing=1, markerscale=1.4
        )
    return figure


def draw_attention(
    images: np.ndarray,
    patches: np.ndarray,
    bars: Sequence[tuple[str, np.ndarray]],
    titles: Sequence[str],
    theme: Theme,
) -> Figure:
    """Draw images, the attention to their patches as an overlay, and that to other tokens as bars.

    Args:
        images: float [N, H, W, 3], 0..1.
        patches: float [N, h, w], weights.
        bars: Names of other kinds of tokens and their weights, float [N, number].
        titles: Titles of the images.
        theme: Colours of the page.
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
    """Return the image in dimmed grey, the yellower the more attention a patch gets.

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
    """Draw bars of several kinds of tokens, each kind with its name and sum below it."""
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
