"""The images that a multi-label run was scored on, scored again: the decisions of each class."""

from dataclasses import dataclass

import numpy as np
import torch

from visprompt.models.task_kind import TaskKind
from visprompt.reports.inspection import Opened
from visprompt.reports.scored import check_score


@dataclass(frozen=True, eq=False, kw_only=True)
class Decided:
    """The decisions for the images that a multi-label run was scored on.

    Attributes:
        labels: int64 [N, C] of 0 and 1.
        probabilities: float32 [N, C].
        counts: int64 [C, 2, 2], for each class a row for the truth and a column for the decision.
        class_names: Names of the classes.
        set_name: The split set that was scored.
        kind: The kind of the task.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    counts: np.ndarray
    class_names: tuple[str, ...]
    set_name: str
    kind: TaskKind

    @property
    def wrong(self) -> int:
        """Return the number of wrong decisions."""
        return int(((self.probabilities > 0.5) != (self.labels > 0)).sum())

    def mistakes(self, most: int) -> list[tuple[int, int, bool, float]]:
        """Return wrong decisions: image, class, what was decided, and its probability; the highest first."""
        chosen = self.probabilities > 0.5
        confidence = np.where(chosen, self.probabilities, 1 - self.probabilities)
        rows, columns = np.nonzero(chosen != (self.labels > 0))
        order = np.argsort(-confidence[rows, columns], kind="stable")[:most]
        return [
            (int(row), int(column), bool(chosen[row, column]), float(confidence[row, column]))
            for row, column in zip(rows[order], columns[order], strict=True)
        ]

    def said(self, column: int, has: bool) -> str:
        """Return in words that an image has a class or not."""
        return self.class_names[column] if has else f"no {self.class_names[column]}"


def decided(opened: Opened) -> Decided:
    """Predict the images that a multi-label run was scored on.

    Raises:
        UserError: The predictions do not give the score that the run recorded.
    """
    kind = opened.classifier.kind
    figures, labels, shares = kind.figures(opened.classifier.num_classes), [], []
    for images, of_batch in opened.batches(opened.dataset):
        logits = opened.compute(opened.classifier, images).float().cpu()
        figures.update(logits, of_batch, torch.ones(len(logits)))
        labels.append(of_batch)
        shares.append(opened.classifier.probabilities(logits))
    values = figures.compute()
    check_score(opened, values[kind.score])
    return Decided(
        labels=torch.cat(labels).numpy(),
        probabilities=torch.cat(shares).numpy(),
        counts=values["confusion"].numpy(),
        class_names=opened.datamodule.class_names,
        set_name=opened.set_name,
        kind=kind,
    )
