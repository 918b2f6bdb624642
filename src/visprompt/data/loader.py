"""The data loader of images that lie in one tensor, in memory or on a GPU."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visprompt.data.datasets import ArrayDataset, Batch, DeviceDataset
from visprompt.data.sampler import GlobalBatches, Share


class GatheringLoader(DataLoader[Batch]):
    """Gathers each batch from one tensor, on its device.

    Rows, labels and weights of all batches of an epoch are copied to the device at its start, so that a step
    waits for no copy and makes no Python object for each image. Batches of images in memory can be gathered
    in page-locked memory, from which a copy to a GPU does not wait either.
    """

    def __init__(
        self, dataset: ArrayDataset | DeviceDataset, batches: GlobalBatches, pin_memory: bool = False
    ) -> None:
        """Take a dataset that does not augment, and its batches.

        Args:
            dataset: The images.
            batches: Which images each batch has.
            pin_memory: Whether batches of images in memory are in page-locked memory, which needs a GPU.
        """
        # the generator is never used; without it, each epoch would draw from the global one, as dropout does
        super().__init__(dataset, batch_sampler=batches, generator=torch.Generator())
        images = dataset.images
        self._images = images if isinstance(images, Tensor) else torch.from_numpy(images)
        self._labels, self._batches = dataset.labels, batches
        self._pins = pin_memory and self._images.device.type == "cpu"

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # not the base class of torch's iterators
        """Yield the batches of an epoch."""
        batches, device = self._batches, self._images.device
        shares = list(batches.shares(batches.epoch() if batches.training else None))
        columns = (np.concatenate(column) for column in zip(*shares, strict=True))
        whole = Share(*columns)
        rows = torch.from_numpy(whole.rows)
        weights, scales = torch.from_numpy(whole.weights).float(), torch.from_numpy(whole.scales).float()
        sizes = [len(share.rows) for share in shares]
        parts = (
            (_pinned(tensor) if self._pins else tensor.to(device)).split(sizes)
            for tensor in (self._labels.index_select(0, rows), rows, weights, scales)
        )
        for labels, chosen, *numbers in zip(*parts, strict=True):
            yield Batch(self._gathered(chosen), labels, chosen, *numbers)

    def _gathered(self, rows: Tensor) -> Tensor:
        """Return the images [n, ...] of rows [n]."""
        if not self._pins:
            return self._images.index_select(0, rows)
        # PyTorch keeps the buffer of a batch until its copy has ended, and then gives it to a later batch
        images = _empty_pinned((len(rows), *self._images.shape[1:]), self._images.dtype)
        return torch.index_select(self._images, 0, rows, out=images)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()


def _empty_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)
