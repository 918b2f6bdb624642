"""Kinds of tasks: the loss, the metrics and the score that go with a kind of label.

A data module names its kind; the classifier, the LightningModule, results and reports read all else from it.
"""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
)
from torchmetrics.functional.classification import (
    multilabel_confusion_matrix,
    multilabel_exact_match,
    multilabel_f1_score,
)
from torchmetrics.utilities import dim_zero_cat

from visprompt.models.scores import (
    class_scores,
    confused,
    confusion_rows,
    decision_rows,
    decision_scores,
    wilson,
)
from visprompt.models.segmentation import SEGMENTATION
from visprompt.models.task_kind import TaskKind
from visprompt.models.tensors import in_full_precision, wide

BINS = 15
"""Number of equally wide bins of confidence in the expected calibration error"""


def _real(weights: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return the rows of tensors [n, ...] whose weights [n] are above 0; waits for a device once."""
    rows = (weights > 0).nonzero().squeeze(1)
    return [tensor[rows] for tensor in tensors]


class CalibrationError(MulticlassCalibrationError):
    """torchmetrics' calibration error, summed on the CPU: sums on a GPU differ from run to run."""

    def compute(self) -> Tensor:
        """Return the error so far."""
        # 1.0 belongs to the last bin; torchmetrics would count it in one more
        self.confidences = [dim_zero_cat(self.confidences).cpu().clamp(max=1 - 2**-24)]
        self.accuracies = [dim_zero_cat(self.accuracies).cpu()]
        return super().compute()


class Accuracies(MulticlassConfusionMatrix):
    """Accuracy over images and over classes, and the calibration error, over all ranks."""

    def __init__(self, num_classes: int) -> None:
        # data modules check their labels, and a check here would wait for the device in every batch
        super().__init__(num_classes, validate_args=False)
        self._calibration = CalibrationError(num_classes, BINS, "l1", validate_args=False)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:  # type: ignore[override]  # with weights
        """Add a batch; see `TaskKind.figures`."""
        logits, labels = _real(weights, logits, labels)
        super().update(logits.argmax(1), labels)
        # a diverged run, whose logits are not finite, is recognised by its loss
        self._calibration.update(_softmax(logits, 1.0).nan_to_num(), labels)

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
    each = zip((hits / counts).tolist(), present.tolist(), strict=True)
    return {
        "acc": float(hits.sum().double() / counts.sum()),
        "balanced_acc": float(shares.mean()),
        "per_class": [share if has else None for share, has in each],
        "count": int(counts.sum()),
    }


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None, /
) -> Tensor:
    with in_full_precision(logits.device):
        return F.cross_entropy(
            wide(logits), labels, class_weights, reduction="none", label_smoothing=smoothing
        )


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() if temperature == 1 else logits.float() / temperature).softmax(-1)


SINGLE_LABEL = TaskKind(
    name="single_label",
    score="acc",
    words="accuracy",
    hit_words="accuracy",
    shares=("acc", "balanced_acc", "ece"),
    hit="acc",
    loss=_cross_entropy,
    weights=lambda labels, class_weights: class_weights[labels],
    counts=lambda labels, classes: torch.bincount(labels, minlength=classes),
    probabilities=_softmax,
    decide=lambda probabilities: probabilities.argmax(1),
    figures=Accuracies,
    class_scores=class_scores,
    confused=confused,
    confusion_rows=confusion_rows,
    interval=wilson,
)
"""One class for each image."""


class Precisions(MultilabelAveragePrecision):
    """Average precision and F1 of classes of which an image may have several, over all ranks.

    The F1 counts a class as predicted where its probability is above 0.5.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:  # type: ignore[override]  # with weights
        """Add a batch; see `TaskKind.figures`."""
        logits, labels = _real(weights, logits, labels)
        # probabilities, because torchmetrics takes logits for them if all lie between 0 and 1; in float64, in
        # which large logits stay in their order
        super().update(logits.double().sigmoid(), labels)

    def compute(self) -> dict[str, Any]:  # type: ignore[override]  # all figures
        """Return the figures so far.

        Returns:
            map (mean of the average precisions of classes that have images), f1 (mean over these classes),
            f1_micro (over all decisions), exact (share of images whose classes are all right), per_class
            (average precision of each class, None for a class without images), count (number of images),
            confusion (decisions of each class [C, 2, 2], a row for the truth, 0 or 1).
        """
        shares, labels = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        present = labels.sum(0) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without images, which are left out
            precisions = super().compute()
        each = zip(precisions.tolist(), present.tolist(), strict=True)
        f1 = partial(multilabel_f1_score, shares, labels, num_labels=self.num_labels)
        return {
            "map": float(precisions[present].double().mean()),
            "f1": float(f1(average="none")[present].mean()),
            "f1_micro": float(f1(average="micro")),
            "exact": float(multilabel_exact_match(shares, labels, num_labels=self.num_labels)),
            "per_class": [share if has else None for share, has in each],
            "count": len(labels),
            "confusion": multilabel_confusion_matrix(shares, labels, num_labels=self.num_labels).cpu(),
        }


def _binary_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None, /
) -> Tensor:
    with in_full_precision(logits.device):
        target = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(
            wide(logits), target.to(wide(logits).dtype), class_weights, reduction="none"
        ).mean(1)


MULTI_LABEL = TaskKind(
    name="multi_label",
    score="map",
    words="mean average precision",
    hit_words="share of images with all classes right",
    shares=("map", "f1", "f1_micro", "exact"),
    hit="exact",
    loss=_binary_cross_entropy,
    weights=lambda labels, class_weights: class_weights.mean().expand(len(labels)),
    counts=lambda labels, classes: labels.sum(0),
    probabilities=lambda logits, temperature: (logits.float() / temperature).sigmoid(),
    decide=lambda probabilities: (probabilities > 0.5).long(),
    figures=Precisions,
    class_scores=decision_scores,
    confused=lambda decisions, most: [],
    confusion_rows=decision_rows,
    interval=None,  # the score is not a share of images
)
"""Any number of classes for each image: binary cross-entropy, and the mean average precision as the score."""

KINDS: Mapping[str, TaskKind] = {kind.name: kind for kind in (SINGLE_LABEL, MULTI_LABEL, SEGMENTATION)}
