"""What a kind of task consists of: its loss, its metrics and its score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from visprompt.data.sources.label_sets import SEPARATOR
from visprompt.models import calibration
from visprompt.models.scores import ClassScore


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
            logits: [B, C], or [B, C, H, W] of a dense kind.
            labels: [B], or [B, C] of 0 and 1, or [B, H, W] of a dense kind.
            smoothing: Share of the target that is spread over all classes, or over 0 and 1; only in training.
            class_weights: [C]; the loss is multiplied by them. Only in training.
        """


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        name: Name in results, such as "single_label". Labels are [B], or [B, C] of 0 and 1 if an image may
            have several classes, or [B, H, W] of a dense kind.
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
        dense: Whether each pixel has a label, and logits are [B, C, H, W].
        unit: What is counted: "images" or "pixels".
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
    dense: bool = False
    unit: str = "images"

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
