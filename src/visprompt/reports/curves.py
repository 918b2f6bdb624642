"""The learning curve of one run: loss and score after each epoch, on training and validation images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visprompt.models.kind import KINDS
from visprompt.models.task_kind import TaskKind
from visprompt.reports.charts import file_name
from visprompt.reports.figures import WIDTH, Plot, Theme
from visprompt.reports.load import history
from visprompt.reports.writers import Entry, Table, decimal
from visprompt.runs.result import Result

_LEAST = 2  # epochs; fewer are no curve
_SHAPES = {"train": ("-", "o"), "val": ((0, (5, 2)), "s")}
Curves = Mapping[str, Mapping[int, float]]


def plots(folder: Path, result: Result, name: str) -> list[Plot]:
    """Return a run's learning curve as a figure; no figure if the run has no metrics.csv or a single epoch.

    Args:
        folder: The run's folder.
        result: The run's result.
        name: The run in words, for the title.
    """
    kind = KINDS[result.kind]
    metrics = ["train/loss", "val/loss", f"train/{kind.hit}", f"val/{kind.score}"]
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
    draw_it = partial(draw, found, kind)
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


def draw(curves: Curves, kind: TaskKind, theme: Theme) -> Figure:
    """Draw the loss on the left and the score on the right, each with a line for training and for val.

    Args:
        curves: Values by metric and epoch; a metric that the run did not log is missing.
        kind: The kind of the task, whose score is shown in per cent.
        theme: Colours of the page.
    """
    figure = Figure(figsize=(WIDTH * 1.3, WIDTH * 0.5), layout="constrained")
    labelled = False
    loss, shares = {"train": "loss", "val": "loss"}, {"train": kind.hit, "val": kind.score}
    for axes, figures in zip(figure.subplots(1, 2), (loss, shares), strict=True):
        for place, (stage, (dash, marker)) in enumerate(_SHAPES.items()):
            values = curves.get(f"{stage}/{figures[stage]}", {})
            heights = [value if figures is loss else 100 * value for value in values.values()]
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
        same = kind.hit == kind.score
        share = f"{kind.words} (%)" if same else f"train: {kind.hit_words} (%)\nval: {kind.words} (%)"
        axes.set_ylabel("loss" if figures is loss else share)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labelled = labelled or bool(curves.get(f"val/{figures['val']}"))
    if labelled:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=3
        )
    return figure


def _entry(values: Mapping[int, float], epoch: int) -> Entry:
    return decimal(values[epoch], 4) if epoch in values else ""
