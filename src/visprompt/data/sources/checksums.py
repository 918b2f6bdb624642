"""Checksums of own images, stored so that unchanged files are not read again.

The checksums of a folder are stored in a JSON file with size, times and inode of each file. A file that was
replaced by one of equal size has another ctime, which no program can set. As in git, a file that changed in
the last two seconds before it was read is not stored: timestamps of file systems are too coarse.
"""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path

from visprompt.errors import UserError
from visprompt.files import write_atomically
from visprompt.machine import cores

UNREADABLE = "unreadable"
"""Stands for the checksum of a file that cannot be read; decoding reports why"""

_RECENT = 2_000_000_000  # nanoseconds
_SCHEMA = 1
_Stamp = tuple[int, int, int, int]  # size, mtime, ctime, inode


class Checksums:
    """The sha256 values of files, stored between processes."""

    def __init__(self, memory: Path | None = None) -> None:
        """Read the stored checksums.

        Args:
            memory: The JSON file; None stores nothing.
        """
        self._memory = memory
        self._known = {} if memory is None else _read(memory)
        self._new: dict[str, tuple[_Stamp, str]] = {}

    def of(self, paths: Sequence[Path]) -> list[str]:
        """Return the sha256 (hex) of each file's content; new and changed files are read in threads."""
        # network disks answer in parallel
        with ThreadPoolExecutor(min(16, 4 * cores())) as pool:
            found = list(pool.map(self._one, paths))
        self._new = {
            str(path): (stamp, checksum)
            for path, (stamp, checksum) in zip(paths, found, strict=True)
            if stamp is not None
        }
        return [checksum for _, checksum in found]

    def remember(self) -> None:
        """Store the checksums of the last call of `of`; if that fails, the files are read again next time."""
        if self._memory is not None and self._new != self._known:
            text = json.dumps({"schema": _SCHEMA, "files": self._new})
            with suppress(UserError):
                write_atomically(self._memory, lambda temporary: temporary.write_text(text))

    def _one(self, path: Path) -> tuple[_Stamp | None, str]:
        try:
            stamp = _stamp(path)
            known = self._known.get(str(path))
            if known is not None and known[0] == stamp:
                return known
            settled = time.time_ns() - max(stamp[1:3]) > _RECENT
            with path.open("rb") as file:
                checksum = file_digest(file, "sha256").hexdigest()
            return (stamp if settled and _stamp(path) == stamp else None), checksum
        except OSError:
            return None, UNREADABLE


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read(memory: Path) -> Mapping[str, tuple[_Stamp, str]]:
    """Return the stored checksums; empty where the file is missing or damaged."""
    try:
        stored = json.loads(memory.read_text())
        if stored["schema"] != _SCHEMA:
            return {}
        files = stored["files"].items()
        return {
            str(path): ((int(a), int(b), int(c), int(d)), str(text)) for path, ((a, b, c, d), text) in files
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
