"""Write files and folders atomically, lock them, and read and write JSON records that carry a digest.

A process locks the temporary files and folders that it writes. The system releases the lock of a killed
process, so that what it left behind can be recognised and removed.
"""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from visprompt.errors import UserError

_log = logging.getLogger(__name__)
# names of the folders in which `write_atomically` writes, and of the temporary files that safetensors made in
# the run's folder in older versions
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}")
_YOUNG = 5.0  # seconds after which a new file is surely locked
_ABANDONED = (
    3600.0  # seconds without a write after which a file is abandoned, if the file system has no locks
)
_DIGEST = "digest"


def cache_folder() -> Path:
    """Return the folder of what is kept for later commands: $VISPROMPT_CACHE, else the user's cache folder.

    Raises:
        RuntimeError: There is no such folder, because the user has no home.
    """
    if given := os.environ.get("VISPROMPT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visprompt"


@contextmanager
def alone(lock_file: Path, what: str) -> Iterator[None]:
    """Hold a lock while the body runs, so that one process at a time does the same work; wait for the lock.

    Args:
        lock_file: The lock's file.
        what: The work, for the log of a process that waits: "downloading x".

    Raises:
        OSError: The lock's folder cannot be written to.
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


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a temporary file or folder while it is written, so that `sweep` leaves it alone."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: `sweep` goes by the age
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def temporary_folder(purpose: str, longest: int | None = None) -> Iterator[Path]:
    """Make a temporary folder, and remove those that killed processes left for the same purpose.

    Args:
        purpose: Part of the folder's name: "ranks" gives /tmp/visprompt-ranks-x3k9q0.
        longest: The number of bytes that the path of $TMPDIR may have; instead of a longer one /tmp is taken.
    """
    prefix, parent = f"visprompt-{purpose}-", tempfile.gettempdir()
    if longest is not None and len(os.fsencode(parent)) > longest:
        parent = "/tmp"  # the folder in it has a random name, and its owner alone may enter it
    sweep(Path(parent).glob(f"{prefix}*"))
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name, claimed(Path(name)):
        yield Path(name)


def sweep(paths: Iterable[Path]) -> None:
    """Remove the given temporary files and folders, except those that a process is still writing."""
    for path in paths:
        if not _is_abandoned(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # another user's file
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # it is gone, or another user's
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _clock(path.parent) - path.stat().st_mtime > _YOUNG
    except BlockingIOError:
        return False
    except OSError:
        return _clock(path.parent) - _last_write(path) > _ABANDONED
    finally:
        os.close(handle)


def _clock(folder: Path) -> float:
    """Return the time by the clock of a folder's file system, which may be another machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # read-only, or full
        return time.time()


def _last_write(path: Path) -> float:
    """Return when a file, or anything in a folder, was last written; infinity, if it is being renamed."""
    try:
        return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return math.inf


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears under its name only when it is complete.

    Args:
        path: The file to write; its folder is made.
        write: Writes the content to the path that it is given.

    Raises:
        UserError: The file system refuses (full disk, read-only); an earlier file at `path` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent.glob(f".{glob.escape(path.name)}.????????"))
        # a folder and not a file, because safetensors writes a second temporary file next to the first
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = folder / path.name
    try:
        with claimed(folder):
            write(temporary)
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write {path}: {error}; free some space or choose another folder with paths.log_dir=..."
    )


def publish(
    folder: Path, write: Callable[[Path], None], usable: Callable[[], bool], option: str = "store_dir"
) -> None:
    """Write a folder atomically; several processes may do so at once, and the first to finish wins.

    Args:
        folder: The folder to make; a damaged one is replaced.
        write: Fills the temporary folder that it is given.
        usable: Returns whether `folder` exists and is complete, so that it need not be replaced.
        option: The option that chooses another place for the folder, for errors.

    Raises:
        UserError: The disk is full, or the place cannot be written to.
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
    """Build the error that says why a folder cannot be written to, and which option chooses another one."""
    key = f"{option} (data.{option} in training)" if option in ("store_dir", "data_dir") else option
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk of {place} is full: free space there, or set {key} to another disk")
    where = f", {error.filename}" if error.filename and not str(error.filename).startswith(str(place)) else ""
    return UserError(
        f"cannot write to {place} ({error.strerror or error}{where}): set {key} to another folder"
    )


def _replace(temporary: Path, folder: Path, usable: Callable[[], bool]) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if usable():
            return  # another process was faster, and its folder is as good
        folder.rename(temporary / "replaced")  # the damaged folder; removed with the temporary one
        temporary.rename(folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)


class DamagedRecord(UserError):
    """A record whose file exists but cannot be trusted.

    The message names the file and the fault; the caller adds what to do about it.
    """


def file_sha256(file: Path) -> str:
    """Return the SHA-256 (hex) of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest_of(record: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of a record's canonical JSON, without its key "digest".

    Raises:
        ValueError: A number is not finite, or a value has no form in JSON.
    """
    content = {key: value for key, value in record.items() if key != _DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def record_text(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Return a record and its digest as JSON.

    Args:
        record: Content by name: {"initial": "0f3a"} gives '{"initial": "0f3a", "digest": "9c1e..."}'.
        indent: As in `json.dumps`.

    Raises:
        ValueError: A number is not finite, which JSON cannot express.
    """
    return json.dumps(dict(record) | {_DIGEST: digest_of(record)}, indent=indent, allow_nan=False) + "\n"


def write_record(path: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a record and its digest as JSON, atomically.

    Raises:
        ValueError: A number is not finite.
        UserError: The file cannot be written.
    """
    text = record_text(record, indent)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a record and compare it with its digest.

    Args:
        path: The file.

    Returns:
        The content, with "digest" if the record has one, or None if there is no such file. Records of older
        versions lack a digest, so the caller must itself check which names occur.

    Raises:
        DamagedRecord: The file cannot be read, is not JSON, holds a number that is not finite, or does not
            match its digest.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it is cut off or not JSON") from error
    if not isinstance(record, dict):
        raise DamagedRecord(f"{path} is damaged: it is not a JSON object")
    try:
        digest = digest_of(record)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it holds a number that is not finite") from error
    if _DIGEST in record and record[_DIGEST] != digest:
        raise DamagedRecord(f"{path} is damaged: it does not match its digest")
    return record
