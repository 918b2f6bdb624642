"""A memory-mapped file that is compared with its checksums and does not count as memory of the process.

There is one SHA-256 per chunk of `CHUNK` bytes. A chunk is compared when it is first read in a process, and
never again there, however often the file is opened; forked processes share which chunks were compared.
SHA-256 has hardware support (1.4 GB/s on one core, BLAKE2b 0.7, CRC-32 3.3).
"""

import mmap
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.errors import UserError

CHUNK = 4 * 2**20
# (file, checksums) -> a byte per chunk, 1 where it was compared
_compared: dict[tuple[object, ...], mmap.mmap] = {}


def checksums(path: Path) -> list[str]:
    """Return the sha256 (hex) of each chunk of a file."""
    with path.open("rb") as file:
        return [sha256(chunk).hexdigest() for chunk in iter(lambda: file.read(CHUNK), b"")]


class MappedFile:
    """A file that is mapped when it is first read.

    A copy that is pickled for a worker holds path and checksums and maps the file again. `release` returns
    the pages that were read: they stay in the system's page cache but no longer count as memory of this
    process.
    """

    def __init__(self, path: Path, recorded: Sequence[str] | None = None) -> None:
        """Keep the path; the file is opened when it is first read.

        Args:
            path: The file, not empty.
            recorded: Its `checksums`; None for a store of an older version, which is read unchecked.
        """
        self.path, self.recorded = path, recorded
        self._map: mmap.mmap | None = None
        self._bytes = np.empty(0, np.uint8)
        self._flags: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "recorded": self.recorded,
            "_map": None,
            "_bytes": np.empty(0),
            "_flags": None,
        }

    @property
    def bytes(self) -> np.ndarray:
        """Return the content, uint8 [size], read-only; call `compare` before reading from it."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._flags = self._shared_flags(os.fstat(file.fileno()))
            self._bytes = np.frombuffer(self._map, np.uint8)
        return self._bytes

    def _shared_flags(self, stat: os.stat_result) -> mmap.mmap | None:
        if self.recorded is None:
            return None
        key = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size, hash(tuple(self.recorded)))
        if key not in _compared:
            _compared[key] = mmap.mmap(-1, len(self.recorded))  # anonymous memory, shared with forked workers
        return _compared[key]

    def compare(self, start: int, stop: int) -> None:
        """Compare the chunks of some bytes with their checksums, unless this process has done so before.

        Args:
            start: The first byte to be read.
            stop: The byte after the last one.

        Raises:
            UserError: A chunk has changed since the store was made.
        """
        flags = self._flags
        if flags is None:
            return
        for chunk in range(start // CHUNK, (stop - 1) // CHUNK + 1):
            if not flags[chunk]:
                if self._differs(chunk):
                    raise UserError(
                        f"the store {self.path.parent} is damaged, {self.path.name} is not what its "
                        "checksums say: "
                        "delete that folder and run the same command, which writes it again from the "
                        "original files"
                    )
                flags[chunk] = 1

    def damaged(self) -> int:
        """Compare the whole file again and return the number of chunks that differ."""
        return sum(self._differs(chunk) for chunk in range(len(self.recorded or ())))

    def _differs(self, chunk: int) -> bool:
        assert self.recorded is not None
        content = self.bytes[chunk * CHUNK : (chunk + 1) * CHUNK]
        differs = sha256(content.data).hexdigest() != self.recorded[chunk]
        self.release()  # or a batch of scattered rows would keep a chunk in memory for each
        return differs

    def release(self) -> None:
        """Return the pages to the system; arrays made from `bytes` stay valid."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
