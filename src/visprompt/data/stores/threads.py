"""Decoding in threads: Pillow, OpenCV and torch release the interpreter lock."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from visprompt.machine import cores

_CHUNK = 64  # images that are decoded ahead of the writer, to limit memory
X = TypeVar("X")
Y = TypeVar("Y")


def in_threads(work: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """Yield the result of each item, in order, computed in threads."""
    stream = iter(items)
    with ThreadPoolExecutor(min(16, cores())) as pool:
        while chunk := list(islice(stream, _CHUNK)):
            yield from pool.map(work, chunk)
