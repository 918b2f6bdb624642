"""Decoded images as tensors: map-style datasets that return a whole batch for a list of tickets.

The batch sampler (`sampler.GlobalBatches`) yields lists of tickets: rows with an epoch and a weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from visprompt.data.augment import Augmentation
from visprompt.data.stores.ragged import RaggedStore
from visprompt.data.stores.square import SquareStore
from visprompt.data.transforms import center_crop, crop


class Batch(NamedTuple):
    """A batch of a data loader.

    Attributes:
        images: uint8 [b, c, h, w] from the loader, with 1 or 3 channels; float32 [b, 3, h, w], normalised,
            after the transfer to the device. Cached features are float32 [b, ...] from the loader on.
        labels: int64 [b], [b, C] of 0 and 1 for multi-label data, or [b, h, w] of pixels.
        rows: int64 [b], positions in the dataset.
        weights: float32 [b], the factor of each image's loss (see `GlobalBatches`); 0 for padding.
        scales: float32 [b], the factor of the task's part of that loss under class weights (see
            `GlobalBatches`); None is 1.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor
    scales: Tensor | None = None


class Ticket(NamedTuple):
    """A request for one image of a dataset.

    Attributes:
        row: Position in the dataset.
        epoch: Training epoch, which with the row seeds the augmentation; None in evaluation.
        weight: The image's entry in `Batch.weights`.
        scale: The image's entry in `Batch.scales`.
        repeat: How often the row was drawn before in this epoch, so that each time has its own augmentation.
    """

    row: int
    epoch: int | None
    weight: float
    scale: float = 1.0
    repeat: int = 0

    def draw(self, seed: int, row: int) -> np.random.Generator:
        """Return the generator of this image's augmentation.

        It depends on nothing but the seed, the epoch, the row and the repetition: not on workers, devices,
        the order of rows, or whether a run was resumed.

        Args:
            seed: Seed of the run.
            row: The row by which the image is identified, of a store for example.
        """
        again = [self.repeat] if self.repeat else []
        return np.random.default_rng([seed, self.epoch or 0, row, *again])


class TicketDataset(Dataset[Batch], ABC):
    """A dataset that returns a `Batch` for a list of tickets, which torch passes to `__getitems__`."""

    labels: Tensor
    """int64 [n], the label of each row, or [n, C] of 0 and 1 for multi-label data"""

    keys: Sequence[str]
    """The key of each row, the same on every machine"""

    one_by_one: bool = False
    """Whether images differ in size in evaluation, so that a batch has one of them"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, ticket: Ticket) -> Batch:
        return self.__getitems__([ticket])

    def __getitems__(self, tickets: list[Ticket]) -> Batch:
        return self._batch(torch.from_numpy(self.pixels(tickets)), tickets)

    def _batch(self, images: Tensor, tickets: list[Ticket]) -> Batch:
        rows = torch.tensor([ticket.row for ticket in tickets])
        weights = torch.tensor([ticket.weight for ticket in tickets], dtype=torch.float32)
        scales = torch.tensor([ticket.scale for ticket in tickets], dtype=torch.float32)
        return Batch(images, self.labels[rows], rows, weights, scales)

    @abstractmethod
    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return a copy of the images of the tickets, uint8 [b, c, h, w]."""

    @abstractmethod
    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of some rows, int64 [n], in the given order."""


class ArrayDataset(TicketDataset):
    """Images of one size in an array in memory; not augmented."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, keys: Sequence[str]) -> None:
        """Keep the arrays; they are not copied.

        Args:
            images: uint8 [n, 3, h, w], or float32 [n, ...] for cached features.
            labels: int64 [n].
            keys: One per image.
        """
        self.images, self.keys = images, keys
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return a copy of the rows."""
        return np.asarray(self.images[[ticket.row for ticket in tickets]])

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of copies of some rows."""
        return type(self)(self.images[rows], self.labels.numpy()[rows], [self.keys[row] for row in rows])


class SquareDataset(TicketDataset):
    """Rows of a `SquareStore`, read through its memory map; not augmented."""

    def __init__(self, store: SquareStore, rows: np.ndarray, task: str) -> None:
        """Select rows of a store; no image is read yet.

        Args:
            store: The decoded images.
            rows: int64 [n], the rows of the store, in the order of this dataset.
            task: Task whose labels are used.
        """
        self.store, self.rows, self.task = store, rows, task
        self.keys = [store.keys[row] for row in rows]
        self.labels = torch.from_numpy(np.asarray(store.labels[task][rows], np.int64))

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return a copy of the images."""
        return self.store.take(self.rows[[ticket.row for ticket in tickets]])

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of some of these rows."""
        return type(self)(self.store, self.rows[rows], self.task)


class DeviceDataset(TicketDataset):
    """Images of one size, or outputs of frozen layers, in one tensor on any device; not augmented."""

    def __init__(self, images: Tensor, labels: Tensor, keys: Sequence[str]) -> None:
        """Keep the tensors; they are not copied.

        Args:
            images: uint8 [n, c, h, w], or float32 [n, ...] for outputs of frozen layers.
            labels: int64 [n].
            keys: One per image.
        """
        self.images, self.labels, self.keys = images, labels, keys

    def __getitems__(self, tickets: list[Ticket]) -> Batch:
        rows = torch.tensor([ticket.row for ticket in tickets], device=self.images.device)
        return self._batch(self.images[rows], tickets)

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return a copy of the rows in host memory."""
        return self.__getitems__(tickets).images.cpu().numpy()

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of copies of some rows, on the same device."""
        chosen = torch.from_numpy(rows)
        images = self.images[chosen.to(self.images.device)]
        return type(self)(images, self.labels[chosen], [self.keys[row] for row in rows])


class AugmentedDataset(TicketDataset):
    """Images of one size, augmented in training: random crops and changes, but no flips."""

    def __init__(
        self, dataset: TicketDataset, augmentation: Augmentation, seed: int, rows: np.ndarray | None = None
    ) -> None:
        """Keep the images and the augmentation.

        Args:
            dataset: The images, not augmented.
            augmentation: What changes them.
            seed: Seed of the changes.
            rows: int64 [n], by which images are identified in the draw; None numbers them.
        """
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self.labels, self.keys = dataset.labels, dataset.keys
        self.rows = np.arange(len(dataset)) if rows is None else rows

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return a copy of the images, changed if their tickets are for training."""
        images = self.dataset.pixels(tickets)
        for place, ticket in enumerate(tickets):
            if ticket.epoch is not None:
                draw = ticket.draw(self.seed, int(self.rows[ticket.row]))
                images[place] = self._view(images[place], draw)
        return images

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of some of these rows; each keeps its changes."""
        return type(self)(self.dataset.subset(rows), self.augmentation, self.seed, self.rows[rows])

    def _view(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        if self.augmentation.resizes:
            image = self.augmentation.cropped(image, (image.shape[1], image.shape[2]), draw)
        return self.augmentation.changed(image, draw)


class RaggedDataset(TicketDataset):
    """Rows of a `RaggedStore`, cropped to a square: random crops in training, central crops in evaluation.

    Crops, flips and further changes are drawn from `Ticket.draw` with the row of the store.
    """

    def __init__(
        self,
        store: RaggedStore,
        rows: np.ndarray,
        *,
        size: int,
        seed: int,
        random_crop: bool,
        flip: float,
        augmentation: Augmentation | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        """Select rows of a store.

        Args:
            store: Decoded images whose short side is at least `size`.
            rows: int64 [n], the rows of the store, in the order of this dataset.
            size: Height and width of the crop in pixels.
            seed: Seed of crops and flips.
            random_crop: Whether training crops are random; otherwise they are central.
            flip: Probability of a horizontal flip in training.
            augmentation: What else is changed in training, and how large random crops are; None for no more.
            labels: int64 [rows of the store, ...], if they are not the store's.
        """
        self.store, self.rows, self.size, self.seed = store, rows, size, seed
        self.random_crop, self.flip, self.augmentation = random_crop, flip, augmentation
        self.keys = [store.keys[row] for row in rows]
        self.all_labels = store.labels if labels is None else labels
        self.labels = torch.from_numpy(np.asarray(self.all_labels[rows], np.int64))

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return the cropped images."""
        images = np.stack([self._view(ticket) for ticket in tickets])
        self.store.release()
        return images

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of some of these rows; each keeps its crops and flips."""
        return type(self)(
            self.store,
            self.rows[rows],
            size=self.size,
            seed=self.seed,
            random_crop=self.random_crop,
            flip=self.flip,
            augmentation=self.augmentation,
            labels=self.all_labels,
        )

    def _view(self, ticket: Ticket) -> np.ndarray:
        row = int(self.rows[ticket.row])
        image = self.store.image(row)
        if ticket.epoch is None:
            return center_crop(image, self.size).transpose(2, 0, 1)
        draw = ticket.draw(self.seed, row)
        down, right, mirror = draw.random(3)
        if not self.random_crop:
            view = center_crop(image, self.size).transpose(2, 0, 1)
        elif self.augmentation is not None and self.augmentation.resizes:
            view = self.augmentation.cropped(image.transpose(2, 0, 1), (self.size, self.size), draw)
        else:
            height, width = image.shape[:2]
            top, left = int(down * (height - self.size + 1)), int(right * (width - self.size + 1))
            view = crop(image, top, left, self.size).transpose(2, 0, 1)
        view = view[:, :, ::-1] if mirror < self.flip else view
        return view if self.augmentation is None else self.augmentation.changed(view, draw)


def as_is(batch: Any) -> Any:
    """Return the batch unchanged: the collate function for datasets that return whole batches."""
    return batch
