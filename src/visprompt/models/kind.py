"""Kinds of tasks: the loss, the metrics and the score that go with a kind of label.

A data module names its kind; the classifier, the LightningModule, results and reports read all else from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix


class Loss(Protocol):
    """A kind's loss, in float32 also under autocast; linear in the target, so that mixed images have it."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        /,
    ) -> Tensor:
        """Return the loss of each image [B].

        Args:
            logits: [B, C].
            labels: [B].
            smoothing: Share of the target that is spread over all classes; only in training.
            class_weights: [C]; the loss is multiplied by them. Only in training.
        """


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        name: Name in results, such as "single_label".
        score: Name of the figure that runs are compared by, logged as `val/<score>` and `test/<score>`.
        shares: Names of the figures between 0 and 1, shown in per cent; the score is the first.
        loss: Function of logits [B, C] and labels [B] that returns the loss of each image [B], see `Loss`.
        weights: Function of labels [n] and class weights [C] that returns the weight by which class weights
            multiply the loss of each image [n]; a weighted mean is divided by their sum.
        counts: Function of labels [n] and the number of classes that returns the images of each class [C].
        correct: Function of logits [B, C] and labels [B] that returns 1.0 for each correctly predicted image,
            else 0.0, [B].
        figures: Function of the number of classes that returns a metric. The metric's `update` takes logits
            [B, C], labels [B] and weights [B], where 0 marks a filler image; `compute` returns figures by
            name, including `per_class` (a list) and `count`.
    """

    name: str
    score: str
    shares: tuple[str, ...]
    loss: Loss
    weights: Callable[[Tensor, Tensor], Tensor]
    counts: Callable[[Tensor, int], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]
    figures: Callable[[int], Metric]


class Mean(Metric):
    """Weighted mean over all ranks; NaN and infinity stay in it (torchmetrics' mean drops NaN)."""

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add values [n] with their weights [n]."""
        self.total = self.total + (values * weights).sum()
        self.weight = self.weight + weights.sum()

    def compute(self) -> Tensor:
        """Return the mean so far."""
        return self.total / self.weight


class Accuracies(MulticlassConfusionMatrix):
    """Accuracy over images and over classes, summed over all ranks."""

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:  # type: ignore[override]  # with weights
        """Add a batch; see `TaskKind.figures`."""
        real = weights > 0
        super().update(logits.argmax(1)[real], labels[real])

    def compute(self) -> dict[str, Any]:  # type: ignore[override]  # the figures of the matrix
        """Return the figures so far."""
        return accuracies(super().compute())


def accuracies(confusion: Tensor) -> dict[str, Any]:
    """Return accuracy figures of a confusion matrix.

    Args:
        confusion: Counts [C, C], a row for each true class.

    Returns:
        acc (over images), balanced_acc (mean over classes that have images), per_class (accuracy of each
        class, None for a class without images), count (number of images).
    """
    counts = confusion.sum(1)
    hits = confusion.diagonal()
    present = counts > 0
    shares = hits[present].double() / counts[present]
    per_class = [float(hits[c] / counts[c]) if present[c] else None for c in range(len(counts))]
    return {
        "acc": float(hits.sum().double() / counts.sum()),
        "balanced_acc": float(shares.mean()),
        "per_class": per_class,
        "count": int(counts.sum()),
    }


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None, /
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(
            logits.float(), labels, class_weights, reduction="none", label_smoothing=smoothing
        )


SINGLE_LABEL = TaskKind(
    name="single_label",
    score="acc",
    shares=("acc", "balanced_acc"),
    loss=_cross_entropy,
    weights=lambda labels, class_weights: class_weights[labels],
    counts=lambda labels, classes: torch.bincount(labels, minlength=classes),
    correct=lambda logits, labels: (logits.argmax(1) == labels).float(),
    figures=Accuracies,
)
"""One class for each image."""

KINDS: Mapping[str, TaskKind] = {kind.name: kind for kind in (SINGLE_LABEL,)}
