"""Files and folders that exist whole or not at all: atomic writes, locks, JSON records with a digest.

Whoever writes a temporary file or folder holds a lock on it, so that those of killed processes are known and
removed.
"""

import errno
import fcntl
import glob
import hashlib
import json
import logging
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
# where `write_atomically` writes until a file is complete; in older versions safetensors wrote beside it
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}")
_YOUNG = 5.0  # seconds in which a new file may not have its lock yet
_ABANDONED = 3600.0  # seconds without a write, where the file system has no locks
_DIGEST = "digest"


@contextmanager
def alone(lock_file: Path, what: str) -> Iterator[None]:
    """Keep other processes from doing the same at the same time, after waiting for one that does.

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


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a temporary file or folder while it is written.

    The system releases the lock of a killed process.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here: the age decides
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Return a folder in the system's place for temporary files.

    Removes those for the same purpose of killed processes.

    Args:
        purpose: Part of its name, for example "ranks".
    """
    prefix = f"visprompt-{purpose}-"
    sweep(Path(tempfile.gettempdir()).glob(f"{prefix}*"))
    with tempfile.TemporaryDirectory(prefix=prefix) as name, claimed(Path(name)):
        yield Path(name)


def sweep(paths: Iterable[Path]) -> None:
    """Remove those of some temporary files and folders that nobody writes any more."""
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
    """When something of a file or folder was last written.

    Now, where its owner renames or removes it meanwhile.
    """
    try:
        return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return time.time()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it either stands complete under its name or not at all.

    Args:
        path: The file to write; its folder is made.
        write: Writes the content to the path it is given.

    Raises:
        UserError: The file system refuses (full disk, read-only); what stood there before still stands.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent.glob(f".{glob.escape(path.name)}.????????"))
        place = Path(
            tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
        )  # safetensors writes two files there
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = place / path.name
    try:
        with claimed(place):
            write(temporary)
            temporary.chmod(0o644)  # safetensors makes files that their owner alone may read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _unwritable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write {path}: {error}; free some space or choose another folder with paths.log_dir=..."
    )


def publish(
    folder: Path, write: Callable[[Path], None], usable: Callable[[], bool], option: str = "store_dir"
) -> None:
    """Write a folder; any number of processes may do so at once, the first that is ready wins.

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
    """Say in one sentence why a place cannot be written, and which option moves it elsewhere."""
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


class DamagedRecord(UserError):
    """A record that is there and cannot be trusted.

    The message says which and why, not what to do about it.
    """


def digest_of(record: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) over the canonical JSON of a record, of which "digest" is left out.

    Raises:
        ValueError: A number is not finite, or a value is not one of JSON's.
    """
    content = {key: value for key, value in record.items() if key != _DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def record_text(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Return a record with its digest as JSON.

    Args:
        record: Content by name, for example {"initial": "0f3a"}; its names are texts.
        indent: As in `json.dumps`.

    Raises:
        ValueError: A number is not finite; JSON has no word for it.
    """
    return json.dumps(dict(record) | {_DIGEST: digest_of(record)}, indent=indent, allow_nan=False) + "\n"


def write_record(path: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Write `record_text` atomically.

    Raises:
        ValueError: A number is not finite.
        UserError: The file cannot be written.
    """
    text = record_text(record, indent)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a record and compares it with its digest.

    Args:
        path: The file.

    Returns:
        The content, with "digest" where the record has one: those of older versions have none, so that the
        caller has to know every name that may occur. None where there is no such file.

    Raises:
        DamagedRecord: The file cannot be read, is no JSON, holds a number that is not finite, or is not what
            its digest says.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedRecord(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it is cut or no JSON") from error
    if not isinstance(record, dict):
        raise DamagedRecord(f"{path} is damaged: it is no JSON object")
    try:
        digest = digest_of(record)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it holds a number that is not finite") from error
    if _DIGEST in record and record[_DIGEST] != digest:
        raise DamagedRecord(f"{path} is damaged: it is not what its digest says")
    return record
