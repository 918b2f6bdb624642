"""What stays from epoch to epoch and from run to run of a process.

Frozen layers' output, and pixels on a GPU.
"""

import logging
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visprompt.data.datasets import ArrayDataset, DeviceDataset, SquareDataset, Ticket, TicketDataset

_log = logging.getLogger(__name__)
_outputs: OrderedDict[Hashable, np.ndarray] = OrderedDict()
_pixels: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()
_AT_ONCE = 1000  # images copied to a GPU
_SETS = 2  # of a grid: what is trained on, and what is scored


def keep(parts: Iterator[Tensor], count: int, copies: int = 1, key: Hashable = None) -> np.ndarray | None:
    """Put batches together, in memory, or in a file where they are large.

    Args:
        parts: float32 [b, ...], the rows in order; not looked at further where there is no room, or where
            those of an earlier call with the same key begin with the same bits.
        count: Number of all rows.
        copies: Processes of this machine that keep them all.
        key: What the rows are, but for the weights of the layers that made them; None is never found again.

    Returns:
        float32 [count, ...]; None, and a line that says so, where neither memory nor disk has room.
    """
    first = next(parts)
    known = _outputs.get(key)
    if known is not None and np.array_equal(known[: len(first)], first.numpy()):
        _outputs.move_to_end(key)
        return known
    _make_room(_outputs)
    shape = (count, *first.shape[1:])
    size = 4 * int(np.prod(shape))
    if copies * size < _free_memory() / 4:
        array = np.empty(shape, np.float32)
    elif copies * size < shutil.disk_usage(tempfile.gettempdir()).free / 2:
        with tempfile.TemporaryFile() as file:  # it has no name: its space is freed with the mapping
            array = np.memmap(file, np.float32, "w+", shape=shape)
    else:
        _log.warning(
            "the frozen blocks run in every epoch: their output, %.1f GB, has no room in memory or on disk",
            size / 1e9,
        )
        return None
    start = 0
    for part in chain([first], parts):
        array[start : start + len(part)] = part.numpy()
        start += len(part)
    if key is not None:
        _outputs[key] = array
    return array


def has_own_memory(device: torch.device) -> bool:
    """Return whether pixels have to be copied to a device before every step."""
    return device.type == "cuda"


def on_device(dataset: TicketDataset, device: torch.device, key: tuple[Hashable, ...]) -> TicketDataset:
    """Move the pixels of equal images to a GPU where they take less than a quarter of its free memory.

    Args:
        dataset: What is to be read in every epoch.
        device: Where it is wanted.
        key: Whose and what the pixels are; those of an earlier call with the same key are taken again.

    Returns:
        The data set there; itself where its images are not of one size, or there is no room.
    """
    if not isinstance(dataset, ArrayDataset | SquareDataset):
        return dataset
    if key in _pixels:
        _pixels.move_to_end(key)
        return DeviceDataset(_pixels[key], dataset.labels, dataset.keys)
    _make_room(_pixels)
    first = _images(dataset, range(1))
    if first.nbytes * len(dataset) > _free_on(device) / 4:
        return dataset
    images = torch.empty((len(dataset), *first.shape[1:]), dtype=first.dtype, device=device)
    for start in range(0, len(dataset), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(dataset)))
        images[start : rows.stop] = _images(dataset, rows).to(device)
    _pixels[key] = images
    return DeviceDataset(images, dataset.labels, dataset.keys)


def release_pixels(owner: Hashable) -> None:
    """Give back the pixels on a GPU whose key does not begin with `owner`.

    A run's memory is to be its own.
    """
    for key in [key for key in _pixels if key[0] != owner]:
        del _pixels[key]


def _images(dataset: TicketDataset, rows: range) -> Tensor:
    return torch.from_numpy(dataset.pixels([Ticket(row, None, 1.0) for row in rows]))


def _make_room(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) >= _SETS:
        kept.popitem(last=False)


def _free_on(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration, ValueError):  # elsewhere than on Linux
        return 2**31
