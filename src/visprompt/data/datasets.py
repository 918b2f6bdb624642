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

from visprompt.data.stores.ragged import RaggedStore
from visprompt.data.stores.square import SquareStore
from visprompt.data.transforms import center_crop, crop


class Batch(NamedTuple):
    """A batch of a data loader.

    Attributes:
        images: uint8 [b, c, h, w] from the loader, with 1 or 3 channels; float32 [b, 3, h, w], normalised,
            after the transfer to the device. Cached features are float32 [b, ...] from the loader on.
        labels: int64 [b], or [b, C] of 0 and 1 for multi-label data.
        rows: int64 [b], positions in the dataset.
        weights: float32 [b], the factor of each image's loss (see `GlobalBatches`); 0 for padding.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor


class Ticket(NamedTuple):
    """A request for one image of a dataset.

    Attributes:
        row: Position in the dataset.
        epoch: Training epoch, which with the row seeds the augmentation; None in evaluation.
        weight: The image's entry in `Batch.weights`.
    """

    row: int
    epoch: int | None
    weight: float


class TicketDataset(Dataset[Batch], ABC):
    """A dataset that returns a `Batch` for a list of tickets, which torch passes to `__getitems__`."""

    labels: Tensor
    """int64 [n], the label of each row, or [n, C] of 0 and 1 for multi-label data"""

    keys: Sequence[str]
    """The key of each row, the same on every machine"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, ticket: Ticket) -> Batch:
        return self.__getitems__([ticket])

    def __getitems__(self, tickets: list[Ticket]) -> Batch:
        rows = torch.tensor([ticket.row for ticket in tickets])
        weights = torch.tensor([ticket.weight for ticket in tickets], dtype=torch.float32)
        return Batch(torch.from_numpy(self.pixels(tickets)), self.labels[rows], rows, weights)

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
    """Images of one size in GPU memory; not augmented, and read in the process that copied them there."""

    def __init__(self, images: Tensor, labels: Tensor, keys: Sequence[str]) -> None:
        """Keep the tensors; they are not copied.

        Args:
            images: uint8 [n, c, h, w], on any device.
            labels: int64 [n].
            keys: One per image.
        """
        self.images, self.labels, self.keys = images, labels, keys

    def __getitems__(self, tickets: list[Ticket]) -> Batch:
        rows = torch.tensor([ticket.row for ticket in tickets])
        weights = torch.tensor([ticket.weight for ticket in tickets], dtype=torch.float32)
        return Batch(self.images[rows.to(self.images.device)], self.labels[rows], rows, weights)

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return a copy of the rows in host memory."""
        return self.__getitems__(tickets).images.cpu().numpy()

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of copies of some rows, on the same device."""
        chosen = torch.from_numpy(rows)
        images = self.images[chosen.to(self.images.device)]
        return type(self)(images, self.labels[chosen], [self.keys[row] for row in rows])


class RaggedDataset(TicketDataset):
    """Rows of a `RaggedStore`, cropped to a square: random crops in training, central crops in evaluation.

    Crop and flip are drawn from `default_rng([seed, epoch, row of the store])`: they do not depend on
    workers, devices, the order of rows, or whether a run was resumed.
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
            labels: int64 [rows of the store, ...], if they are not the store's.
        """
        self.store, self.rows, self.size, self.seed = store, rows, size, seed
        self.random_crop, self.flip = random_crop, flip
        self.keys = [store.keys[row] for row in rows]
        self.all_labels = store.labels if labels is None else labels
        self.labels = torch.from_numpy(np.asarray(self.all_labels[rows], np.int64))

    def pixels(self, tickets: list[Ticket]) -> np.ndarray:
        """Return the cropped images."""
        images = np.stack([self._view(int(self.rows[ticket.row]), ticket.epoch) for ticket in tickets])
        self.store.release()
        return images

    def subset(self, rows: np.ndarray) -> Self:
        """Return a dataset of some of these rows; each keeps its crops and flips."""
        options = {"size": self.size, "seed": self.seed, "random_crop": self.random_crop, "flip": self.flip}
        return type(self)(self.store, self.rows[rows], labels=self.all_labels, **options)  # type: ignore[arg-type]  # one type per option

    def _view(self, row: int, epoch: int | None) -> np.ndarray:
        image = self.store.image(row)
        if epoch is None:
            return center_crop(image, self.size).transpose(2, 0, 1)
        draw = np.random.default_rng([self.seed, epoch, row])
        down, right, mirror = draw.random(3)
        if self.random_crop:
            height, width = image.shape[:2]
            top, left = int(down * (height - self.size + 1)), int(right * (width - self.size + 1))
            view = crop(image, top, left, self.size)
        else:
            view = center_crop(image, self.size)
        return (view[:, ::-1] if mirror < self.flip else view).transpose(2, 0, 1)


def as_is(batch: Any) -> Any:
    """Return the batch unchanged: the collate function for datasets that return whole batches."""
    return batch
