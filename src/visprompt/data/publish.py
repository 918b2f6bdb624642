"""Folders that exist whole or not at all: written beside under a temporary name, then renamed; one maker at a time."""

import errno
import glob
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from visprompt.errors import UserError
from visprompt.leftovers import claimed, sweep

_log = logging.getLogger(__name__)


@contextmanager
def alone(lock_file: Path, what: str) -> Iterator[None]:
    """Keeps other processes from doing the same at the same time, after waiting for one that does.

    Args:
        lock_file: Held while the body runs.
        what: What is being done, for who has to wait: "downloading x".

    Raises:
        OSError: The place cannot be written.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is %s: waiting for it", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def publish(folder: Path, write: Callable[[Path], None], usable: Callable[[], bool], option: str = "store_dir") -> None:
    """Writes a folder; any number of processes may do so at once, the first that is ready wins.

    Args:
        folder: The folder to make, replacing one that is damaged.
        write: Fills the temporary folder that it is given.
        usable: Whether the folder is there and whole, so that it need not be replaced.
        option: What moves the folder elsewhere, for errors.

    Raises:
        UserError: The disk is full, or the place cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"))
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid4().hex[:12]}")
        temporary.mkdir()
    except OSError as error:
        raise explained(error, folder.parent, option) from error
    try:
        with claimed(temporary):
            write(temporary)
            _replace(temporary, folder, usable)
    except OSError as error:
        raise explained(error, folder.parent, option) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def explained(error: OSError, place: Path, option: str = "store_dir") -> UserError:
    """Says in one sentence why a place cannot be written, and which option moves it elsewhere."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {place} is full: free space there, "
            f"or set {option} (data.{option} in training) to another disk"
        )
    where = f", {error.filename}" if error.filename and not str(error.filename).startswith(str(place)) else ""
    return UserError(
        f"cannot write to {place} ({error.strerror or error}{where}): "
        f"set {option} (data.{option} in training) to another folder"
    )


def _replace(temporary: Path, folder: Path, usable: Callable[[], bool]) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if usable():
            return  # another process was faster: its folder is as good
        folder.rename(temporary / "replaced")  # damaged: it goes when the temporary folder is removed
        temporary.rename(folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)
