"""Temporary files and folders: who writes one holds a lock on it, so that those of killed processes are known."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_YOUNG = 5.0  # seconds in which a new file may not have its lock yet
_ABANDONED = 3600.0  # seconds without a write, where the file system has no locks


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Locks a temporary file or folder while it is written; the system releases the lock of a killed process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here: the age decides
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder in the system's place for temporary files; removes those for the same purpose of killed processes.

    Args:
        purpose: Part of its name, for example "ranks".
    """
    prefix = f"visprompt-{purpose}-"
    sweep(Path(tempfile.gettempdir()).glob(f"{prefix}*"))
    with tempfile.TemporaryDirectory(prefix=prefix) as name, claimed(Path(name)):
        yield Path(name)


def sweep(paths: Iterable[Path]) -> None:
    """Removes those of some temporary files and folders that nobody writes any more."""
    for path in paths:
        if not _is_abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # somebody else's
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # it is gone, or somebody else's
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return time.time() - path.stat().st_mtime > _YOUNG
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - _last_write(path) > _ABANDONED
    finally:
        os.close(handle)


def _last_write(path: Path) -> float:
    """When something of a file or folder was last written; now, where its owner renames or removes it meanwhile."""
    try:
        return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return time.time()
