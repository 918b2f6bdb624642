"""Kinds of tasks: the loss, the metrics and the score that go with a kind of label.

A data module names its kind; the classifier, the LightningModule, results and reports read all else from it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
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

from visprompt.data.sources.label_sets import SEPARATOR
from visprompt.models import calibration
from visprompt.models.scores import (
    ClassScore,
    class_scores,
    confused,
    confusion_rows,
    decision_rows,
    decision_scores,
    wilson,
)

BINS = 15
"""Number of equally wide bins of confidence in the expected calibration error"""


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
            labels: [B], or [B, C] of 0 and 1.
            smoothing: Share of the target that is spread over all classes, or over 0 and 1; only in training.
            class_weights: [C]; the loss is multiplied by them. Only in training.
        """


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        name: Name in results, such as "single_label". Labels are [B], or [B, C] of 0 and 1 if an image may
            have several classes.
        score: Name of the figure that runs are compared by, logged as `val/<score>` and `test/<score>`.
        words: The score in words.
        hit_words: The figure `hit` in words.
        shares: Names of the figures between 0 and 1, shown in per cent; the score is the first.
        hit: Name of the share of images whose labels are predicted, logged for training images.
        loss: Function of logits [B, C] and labels that returns the loss of each image [B], see `Loss`.
        weights: Function of labels and class weights [C] that returns the weight by which class weights
            multiply the loss of each image [n]; a weighted mean is divided by their sum.
        counts: Function of labels and the number of classes that returns the images of each class [C].
        probabilities: Function of logits [..., C] and a temperature, by which they are divided, that returns
            probabilities [..., C] in float32.
        decide: Function of probabilities [B, C] that returns the predicted labels, in the form of the labels.
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
    words: str
    hit_words: str
    shares: tuple[str, ...]
    hit: str
    loss: Loss
    weights: Callable[[Tensor, Tensor], Tensor]
    counts: Callable[[Tensor, int], Tensor]
    probabilities: Callable[[Tensor, float], Tensor]
    decide: Callable[[Tensor], Tensor]
    figures: Callable[[int], Metric]
    class_scores: Callable[[Tensor], list[ClassScore]]
    confused: Callable[[Tensor, int], list[tuple[int, int, int]]]
    confusion_rows: Callable[[Tensor, Sequence[str]], list[tuple[str, ...]]]
    interval: Callable[[float, int], tuple[float, float]] | None

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return 1.0 for each image [B] whose labels are predicted, all of them, else 0.0."""
        return self.agree(self.decide(self.probabilities(logits, 1.0)), labels).float()

    def named(self, probabilities: Tensor, class_names: Sequence[str]) -> str:
        """Return the predicted class of probabilities [C] by its name; several classes are joined by ";"."""
        return self.label_name(self.decide(probabilities[None])[0].tolist(), class_names)

    def label_name(self, label: int | Sequence[int], class_names: Sequence[str]) -> str:
        """Return the class of a label by its name; several classes are joined by ";"."""
        if isinstance(label, int):
            return class_names[label]
        return SEPARATOR.join(name for name, has in zip(class_names, label, strict=True) if has)

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> float | None:
        """Return the temperature at which probabilities fit labels best, see `calibration`."""

        def right(logits: Tensor) -> Tensor:
            return self.decide(self.probabilities(logits, 1.0)) == labels.to(logits.device)

        return calibration.fit_temperature(logits, labels, self.loss, right)

    def agree(self, labels: Tensor, others: Tensor) -> Tensor:
        """Return for which images [B] two labels are the same."""
        return (labels == others).flatten(1).all(1) if labels.ndim > 1 else labels == others


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
        # 1.0 belongs to the last bin; torchmetrics would count it in one more
        self.confidences = [dim_zero_cat(self.confidences).cpu().clamp(max=1 - 2**-24)]
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


def _cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None, /
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(
            _wide(logits), labels, class_weights, reduction="none", label_smoothing=smoothing
        )


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32, or as they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
        real = weights > 0
        # probabilities, because torchmetrics takes logits for them if all lie between 0 and 1; in float64, in
        # which large logits stay in their order
        super().update(logits[real].double().sigmoid(), labels[real])

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
        each = [float(value) if has else None for value, has in zip(precisions, present, strict=True)]
        f1 = partial(multilabel_f1_score, shares, labels, num_labels=self.num_labels)
        return {
            "map": float(precisions[present].double().mean()),
            "f1": float(f1(average="none")[present].mean()),
            "f1_micro": float(f1(average="micro")),
            "exact": float(multilabel_exact_match(shares, labels, num_labels=self.num_labels)),
            "per_class": each,
            "count": len(labels),
            "confusion": multilabel_confusion_matrix(shares, labels, num_labels=self.num_labels).cpu(),
        }


def _binary_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None, /
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        target = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(
            _wide(logits), target.to(_wide(logits).dtype), class_weights, reduction="none"
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

KINDS: Mapping[str, TaskKind] = {kind.name: kind for kind in (SINGLE_LABEL, MULTI_LABEL)}
