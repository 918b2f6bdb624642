"""What training logs of an epoch: summed on the device, and read once at the epoch's end."""

import numpy as np
import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max
"""Stands for the first step with a loss that is not finite, if all losses were finite"""


class EpochSums:
    """Loss and correct images of the steps of an epoch.

    A step waits for nothing: reading a number on a GPU would make the host wait for all work before it.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._values: list[Tensor] = []

    def add(self, step: int, loss: Tensor, losses: Tensor, correct: Tensor, weights: Tensor) -> None:
        """Add a micro step.

        Args:
            step: Index of the optimiser step.
            loss: What the step minimises.
            losses: Loss of each image, [B].
            correct: 1.0 for each correctly predicted image, else 0.0, [B].
            weights: Weight of each image's loss, [B]; images of weight 0 are left out.
        """
        real = (weights > 0).float()
        self._steps.append(step)
        self._values += (loss.detach(), (losses.detach() * real).sum(), (correct * real).sum(), real.sum())

    def read(self) -> tuple[int, float, float, float]:
        """Return the first step whose loss is not finite, and the sums of losses, correct images and images.

        The sums are added in float32, in the order of the steps.
        """
        values = torch.stack(self._values).cpu().numpy().reshape(-1, 4)
        bad = np.flatnonzero(~np.isfinite(values[:, 0]))
        loss, correct, images = np.add.accumulate(values[:, 1:], axis=0, dtype=np.float32)[-1].tolist()
        return self._steps[bad[0]] if len(bad) else NEVER, loss, correct, images
