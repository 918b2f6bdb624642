"""Figures and tables of a run's scoring: classes, confusion, calibration and the most confident mistakes."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from visprompt.models.kind import MULTI_LABEL, SEGMENTATION
from visprompt.models.scores import ClassScore
from visprompt.reports.charts import file_name
from visprompt.reports.decided import Decided, decided
from visprompt.reports.figures import WIDTH, Plot, Theme, plain
from visprompt.reports.inspection import Opened, pictures
from visprompt.reports.scored import Counted, Reliability, Scored, counted, reliability, scored
from visprompt.reports.writers import Entry, Missing, Table, decimal

_MISTAKES = 12  # pictures of the most confident mistakes
_COLUMNS = 4
_TOLD = 3  # pairs of classes that the caption of a confusion matrix names
_LONGEST = 22  # characters of a class name that are shown
_SHORT = 17  # characters of a class name above a small picture
MOST_NAMED = 24  # classes, at most, for whose names there is room
_MOST_COUNTED = 16  # classes, at most, for whose numbers there is room in the fields
_MOST_LISTED = 20  # classes and pairs of classes in a table


def show_scores(opened: Opened, name: str) -> list[Plot | Table]:
    """Return the figures and tables of a run's scoring.

    Args:
        opened: The run.
        name: The run in words, for titles.

    Raises:
        UserError: See `scored`.
    """
    if opened.result.kind == MULTI_LABEL.name:
        return _show_decisions(opened, name)
    if opened.result.kind == SEGMENTATION.name:
        return _show_classes(counted(opened), name)
    found = scored(opened)
    shown = [*_show_classes(found, name), _reliability(found, name)]
    if len(rows := found.mistakes(_MISTAKES)):
        names = found.class_names
        pairs = [
            (names[found.labels[i]], names[found.predicted[i]], float(found.confidences[i])) for i in rows
        ]
        wrong = int((found.predicted != found.labels).sum())
        shown.append(_mistakes(found, pairs, wrong, pictures(opened, rows.tolist()), name))
    return shown


def _show_classes(found: Scored | Counted, name: str) -> list[Plot | Table]:
    """Return the classes and what they are confused with."""
    few = len(found.class_names) <= MOST_NAMED
    return [_classes(found, name), _confusion(found, name) if few else _pairs(found, name)]


def _show_decisions(opened: Opened, name: str) -> list[Plot | Table]:
    """Return the classes and the most confident mistakes of a run whose images may have several classes."""
    found = decided(opened)
    shown: list[Plot | Table] = [_classes(found, name)]
    if mistakes := found.mistakes(_MISTAKES):
        pairs = [
            (found.said(column, bool(found.labels[row, column])), found.said(column, chosen), confidence)
            for row, column, chosen, confidence in mistakes
        ]
        images = np.concatenate([pictures(opened, [row]) for row, *_ in mistakes])
        shown.append(_mistakes(found, pairs, found.wrong, images, name))
    return shown


def _classes(found: Scored | Decided | Counted, name: str) -> Table:
    """Return the classes with the lowest F1, or all if they are few."""
    scores = found.kind.class_scores(torch.from_numpy(found.counts))
    known = [
        (label, score) for label, score in zip(found.class_names, scores, strict=True) if score.f1 is not None
    ]
    worst = sorted(known, key=lambda pair: pair[1].f1 or 0.0)
    lines = tuple(_class_line(label, score) for label, score in worst[:_MOST_LISTED])
    unit = found.kind.unit
    notes = [f"Of the {unit} of {found.set_name}; the lowest F1 first."]
    if found.kind.dense:
        notes.append("Probabilities of pixels are not calibrated, and no mistakes are shown as pictures.")
    if len(worst) > len(lines):
        notes.append(
            f"The {len(lines)} lowest of {len(worst)} classes; classes.csv in the run's folder, if it wrote "
            "one, has all."
        )
    header = ("class", unit, "precision (%)", "recall (%)", "F1 (%)")
    return Table(f"Classes, {name}", header, lines, tuple(notes))


def _class_line(label: str, score: ClassScore) -> tuple[Entry, ...]:
    figures = (score.precision, score.recall, score.f1)
    missing = ("never predicted", "no images", "")
    shares = (
        Missing(why) if figure is None else decimal(100 * figure)
        for figure, why in zip(figures, missing, strict=True)
    )
    return (label, decimal(score.count, 0), *shares)


def _pairs(found: Scored | Counted, name: str) -> Table:
    """Return the pairs of classes that are confused most often."""
    pairs = found.kind.confused(torch.from_numpy(found.counts), _MOST_LISTED)
    names, totals = found.class_names, found.counts.sum(1)
    lines = tuple(
        (names[true], names[taken], decimal(count, 0), decimal(100 * count / totals[true]))
        for true, taken, count in pairs
    )
    header = ("class", "taken for", found.kind.unit, "of the class (%)")
    note = (
        f"Of the {found.kind.unit} of {found.set_name}; confusion.csv in the run's folder, if it wrote one, "
        "has all."
    )
    return Table(f"The most common mistakes, {name}", header, lines, (note,))


def _confusion(found: Scored | Counted, name: str) -> Plot:
    counts, names, unit = found.counts, found.class_names, found.kind.unit
    said = [
        f"{names[true]} taken for {names[taken]} ({count})"
        for true, taken, count in found.kind.confused(torch.from_numpy(counts), _TOLD)
    ]
    often = (
        f" Most often: {', '.join(said)}." if said else f" No {unit[:-1]} is taken for one of another class."
    )
    right, total = int(counts.trace()), int(counts.sum())
    title = f"Confusion matrix, {name}"
    fields = "Shares of the true class in per cent" if found.kind.dense else "Numbers"
    caption = (
        f"{fields}, of {unit} of {found.set_name}; a row for each true class, empty fields are 0.{often}"
    )
    alt = f"Confusion matrix of {len(names)} classes: {right} of {total} {unit} are right.{often}"
    header = ("true class", *(f"as {label}" for label in names))
    lines: tuple[tuple[Entry, ...], ...] = tuple(
        (label, *(decimal(int(count), 0) for count in row)) for label, row in zip(names, counts, strict=True)
    )
    draw = partial(draw_confusion, counts, names, in_shares=found.kind.dense)
    return Plot(file_name(title), title, caption, alt, draw, Table(title, header, lines))


def _reliability(found: Scored, name: str) -> Plot:
    right = found.predicted == found.labels
    series = [("logits as they are", reliability(found.plain, right))]
    if found.temperature != 1:
        series.append((f"temperature {found.temperature:.2f}", reliability(found.confidences, right)))
    errors = [f"{label} {100 * one.error:.1f} %" for label, one in series]
    title = f"Reliability, {name}"
    fitted = (
        " The temperature was fitted on these images: on others the error may be larger."
        if found.temperature != 1 and found.set_name != "test"
        else ""
    )
    caption = (
        f"Accuracy by the probability of the predicted class, on {len(right):,} images of {found.set_name}; "
        "below, the shares of the images. Under the diagonal, probabilities are too high. "
        f"Expected calibration error: {', '.join(errors)}.{fitted}"
    )
    alt = f"Accuracy by confidence in up to 15 bins. Expected calibration error: {', '.join(errors)}."
    values = tuple(
        (label, decimal(100 * confidence, 2), decimal(100 * accuracy, 2), decimal(int(count), 0))
        for label, one in series
        for confidence, accuracy, count in zip(one.confidence, one.accuracy, one.count, strict=True)
    )
    table = Table(title, ("probabilities", "mean (%)", "accuracy (%)", "images"), values)
    return Plot(file_name(title), title, caption, alt, partial(draw_reliability, series), table)


def _mistakes(
    found: Scored | Decided,
    pairs: Sequence[tuple[str, str, float]],
    wrong: int,
    images: np.ndarray,
    name: str,
) -> Plot:
    title = f"The most confident mistakes, {name}"
    of = "all" if wrong == len(pairs) else f"{len(pairs)} of {wrong}"
    caption = (
        f"Images of {found.set_name} with the true class, the predicted class and its probability: {of} "
        "mistakes, the most confident first. Some may be wrongly labelled in the data."
    )
    said = "; ".join(f"{true} taken for {taken}, {100 * share:.0f} %" for true, taken, share in pairs)
    draw, alt = partial(draw_mistakes, images, pairs), f"{len(pairs)} images. {said}."
    header = ("true class", "predicted class", "probability (%)")
    lines = tuple((true, taken, decimal(100 * share)) for true, taken, share in pairs)
    return Plot(file_name(title), title, caption, alt, draw, Table(title, header, lines))


# the pictures


def draw_confusion(counts: np.ndarray, names: Sequence[str], theme: Theme, in_shares: bool = False) -> Figure:
    """Draw a confusion matrix: shades are shares of the true class, numbers are counts.

    Args:
        counts: int [C, C], a row for every true class.
        names: Names of the classes, at most `MOST_NAMED`.
        theme: Colours of the page.
        in_shares: Whether the numbers are shares too, in per cent: counts of pixels would be too long.
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
    size = 8 if number <= _MOST_COUNTED else 6.5
    shown = [plain(name, _LONGEST) for name in names]
    axes.set_xticks(range(number), shown, rotation=90, fontsize=size)
    axes.set_yticks(range(number), shown, fontsize=size)
    for row, column in zip(*np.nonzero(counts), strict=True) if number <= _MOST_COUNTED else ():
        ink = theme.paper if shares[row, column] > 0.5 else theme.ink  # a dark shade
        said = f"{100 * shares[row, column]:.0f}" if in_shares else f"{counts[row, column]}"
        axes.text(column, row, said, ha="center", va="center", color=ink, fontsize=7)
    return figure


def draw_reliability(series: Sequence[tuple[str, Reliability]], theme: Theme) -> Figure:
    """Draw accuracy by confidence, and below it how many images have which confidence.

    Args:
        series: Names and values of one or two kinds of probabilities.
        theme: Colours of the page.
    """
    figure = Figure(figsize=(WIDTH, WIDTH * 0.95), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    upper.plot((0, 100), (0, 100), color=theme.ink, linewidth=0.8, linestyle=(0, (2, 3)))
    for place, (label, found) in enumerate(series):
        colour, marker, dash = theme.colours[place], "os"[place], ("-", (0, (5, 2)))[place]
        name = f"{label}: error {100 * found.error:.1f} %"
        x, y, total = 100 * found.confidence, 100 * found.accuracy, found.count.sum()
        upper.plot(x, y, color=colour, marker=marker, label=name, linestyle=dash)
        lower.plot(
            x, 100 * found.count / total, color=colour, marker=marker, linestyle=("-", (0, (5, 2)))[place]
        )
    upper.set_ylabel("accuracy (%)")
    upper.set_ylim(-2, 102)
    upper.set_xlim(-2, 102)
    upper.legend(loc="upper left")
    lower.set_ylim(bottom=0)
    lower.set_ylabel("images (%)")
    lower.set_xlabel("probability of the predicted class (%)")
    return figure


def draw_mistakes(images: np.ndarray, pairs: Sequence[tuple[str, str, float]], theme: Theme) -> Figure:
    """Draw wrongly labelled images.

    Args:
        images: float [N, H, W, 3], 0..1.
        pairs: True class, predicted class and its probability, of each image.
        theme: Colours of the page.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(WIDTH * columns / _COLUMNS + 0.2, 1.78 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, (true, taken, share) in zip(figure.axes, images, pairs, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(
            f"{plain(true, _SHORT)}\n\u2192 {plain(taken, _SHORT)}\n{100 * share:.1f} %", fontsize=7.5
        )
    return figure
