"""What a task asks of an image: the kind of target, with the loss, the figures and the score that go with it.

Data modules name their kind; the classifier, the LightningModule, results and reports read everything else
here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        name: As results record it.
        score: The figure that runs are judged and chosen by; logged as `val/<score>` and `test/<score>`.
        shares: Figures between 0 and 1, shown in per cent; the score is the first.
        loss: Logits [B, C] and labels [B] -> the loss of each image [B].
        correct: Logits [B, C] and labels [B] -> 1.0 for each image that is predicted rightly, else 0.0 [B].
        figures: Number of classes -> a metric. `update` takes logits [B, C], labels [B] and weights [B], of
            which 0 marks a filler; `compute` returns figures by name, `per_class` (a list) and `count` among
            them.
    """

    name: str
    score: str
    shares: tuple[str, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor]
    figures: Callable[[int], Metric]


class Accuracies(MulticlassConfusionMatrix):
    """Accuracy over images and over classes, summed over all ranks."""

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:  # type: ignore[override]  # with weights
        """Count a batch, see `TaskKind.figures`."""
        real = weights > 0
        super().update(logits.argmax(1)[real], labels[real])

    def compute(self) -> dict[str, Any]:  # type: ignore[override]  # the figures of the matrix
        """Return the figures so far."""
        return accuracies(super().compute())


def accuracies(confusion: Tensor) -> dict[str, Any]:
    """Return accuracy figures of a confusion matrix.

    Args:
        confusion: Counts [C, C], a row for every true class.

    Returns:
        acc (share of images), balanced_acc (mean over the classes that are present) and per_class (share of
        each class, None where it has no image), count (images).
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


SINGLE_LABEL = TaskKind(
    name="single_label",
    score="acc",
    shares=("acc", "balanced_acc"),
    loss=_cross_entropy,
    correct=lambda logits, labels: (logits.argmax(1) == labels).float(),
    figures=Accuracies,
)
"""One class for each image."""

KINDS: Mapping[str, TaskKind] = {kind.name: kind for kind in (SINGLE_LABEL,)}
