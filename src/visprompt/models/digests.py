"""Digests of files of weights, computed once for each file and machine.

A digest is kept in `digests.json` of the folder $VISPROMPT_CACHE, else of `visprompt` in the user's cache
folder ($XDG_CACHE_HOME, else ~/.cache), with what the file system says of the file: path, size, inode, and
the times of its last change. If any of these differs, the file is read again. The digest of a file that was
changed a moment ago is not kept, because a second change within the resolution of the file system's clock
would not be seen. A cache that cannot be read or written is left out.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from visprompt.errors import UserError
from visprompt.files import cache_folder, file_sha256, write_atomically

_log = logging.getLogger(__name__)
_SETTLED = 2.0  # seconds without a change
_MOST = 1000  # digests that are kept
_DIGITS = 64  # hexadecimal digits of a SHA-256


def digest_once(file: Path, what: str, compute: Callable[[], str], before: str | None = None) -> str:
    """Return the known digest of something that a file alone decides, or compute and keep it.

    Args:
        file: The file.
        what: What is computed of it, with all else that decides it.
        compute: Returns the digest, 64 hexadecimal digits.
        before: What `state_of` said of the file before it was read; None if `compute` reads it.
    """
    before = state_of(file) if before is None else before
    key = hashlib.sha256(f"{what}\n{before}".encode()).hexdigest()
    known = _read()
    if before and state_of(file) == before and (digest := known.get(key)):
        return digest
    digest = compute()
    if before and state_of(file) == before and time.time() - _changed(file) > _SETTLED:
        kept = dict([*_read().items(), (key, digest)][-_MOST:])
        try:
            write_atomically(_place(), lambda path: path.write_text(json.dumps(kept), encoding="utf-8"))
        except (UserError, RuntimeError) as error:  # RuntimeError: there is no home
            _log.debug("%s", error)
    return digest


def file_digest(file: Path) -> str:
    """Return the SHA-256 (hex) of a file's content."""
    return digest_once(file, "content", lambda: file_sha256(file))


def state_of(file: Path) -> str:
    """Return what the file system says of a file, as text; "" if it says nothing."""
    try:
        path = file.resolve()
        stat = path.stat()
    except OSError:
        return ""
    return f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"


def _changed(file: Path) -> float:
    """Return when a file, or its name, was changed last, in seconds since 1970."""
    stat = file.stat()
    return max(stat.st_mtime, stat.st_ctime)


def _place() -> Path:
    return cache_folder() / "digests.json"


def _read() -> dict[str, str]:
    try:
        known = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    if not isinstance(known, dict):
        return {}
    return {str(key): value for key, value in known.items() if _is_digest(value)}


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == _DIGITS and set(value) <= set("0123456789abcdef")
