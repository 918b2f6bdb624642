"""Train many points of a grid at once: one small head on frozen outputs, with K settings of its training.

A head on cached features does not fill a device: most of a step is overhead. The points of a grid that differ
in learning rate, weight decay or seed have parameters of the same shapes, so they are stacked and trained as
one batched problem:

    outputs of frozen layers [N, ...], computed once        rows of a step [S, B], for each of S seeds
    logits [K, B, C] = classifier(parameters [K, ...], outputs[rows])
    loss = sum over points of the loss of each            so its gradient by parameters[k] is that of k alone

Each point has its own parameters, order of images, dropout, state of the optimiser, and divergence. What is
not finite in one point reaches no other: no operation sums over points except that of the losses, whose
gradient does not depend on them. The numbers are those of single runs up to rounding.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from visprompt.data.datasets import Batch
from visprompt.data.sampler import GlobalBatches
from visprompt.models.epoch_sums import NEVER
from visprompt.models.objective import Objective
from visprompt.models.stacked_classifier import DropoutStreams, StackedClassifier
from visprompt.models.stacked_optim import StackedOptimizer

_HELD = 2**24  # logits that are held before they are scored


@dataclass(frozen=True)
class Images:
    """The images of a split set.

    Attributes:
        outputs: Their frozen outputs, float32 [n, ...], on the device of the training.
        labels: [n], or [n, C] for several classes, on the same device.
    """

    outputs: Tensor
    labels: Tensor


@dataclass
class Scored:
    """The figures of a point's scoring, as `TuningModule` has them; their meaning is documented there."""

    scores: dict[str, float] = field(default_factory=dict)
    per_class: list[float | None] = field(default_factory=list)
    confusion: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    scored_loss: float = math.nan


@dataclass(frozen=True)
class _Order:
    """The rows of an epoch for each of S seeds, with weights and scales as `Batch` has them; each [S, N]."""

    rows: Tensor
    weights: Tensor
    scales: Tensor


class StackedTraining:
    """Trains a stack.

    Args:
        classifier: The stack.
        optimizer: Its optimiser.
        objective: The loss; that of any point, because they do not mix images.
        images: The training images.
        batches: A sampler for each of S seeds.
        seeds: The seed of each sampler.
        seed_of: For each point the index of its seed, [K].
        autocast: Returns the context of a forward pass.

    Attributes:
        steps: Optimiser steps so far.
        bad_step: The first step of each point at which its loss was not finite, int64 [K], else `NEVER`.
    """

    def __init__(
        self,
        classifier: StackedClassifier,
        optimizer: StackedOptimizer,
        objective: Objective,
        images: Images,
        batches: Sequence[GlobalBatches],
        seeds: Sequence[int],
        seed_of: Sequence[int],
        autocast: Any = nullcontext,
    ) -> None:
        self.classifier, self.optimizer, self.objective, self.images = (
            classifier,
            optimizer,
            objective,
            images,
        )
        self._batches, self._autocast = batches, autocast
        device = images.outputs.device
        self._seed_of = torch.tensor(seed_of, device=device)
        self._streams = DropoutStreams(seeds, device)
        self._figures: list[Metric] = []
        self.steps = 0
        self.bad_step = torch.full((classifier.count,), NEVER, device=device)
        self._forget()

    def _forget(self) -> None:
        """Start the figures of an epoch."""
        zeros = torch.zeros(self.classifier.count, device=self.images.outputs.device)
        self._loss, self._hits, self._count = zeros, zeros.clone(), zeros.clone()

    def epoch(self, epoch: int) -> list[dict[str, float]]:
        """Train an epoch; return what a run logs after it, for each point."""
        kind = self.objective.kind
        self.classifier.train()
        self._streams.restart(epoch)
        self._forget()
        order = self._order(epoch)
        size, count = self._batches[0].batch_size, order.rows.shape[1]
        for start in range(0, count, size):
            self._step(*(part[:, start : start + size] for part in (order.rows, order.weights, order.scales)))
        loss, share = ((total / self._count).tolist() for total in (self._loss, self._hits))
        # a run logs numbers of single precision
        rates = self.optimizer.rates.float().tolist()
        return [
            {"lr": rate, f"train/{kind.hit}": right, "train/loss": value}
            for rate, right, value in zip(rates, share, loss, strict=True)
        ]

    def _order(self, epoch: int) -> _Order:
        device = self.images.outputs.device
        columns = [
            [np.concatenate(column) for column in zip(*sampler.shares(epoch), strict=True)]
            for sampler in self._batches
        ]
        rows, weights, scales, _ = (
            torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)
        )
        return _Order(rows.to(device), weights.float().to(device), scales.float().to(device))

    def _step(self, rows: Tensor, weights: Tensor, scales: Tensor) -> None:
        """Take a step; rows, weights and scales are [S, B]."""
        outputs = self.images.outputs[rows]
        if len(rows) > 1:
            outputs = outputs[self._seed_of]
        with self._autocast():
            logits = self.classifier(outputs, self._masks(rows.shape[1])).float()
        points, size = logits.shape[:2]
        own, weights = rows[self._seed_of].flatten(), weights[self._seed_of]
        labels = self.images.labels[own]
        flat = Batch(logits, labels, own, weights.flatten(), scales[self._seed_of].flatten())
        losses = self.objective.loss(logits.flatten(0, 1), flat, labels, None).unflatten(0, (points, size))
        loss = (losses * weights).sum(1)
        gradients = torch.autograd.grad(loss.sum(), list(self.classifier.parameters.values()))
        self.optimizer.step(gradients)
        finite = loss.detach().isfinite()
        self.bad_step = torch.minimum(self.bad_step, torch.where(finite, NEVER, self.steps))
        real = (weights > 0).float()
        hits = self.objective.correct(logits.detach().flatten(0, 1), flat, labels, None)
        self._loss = self._loss + (losses.detach() * real).sum(1)
        self._hits = self._hits + (hits.unflatten(0, (points, size)) * real).sum(1)
        self._count = self._count + real.sum(1)
        self.steps += 1

    def _masks(self, size: int) -> list[Tensor]:
        """Return the factors of dropout of a step, in the type that the head computes in."""
        rates, device = self.classifier.dropout, self.images.outputs.device.type
        if not rates:
            return []
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        shape = (size, self.images.outputs.shape[1])
        return [mask[self._seed_of] for mask in self._streams.draw(shape, dtype, rates)]

    def score(self, stage: str, images: Iterable[Images], points: Sequence[int]) -> list[Scored]:
        """Score images without changing anything; return the figures of some points.

        Args:
            stage: "val" or "test", with which the names of the figures begin.
            images: The images, in parts that fit into memory.
            points: The points.
        """
        kind, classes = self.objective.kind, self.objective.num_classes
        while len(self._figures) < self.classifier.count:  # to build one takes longer than to use it
            self._figures.append(kind.figures(classes))
        total, count = torch.zeros(self.classifier.count), 0
        for logits, labels in self.logits(images):
            ones = torch.ones(len(labels))
            losses = kind.loss(logits.flatten(0, 1), labels.repeat(len(logits), *(1,) * (labels.ndim - 1)))
            for part in losses.unflatten(0, logits.shape[:2]).split(self._batches[0].batch_size, 1):
                total += part.sum(1)  # batch by batch, as a run sums
            count += len(labels)
            for point in points:
                self._figures[point].update(logits[point], labels, ones)
        return [_scored(stage, self._figures[point], float(total[point] / count)) for point in points]

    @torch.no_grad()
    def logits(self, images: Iterable[Images]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [K, n, C] in evaluation mode with labels [n], on the CPU, in parts."""
        self.classifier.train(False)
        held: list[tuple[Tensor, Tensor]] = []
        for part in images:
            size = self._batches[0].batch_size
            for x, labels in zip(part.outputs.split(size), part.labels.split(size), strict=True):
                with self._autocast():
                    held.append((self.classifier(x[None]).float().cpu(), labels.cpu()))
                if sum(own.numel() for own, _ in held) >= _HELD:
                    yield _joined(held)
                    held = []
        if held:
            yield _joined(held)
        self.classifier.train()


def _joined(held: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([logits for logits, _ in held], 1), torch.cat([labels for _, labels in held])


def _scored(stage: str, figures: Metric, loss: float) -> Scored:
    values = figures.compute()
    figures.reset()
    per_class, confusion = values.pop("per_class"), values.pop("confusion")
    return Scored({f"{stage}/{name}": value for name, value in values.items()}, per_class, confusion, loss)
