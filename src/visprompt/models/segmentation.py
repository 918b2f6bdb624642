"""The kind of task that gives each pixel a class: semantic segmentation.

Labels are int64 [B, H, W]; logits [B, C, h, w] may have another size, and are then resized to that of the
labels, as mmsegmentation's evaluation does. Pixels labelled `IGNORED` count nowhere.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from visprompt.data.masks import IGNORED
from visprompt.models.scores import class_scores, confused, confusion_rows
from visprompt.models.task_kind import TaskKind
from visprompt.models.tensors import in_full_precision, wide

_CLASSES_AT_ONCE = 16  # of a large image, whose logits of all classes would take gigabytes
_LOGITS_AT_ONCE = 2**26  # of a very large image, of which those of 16 classes would take gigabytes too


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits [B, C, h, w] at another height and width, by bilinear interpolation (half-pixel)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def largest(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return the class [B, H, W] of each pixel: that of the largest of the logits, resized to H x W.

    Args:
        logits: [B, C, h, w]; probabilities will do too.
        size: Height and width.
    """
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits.max(1).indices  # on a CPU ten times as fast as argmax
    step = max(1, min(_CLASSES_AT_ONCE, _LOGITS_AT_ONCE // (len(logits) * math.prod(size))))
    values, classes = resized(logits[:, :step], size).max(1)
    for first in range(step, logits.shape[1], step):
        others, places = resized(logits[:, first : first + step], size).max(1)
        classes = torch.where(others > values, places + first, classes)
        values = torch.maximum(values, others)
    return classes


def _loss(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None, /
) -> Tensor:
    """Return the cross-entropy of each image [B]: its sum over labelled pixels, divided by all pixels.

    There are no class weights, which `Objective` refuses.

    All, as in mmsegmentation (`avg_non_ignore=False`): the mean over images is then the mean over the pixels
    of a batch, on any number of devices. Labels are resized if logits have another size, as in evaluation.
    """
    if logits.shape[-2:] != labels.shape[-2:]:
        nearest = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest-exact")
        labels = nearest[:, 0].long()
    known = labels != IGNORED
    with in_full_precision(logits.device):
        # not F.cross_entropy, which on a GPU has no deterministic form for maps
        shares = wide(logits).log_softmax(1)
        losses = -shares.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * shares.mean(1)
    return (losses * known).flatten(1).mean(1)


class PixelFigures(MulticlassConfusionMatrix):
    """Intersection over union and accuracies of labelled pixels, over all ranks, from whole numbers."""

    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORED, validate_args=False)
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:  # type: ignore[override]  # with weights
        """Add a batch; see `TaskKind.figures`."""
        real = weights > 0
        super().update(largest(logits[real], labels.shape[-2:]), labels[real])
        self.images = self.images + real.sum()

    def compute(self) -> dict[str, Any]:  # type: ignore[override]  # all figures
        """Return the figures so far, see `pixel_figures`."""
        confusion = super().compute().cpu()
        return pixel_figures(confusion) | {"count": int(self.images), "confusion": confusion}


def pixel_figures(confusion: Tensor) -> dict[str, Any]:
    """Return the figures of a confusion matrix of pixels.

    Args:
        confusion: Counts [C, C], a row for each true class.

    Returns:
        miou (mean over the classes that occur in labels or predictions of the intersection over the union of
        both), mean_acc (mean over the classes that occur in labels of the share of their pixels that are
        right), pixel_acc (share of all pixels that are right), per_class (intersection over union; None for a
        class that does not occur).
    """
    hits, labelled, predicted = confusion.diagonal().double(), confusion.sum(1), confusion.sum(0)
    union = labelled + predicted - confusion.diagonal()
    shares = (hits / union).tolist()
    return {
        "miou": float((hits / union)[union > 0].mean()),
        "mean_acc": float((hits / labelled)[labelled > 0].mean()),
        "pixel_acc": float(hits.sum() / labelled.sum()),
        "per_class": [
            share if has else None for share, has in zip(shares, (union > 0).tolist(), strict=True)
        ],
    }


class _Segmentation(TaskKind):
    """The kind of task whose labels are those of pixels."""

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the share of each image's labelled pixels that are right, [B]; 0 if none is labelled.

        Training logs its mean over images; `pixel_acc` of a scoring is over all pixels.
        """
        known = labels != IGNORED
        hits = (largest(logits, labels.shape[-2:]) == labels) & known
        return hits.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> float | None:
        """Return None: probabilities of pixels are not calibrated."""
        return None


def _counts(labels: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels[labels != IGNORED].flatten(), minlength=classes)


SEGMENTATION = _Segmentation(
    name="segmentation",
    score="miou",
    words="mean IoU",
    hit_words="pixel accuracy",
    shares=("miou", "mean_acc", "pixel_acc"),
    hit="pixel_acc",
    loss=_loss,
    weights=lambda labels, class_weights: class_weights.mean().expand(len(labels)),
    counts=_counts,
    probabilities=lambda logits, temperature: (logits.float() / temperature).softmax(-3),
    decide=lambda probabilities: probabilities.argmax(-3),
    figures=PixelFigures,
    class_scores=class_scores,
    confused=confused,
    confusion_rows=partial(confusion_rows, unit="pixels"),
    interval=None,  # pixels of one image are not independent
    dense=True,
    unit="pixels",
)
"""One class for each pixel: cross-entropy, and the mean intersection over union as the score."""
