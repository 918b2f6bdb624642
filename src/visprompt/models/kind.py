"""Kinds of tasks: the loss, the metrics and the score that go with a kind of label.

A data module names its kind; the classifier, the LightningModule, results and reports read all else from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix
from torchmetrics.utilities import dim_zero_cat

from visprompt.models.calibration import fit_temperature
from visprompt.models.scores import ClassScore, class_scores, confused, confusion_rows, wilson

BINS = 15
"""Number of equally wide bins of confidence in the expected calibration error"""


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        name: Name in results, such as "single_label".
        score: Name of the figure that runs are compared by, logged as `val/<score>` and `test/<score>`.
        shares: Names of the figures between 0 and 1, shown in per cent; the score is the first.
        loss: Function of logits [B, C] and labels [B] that returns the loss of each image [B].
        probabilities: Function of logits [..., C] and a temperature, by which they are divided, that returns
            probabilities [..., C] in float32.
        fit_temperature: Function of logits [N, C] and labels [N] of images that were not trained on that
            returns the temperature, or None.
        correct: Function of logits [B, C] and labels [B] that returns 1.0 for each correctly predicted image,
            else 0.0, [B].
        figures: Function of the number of classes that returns a metric. The metric's `update` takes logits
            [B, C], labels [B] and weights [B], where 0 marks a filler image; `compute` returns figures by
            name, including `per_class` (a list), `count`, and `confusion`: the counts that the functions
            below take, an integer tensor on the CPU.
        class_scores: Function of these counts that returns the figures of each class.
        confused: Function of these counts and a number that returns so many of the most common mistakes, as
            triples of a true class, the class it was taken for, and the number of images.
        confusion_rows: Function of these counts and the class names that returns the rows of confusion.csv,
            the first of which is its header.
        interval: Function of the score and the number of images that returns the score's 95 % confidence
            interval; None if the score is not a share of images.
    """

    name: str
    score: str
    shares: tuple[str, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[Tensor, float], Tensor]
    fit_temperature: Callable[[Tensor, Tensor], float | None]
    correct: Callable[[Tensor, Tensor], Tensor]
    figures: Callable[[int], Metric]
    class_scores: Callable[[Tensor], list[ClassScore]]
    confused: Callable[[Tensor, int], list[tuple[int, int, int]]]
    confusion_rows: Callable[[Tensor, Sequence[str]], list[tuple[str, ...]]]
    interval: Callable[[float, int], tuple[float, float]] | None


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


class CalibrationError(MulticlassCalibrationError):
    """torchmetrics' calibration error, summed on the CPU: sums on a GPU differ from run to run."""

    def compute(self) -> Tensor:
        """Return the error so far."""
        self.confidences = [dim_zero_cat(self.confidences).cpu()]
        self.accuracies = [dim_zero_cat(self.accuracies).cpu()]
        return super().compute()


class Accuracies(MulticlassConfusionMatrix):
    """Accuracy over images and over classes, and the calibration error, over all ranks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self._calibration = CalibrationError(num_classes, BINS, "l1", validate_args=False)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:  # type: ignore[override]  # with weights
        """Add a batch; see `TaskKind.figures`."""
        real = weights > 0
        super().update(logits.argmax(1)[real], labels[real])
        # a diverged run, whose logits are not finite, is recognised by its loss
        shares = _softmax(logits[real], 1.0).nan_to_num()
        self._calibration.update(shares, labels[real])

    def reset(self) -> None:
        """Forget what was added."""
        super().reset()
        self._calibration.reset()

    def compute(self) -> dict[str, Any]:  # type: ignore[override]  # the figures of the matrix
        """Return the figures so far."""
        confusion = super().compute().cpu()
        error = float(self._calibration.compute())
        return accuracies(confusion) | {"ece": error, "confusion": confusion}


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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), labels, reduction="none")


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() if temperature == 1 else logits.float() / temperature).softmax(-1)


SINGLE_LABEL = TaskKind(
    name="single_label",
    score="acc",
    shares=("acc", "balanced_acc", "ece"),
    loss=_cross_entropy,
    probabilities=_softmax,
    fit_temperature=fit_temperature,
    correct=lambda logits, labels: (logits.argmax(1) == labels).float(),
    figures=Accuracies,
    class_scores=class_scores,
    confused=confused,
    confusion_rows=confusion_rows,
    interval=wilson,
)
"""One class for each image."""

KINDS: Mapping[str, TaskKind] = {kind.name: kind for kind in (SINGLE_LABEL,)}
