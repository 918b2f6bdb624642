"""Score several finished runs, those of one test set in one pass over it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from visprompt.data.datasets import Batch
from visprompt.errors import UserError
from visprompt.models.bank import Bank
from visprompt.models.task_kind import Mean, TaskKind
from visprompt.models.tuned_state import TunedState
from visprompt.runs.result import Result


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        folder: Its folder.
        state: Its tuned state.
        result: Its result.
    """

    folder: Path
    state: TunedState
    result: Result


def by_test_set(runs: Sequence[Finished], precision: str | None = None) -> list[list[Finished]]:
    """Return the runs in groups with the same backbone, test images, preprocessing and precisions.

    Args:
        runs: The runs.
        precision: The precision of all; None for that of each run.
    """
    groups: dict[tuple[Any, ...], list[Finished]] = {}
    for run in runs:
        images = (run.result.data["fingerprint"], run.state.class_names, repr(dict(run.state.preprocessing)))
        matmul = run.result.trainer.get("matmul_precision", "highest")
        key = (precision or run.result.precision, matmul, repr(dict(run.state.backbone)), *images)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


class ScoreEach(L.LightningModule):
    """Scores runs of one test set, whose states share the backbone's pass where they can.

    Args:
        bank: A bank of the runs' backbone; the runs' states are added under their folders.
        runs: The runs.
        kind: The kind of the task.
    """

    def __init__(self, bank: Bank, runs: Sequence[Finished], kind: TaskKind) -> None:
        super().__init__()
        self._bank, self._names = bank, [str(run.folder) for run in runs]
        for run in runs:
            bank.add(str(run.folder), run.folder)
        classes = len(runs[0].state.class_names)
        self.kind = kind
        self.figures = nn.ModuleList(kind.figures(classes) for _ in runs)
        self.losses = nn.ModuleList(Mean() for _ in runs)
        self.scores: list[dict[str, Any]] = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch by each run."""
        for part, figures, loss in zip(self._logits(batch), self.figures, self.losses, strict=True):
            figures.update(part, batch.labels, batch.weights)  # type: ignore[operator]  # a metric
            loss.update(self.kind.loss(part, batch.labels), batch.weights)  # type: ignore[operator]  # a metric

    def _logits(self, batch: Batch) -> Iterable[Tensor]:
        """Return the logits of a batch by each run; of pixels one after the other, as they share no pass."""
        if self.kind.dense:
            return (torch.stack(self._bank(batch.images, name)).float() for name in self._names)
        tasks = [name for name in self._names for _ in range(len(batch.labels))]
        logits = torch.stack(self._bank(batch.images.repeat(len(self._names), 1, 1, 1), tasks))
        return logits.float().chunk(len(self._names))

    def on_test_epoch_end(self) -> None:
        """Compute the figures of each run.

        Raises:
            UserError: The loss of a run is not finite.
        """
        for name, figures, loss in zip(self._names, self.figures, self.losses, strict=True):
            if not math.isfinite(float(loss.compute())):  # type: ignore[operator]  # a metric
                raise UserError(
                    f"{name} cannot be scored, because its loss on the test set is not finite: run it again"
                )
            self.scores.append(figures.compute())  # type: ignore[operator]  # a metric
