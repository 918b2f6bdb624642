"""The images that a run was scored on, scored again: classes, confidences and the most confident mistakes.

Of a segmentation run only the pixels are counted.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visprompt.errors import UserError
from visprompt.models.kind import BINS
from visprompt.models.task_kind import TaskKind
from visprompt.reports.inspection import Opened

_NEAR = 0.005  # difference from the recorded score that another kind of device may make


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """The predictions for the images that a run was scored on.

    Attributes:
        labels: int64 [N].
        predicted: int64 [N].
        confidences: float32 [N], the probability of the predicted class.
        plain: float32 [N], the same without the temperature of the tuned state.
        temperature: The temperature; 1 if the state has none.
        class_names: Names of the classes.
        set_name: The split set that was scored.
        kind: The kind of the task.
    """

    labels: np.ndarray
    predicted: np.ndarray
    confidences: np.ndarray
    plain: np.ndarray
    temperature: float
    class_names: tuple[str, ...]
    set_name: str
    kind: TaskKind

    @property
    def counts(self) -> np.ndarray:
        """Return the confusion matrix, int64 [C, C], a row for every true class."""
        size = len(self.class_names)
        flat = np.bincount(self.labels * size + self.predicted, minlength=size**2)
        return flat.reshape(size, size).astype(np.int64)

    def mistakes(self, most: int) -> np.ndarray:
        """Return the positions of the wrongly labelled images, the most confident first, int64 [n]."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")][:most]


def scored(opened: Opened) -> Scored:
    """Predict the images that a run was scored on.

    Raises:
        UserError: The predictions do not give the score that the run recorded.
    """
    kind, temperature = opened.classifier.kind, opened.classifier.temperature
    parts: dict[str, list[Tensor]] = {}
    for images, of_batch in opened.batches(opened.dataset):
        logits = opened.compute(opened.classifier, images).float().cpu()
        confidences = kind.probabilities(logits, temperature).amax(1)
        plain = kind.probabilities(logits, 1.0).amax(1)
        values = {"labels": of_batch, "predicted": logits.argmax(1), "confidences": confidences}
        for name, tensor in (values | {"plain": plain}).items():
            parts.setdefault(name, []).append(tensor)
    found = Scored(
        **{name: torch.cat(tensors).numpy() for name, tensors in parts.items()},
        temperature=temperature,
        class_names=opened.datamodule.class_names,
        set_name=opened.set_name,
        kind=kind,
    )
    check_score(opened, float((found.predicted == found.labels).mean()))
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Counted:
    """The pixels that a segmentation run was scored on.

    Attributes:
        counts: int64 [C, C], a row for every true class.
        class_names: Names of the classes.
        set_name: The split set that was scored.
        kind: The kind of the task.
    """

    counts: np.ndarray
    class_names: tuple[str, ...]
    set_name: str
    kind: TaskKind


def counted(opened: Opened) -> Counted:
    """Predict the pixels that a segmentation run was scored on.

    Raises:
        UserError: The predictions do not give the score that the run recorded.
    """
    kind = opened.classifier.kind
    figures = kind.figures(opened.classifier.num_classes)
    for images, of_batch in opened.batches(opened.dataset):
        logits = opened.compute(opened.classifier, images).float().cpu()
        figures.update(logits, of_batch, torch.ones(len(logits)))
    values = figures.compute()
    check_score(opened, values[kind.score])
    return Counted(
        counts=values["confusion"].numpy(),
        class_names=opened.datamodule.class_names,
        set_name=opened.set_name,
        kind=kind,
    )


def check_score(opened: Opened, score: float) -> None:
    """Refuse a score that is not the one that a run recorded.

    Raises:
        UserError: They differ by more than another kind of device may make.
    """
    if abs(score - opened.result.score) > _NEAR:
        raise UserError(
            f"{opened.folder} recorded {100 * opened.result.score:.2f} % on {opened.set_name}, and this "
            f"machine finds {100 * score:.2f} %: use the kind of device it ran on "
            f"({opened.result.machine['device']}), and the versions it names"
        )


@dataclass(frozen=True, eq=False)
class Reliability:
    """Accuracy by confidence, in equally wide bins without the empty ones.

    Attributes:
        confidence: Mean confidence of each bin.
        accuracy: Share of correctly labelled images of each bin.
        count: Number of images of each bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: mean difference of the two, weighted by the count."""
        return float((np.abs(self.accuracy - self.confidence) * self.count).sum() / self.count.sum())


def reliability(confidences: np.ndarray, right: np.ndarray) -> Reliability:
    """Return accuracy by confidence.

    Args:
        confidences: float [N], the probability of the predicted class.
        right: bool [N], whether it is the true class.
    """
    edges = np.linspace(0, 1, BINS + 1, dtype=np.float32)  # as torchmetrics has them
    places = np.minimum(np.digitize(confidences, edges) - 1, BINS - 1)
    count = np.bincount(places, minlength=BINS)
    taken = count > 0
    sums = (np.bincount(places, values, minlength=BINS) for values in (confidences, right))
    confidence, accuracy = (total[taken] / count[taken] for total in sums)
    return Reliability(confidence, accuracy, count[taken])
