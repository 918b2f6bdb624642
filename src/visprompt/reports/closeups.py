"""Some runs seen closely, with the model: confusion matrix, t-SNE before and after, attention, latency."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from visprompt.errors import UserError
from visprompt.reports import inspection
from visprompt.reports.charts import file_name
from visprompt.reports.figures import Plot
from visprompt.reports.inspection import Latency, Opened
from visprompt.reports.load import LeftOut
from visprompt.reports.pictures import MOST_NAMED, draw_attention, draw_confusion, draw_map
from visprompt.reports.rows import Row, protocols
from visprompt.reports.writers import Entry, Table, decimal
from visprompt.text import visible

_IMAGES = 4  # whose attention is drawn
_TOLD = 3  # pairs of classes that the words for a confusion matrix name


@dataclass(frozen=True, eq=False)
class Closeups:
    """What was seen of some runs.

    Attributes:
        plots: Figures, those of a run together.
        latency: Latency and throughput; None where no run could be opened.
        left_out: What could not be shown, and why.
    """

    plots: tuple[Plot, ...]
    latency: Table | None
    left_out: tuple[LeftOut, ...]


@dataclass
class _Look:
    """A run that is being looked at, its name, and what was shown of it and of those before it."""

    name: str
    opened: Opened
    plots: list[Plot]
    measured: list[tuple[str, Latency]]
    left_out: list[LeftOut]

    def attempt(self, what: str, show: Callable[[], None]) -> None:
        """Shows one thing; where that cannot be done, the reason stands among what was left out."""
        try:
            show()
        except UserError as error:
            self.left_out.append(LeftOut(self.opened.folder, f"{what} not shown: {error}"))


def typical(rows: Sequence[Row]) -> list[Path]:
    """One run of every row, each once, all on the task and under the protocol where these are most."""
    shared = [
        dict.fromkeys(row.runs["folder"][row.runs["task"] == task].iat[0] for row in protocol.rows if task in row.cells)
        for protocol in protocols(rows)
        for task in dict.fromkeys(task for row in protocol.rows for task in row.cells)
    ]
    longest = max(shared, key=len, default={})
    return list(longest)


def look(
    folders: Sequence[Path], names: Mapping[Path, str], device: str, *, data_dir: str | None, weights: str | None
) -> Closeups:
    """Opens runs one after another and shows what can be shown of each.

    Args:
        folders: Of finished runs.
        names: What to call runs that stand in rows of a table, by their resolved folders; others get those as names.
        device: See `inspect.open_run`, as for the two others.
        data_dir: This machine's folder of data.
        weights: A file of backbone weights.
    """
    plots: list[Plot] = []
    measured: list[tuple[str, Latency]] = []
    left_out: list[LeftOut] = []
    placed: dict[bytes, np.ndarray] = {}  # runs on one backbone and task have the same features before
    for folder in folders:
        try:
            opened = inspection.open_run(folder, device, data_dir=data_dir, weights=weights)
        except UserError as error:
            left_out.append(LeftOut(folder, f"not seen closely: {error}"))
            continue
        name = names.get(folder.resolve(), f"{opened.result.method['name']} {folder.name}")
        _show(
            _Look(f"{name}, {opened.result.task}, seed {opened.result.seed}", opened, plots, measured, left_out), placed
        )
        del opened  # its classifier, before the next one is built
    return Closeups(tuple(plots), _latency_table(measured) if measured else None, tuple(left_out))


def _show(one: _Look, placed: dict[bytes, np.ndarray]) -> None:
    one.attempt("confusion matrix", partial(_confusion, one))
    one.attempt("t-SNE", partial(_maps, one, placed))
    one.attempt("attention", partial(_attention, one))
    one.attempt("latency", partial(_latency, one))


def _confusion(one: _Look) -> None:
    found = inspection.confusion(one.opened)
    wrong = found.counts * (1 - np.eye(len(found.counts), dtype=found.counts.dtype))
    most = np.argsort(-wrong, axis=None, kind="stable")[:_TOLD]
    pairs = [(*np.unravel_index(place, wrong.shape), wrong.flat[place]) for place in most if wrong.flat[place]]
    said = [f"{found.class_names[true]} taken for {found.class_names[taken]} ({count})" for true, taken, count in pairs]
    often = f" Most often: {', '.join(said)}." if said else " No image is taken for one of another class."
    right, total = int(found.counts.trace()), int(found.counts.sum())
    draw = partial(draw_confusion, found.counts, found.class_names)
    title = f"Confusion matrix, {one.name}"
    caption = f"Numbers of images of {found.set_name}, a row for each true class; empty fields are 0.{often}"
    alt = f"Confusion matrix of {len(found.class_names)} classes: {right} of {total} images are right.{often}"
    header = ("true class", *(f"as {name}" for name in found.class_names))
    counts: tuple[tuple[Entry, ...], ...] = tuple(
        (name, *(decimal(int(count), 0) for count in row))
        for name, row in zip(found.class_names, found.counts, strict=True)
    )
    one.plots.append(Plot(file_name(title), title, caption, alt, draw, Table(title, header, counts)))


def _maps(one: _Look, placed: dict[bytes, np.ndarray]) -> None:
    found = inspection.features(one.opened)
    key = found.before.tobytes()
    if key not in placed:
        placed[key] = inspection.embed(found.before)
    names, set_name = one.opened.datamodule.class_names, one.opened.set_name
    about = f"{len(found.labels)} images of {set_name}; distances between groups mean little in t-SNE."
    few = len(names) <= MOST_NAMED
    looks = f"The {len(names)} classes " + (
        "differ in colour and shape." if few else "are too many for a legend, and some of them share colour or shape."
    )
    for when, places in (("before", placed[key]), ("after", inspection.embed(found.after))):
        title = f"t-SNE {when} tuning, {one.name}"
        of = "the frozen backbone" if when == "before" else "the tuned classifier, which its head reads"
        caption = f"Features of {of}: {about}" + ("" if few else f" {looks}")
        alt = f"Points in the plane for {about} {looks}"
        one.plots.append(Plot(file_name(title), title, caption, alt, partial(draw_map, places, found.labels, names)))


def _attention(one: _Look) -> None:
    rows = np.linspace(0, len(one.opened.dataset) - 1, _IMAGES).round().astype(int)
    found = inspection.attention(one.opened, sorted(set(rows.tolist())))
    names = [visible(name) for name in one.opened.datamodule.class_names]
    tokens = {"class": found.prefix, "prompts": found.prompts, "keys, values": found.keys_values}
    bars = [(name, weights.mean(1)) for name, weights in tokens.items() if weights.size]
    pairs = list(zip(found.labels, found.predicted, strict=True))
    titles = [names[true] + ("" if true == taken else f",\ntaken for {names[taken]}") for true, taken in pairs]
    patches = found.patches.mean(1)
    shares = [("patches", patches.reshape(len(pairs), -1)), *bars]
    said = "; ".join(
        f"{title.replace(chr(10), ' ')}: " + ", ".join(f"{name} {100 * w[i].sum():.0f} %" for name, w in shares)
        for i, title in enumerate(titles)
    )
    title = f"Attention in the last block, {one.name}"
    caption = (
        f"Weights of {found.asking} in block {found.block + 1}, mean over {found.patches.shape[1]} heads: the image, "
        "its patches, the yellower the more weight lies there, and the weights of the other tokens."
    )
    alt = f"Attention of {found.asking} to {len(pairs)} images. {said}."
    draw = partial(draw_attention, found.images, patches, bars, titles)
    one.plots.append(Plot(file_name(title), title, caption, alt, draw))


def _latency(one: _Look) -> None:
    one.measured.extend((one.name, found) for found in inspection.latency(one.opened))


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
    header = ("run", "images at a time", "ms per image", "quartiles", "images per second", "measured on", "precision")
    note = "Logits of images that are on the device already, not compiled; the median of the repetitions."
    return Table("Latency and throughput", header, tuple(rows), (note,))
