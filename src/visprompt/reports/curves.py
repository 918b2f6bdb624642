"""The learning curve of one run: loss and score after each epoch, on training and validation images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visprompt.models.kind import KINDS
from visprompt.reports.charts import file_name
from visprompt.reports.figures import WIDTH, Plot, Theme
from visprompt.reports.load import history
from visprompt.reports.writers import Entry, Table, decimal
from visprompt.runs.result import Result

_LEAST = 2  # epochs; fewer are no curve
_SHAPES = {"train": ("-", "o"), "val": ((0, (5, 2)), "s")}
_WORDS = {"acc": "accuracy"}
Curves = Mapping[str, Mapping[int, float]]


def plots(folder: Path, result: Result, name: str) -> list[Plot]:
    """Return a run's learning curve as a figure; no figure if the run has no metrics.csv or a single epoch.

    Args:
        folder: The run's folder.
        result: The run's result.
        name: The run in words, for the title.
    """
    score = KINDS[result.kind].score
    metrics = [f"{stage}/{what}" for what in ("loss", score) for stage in _SHAPES]
    found = {metric: history(folder, result, metric) for metric in metrics}
    found = {metric: values for metric, values in found.items() if len(values) >= _LEAST}
    if not found:
        return []
    title = f"Learning curve, {name}"
    with_val = any(metric.startswith("val/") for metric in found)
    caption = (
        "Loss and score after each epoch. The training figures are means over the epoch, with dropout and "
        "augmentation where the run has them"
        + ("; those on val are of the state after the epoch." if with_val else ".")
    )
    epochs = sorted({epoch for values in found.values() for epoch in values})
    said = "; ".join(
        f"{metric} from {values[min(values)]:.3g} to {values[max(values)]:.3g}"
        for metric, values in found.items()
    )
    rows: tuple[tuple[Entry, ...], ...] = tuple(
        (str(epoch), *(_entry(values, epoch) for values in found.values())) for epoch in epochs
    )
    table = Table(title, ("epoch", *found), rows)
    draw_it = partial(draw, found, score)
    return [
        Plot(
            file_name(title),
            title,
            caption,
            f"Learning curve over {len(epochs)} epochs: {said}.",
            draw_it,
            table,
        )
    ]


def draw(curves: Curves, score: str, theme: Theme) -> Figure:
    """Draw the loss on the left and the score on the right, each with a line for training and for val.

    Args:
        curves: Values by metric and epoch; a metric that the run did not log is missing.
        score: Name of the score, such as "acc", in per cent.
        theme: Colours of the page.
    """
    figure = Figure(figsize=(WIDTH * 1.3, WIDTH * 0.5), layout="constrained")
    labelled = False
    for axes, what in zip(figure.subplots(1, 2), ("loss", score), strict=True):
        for place, (stage, (dash, marker)) in enumerate(_SHAPES.items()):
            values = curves.get(f"{stage}/{what}", {})
            heights = [100 * value if what == score else value for value in values.values()]
            few = len(values) <= 30
            axes.plot(
                [*values],
                heights,
                linestyle=dash,
                marker=marker if few else "",
                color=theme.colours[place],
                label=stage,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss" if what == "loss" else f"{_WORDS.get(what, what)} (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labelled = labelled or bool(curves.get(f"val/{what}"))
    if labelled:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=3
        )
    return figure


def _entry(values: Mapping[int, float], epoch: int) -> Entry:
    return decimal(values[epoch], 4) if epoch in values else ""
