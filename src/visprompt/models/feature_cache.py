"""Caches of frozen layers' outputs, and of pixels on a GPU, for all epochs and runs of a process."""

import logging
import math
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visprompt.data.datasets import ArrayDataset, DeviceDataset, SquareDataset, Ticket, TicketDataset
from visprompt.machine import free_memory

_log = logging.getLogger(__name__)
_outputs: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()
_pixels: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()
_CHUNK = 1000  # images copied to a GPU at once
_SETS = 2  # entries of each cache: a grid needs the images it trains on and those it scores


def keep(
    parts: Iterator[Tensor], count: int, copies: int = 1, key: tuple[Hashable, ...] | None = None
) -> Tensor | None:
    """Concatenate batches into one tensor: on their device, in memory, or mapped from a temporary file.

    The first of these places that has room is taken. A tensor that an earlier call stored under the same key
    is returned, if its first batch is bit-equal.

    Args:
        parts: Batches of rows in order, float32 [b, ...]. Only the first is read if the tensor is in the
            cache or there is no room.
        count: Number of all rows.
        copies: Number of processes on this machine that store the tensor.
        key: The owner, then what identifies the rows, except for the weights of the layers that computed
            them; None is not cached.

    Returns:
        float32 [count, ...]; None, with a warning in the log, if no place has room.
    """
    first = next(parts)
    cached = None if key is None else _outputs.get(key)
    if key is not None and cached is not None and torch.equal(cached[: len(first)], first.to(cached.device)):
        _outputs.move_to_end(key)
        return cached
    _make_room(_outputs)
    shape = (count, *first.shape[1:])
    size = 4 * math.prod(shape)
    if has_own_memory(first.device) and size < free_on(first.device) / 4:
        rows = torch.empty(shape, device=first.device)
    elif copies * size < free_memory() / 4:
        rows = torch.empty(shape)
    elif copies * size < shutil.disk_usage(tempfile.gettempdir()).free / 2:
        with tempfile.TemporaryFile() as file:  # without a name, so the mapping's end frees its space
            rows = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
    else:
        _log.warning(
            "the frozen blocks run in every epoch: their output, %.1f GB, has no room in memory or on disk",
            size / 1e9,
        )
        return None
    start = 0
    for part in chain([first], parts):
        rows[start : start + len(part)] = part
        start += len(part)
    if key is not None:
        _outputs[key] = rows
    return rows


def has_own_memory(device: torch.device) -> bool:
    """Return whether a device has separate memory, to which pixels must be copied before every step."""
    return device.type == "cuda"


def on_device(dataset: TicketDataset, device: torch.device, key: tuple[Hashable, ...]) -> TicketDataset:
    """Copy pixels to a GPU if all images have one size and take less than a quarter of its free memory.

    Args:
        dataset: The images that are read in every epoch.
        device: The GPU.
        key: The owner, then what identifies the pixels; pixels of an earlier call with the same key are
            reused.

    Returns:
        The data set on the GPU; `dataset` itself if its images have several sizes or there is no room.
    """
    if not isinstance(dataset, ArrayDataset | SquareDataset):
        return dataset
    if key in _pixels:
        _pixels.move_to_end(key)
        return DeviceDataset(_pixels[key], dataset.labels, dataset.keys)
    _make_room(_pixels)
    first = _images(dataset, range(1))
    if first.nbytes * len(dataset) > free_on(device) / 4:
        return dataset
    images = torch.empty((len(dataset), *first.shape[1:]), dtype=first.dtype, device=device)
    for start in range(0, len(dataset), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(dataset)))
        images[start : rows.stop] = _images(dataset, rows).to(device)
    _pixels[key] = images
    return DeviceDataset(images, dataset.labels, dataset.keys)


def release(owner: Hashable) -> None:
    """Free what other owners have on a GPU, so that it does not count as a run's memory."""
    for key in [key for key in _pixels if key[0] != owner]:
        del _pixels[key]
    for key in [key for key, rows in _outputs.items() if key[0] != owner and has_own_memory(rows.device)]:
        del _outputs[key]


def _images(dataset: TicketDataset, rows: range) -> Tensor:
    return torch.from_numpy(dataset.pixels([Ticket(row, None, 1.0) for row in rows]))


def _make_room(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) >= _SETS:
        cache.popitem(last=False)


def free_on(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of this machine."""
    return torch.cuda.mem_get_info(device)[0] if has_own_memory(device) else free_memory()
