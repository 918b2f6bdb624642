"""Raw files: downloaded with resume, compared with the catalog once, and remembered as checked.

Next to a file `<name>` there may be `<name>.part` and `<name>.part.json` (an unfinished download),
`<name>.lock` (held by the process that downloads) and, one per folder, `checksums.json` (the files that were
checked). A file under its final name is always complete.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import requests
from filelock import FileLock
from requests.adapters import HTTPAdapter
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from visprompt.data.catalog.task import SourceFile, in_bytes
from visprompt.errors import UserError
from visprompt.files import alone
from visprompt.text import Terminal

_TRIES = 4
RETRY = Retry(
    total=_TRIES - 1,
    backoff_factor=2.5,  # pauses of 0, 5 and 10 seconds
    status_forcelist=(408, 425, 429, 500, 502, 503, 504),
    raise_on_status=False,
    respect_retry_after_header=False,  # a server could ask for hours
)
"""Tries of one url; they start again after each connection that brought new bytes"""

_TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 1 << 20
_HEADERS = {
    "User-Agent": "visprompt (data preparation; python-requests)",
    "Accept-Encoding": "identity",  # the bytes of the file, not compressed ones
}
_log = logging.getLogger(__name__)


class _Interrupted(Exception):
    """A connection that ended early: worth another try."""


class _Unusable(Exception):
    """A url that does not have the file, or has another one: the next url may have it."""


def obtain(file: SourceFile, folder: Path, *, download: bool) -> str:
    """Check that a raw file is the right one, and download it where it is missing.

    A file that was checked before and has not changed is not read again. Several processes may ask for the
    same file at once: one downloads, the others wait.

    Args:
        file: Its record.
        folder: The dataset's raw folder; created where it is missing.
        download: Whether a missing file may be downloaded.

    Returns:
        Its sha256, in hex.

    Raises:
        UserError: The file is missing and may not or cannot be downloaded, is not the right one (it stays
            where it is), or the disk is full or read-only.
    """
    path = folder / file.name
    if known := _remembered(file, folder):
        return known
    if path.is_file():
        return _check(file, folder)
    if not download or not file.urls:
        raise _missing(file, folder)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f"{path.name}.lock"), f"downloading {path}"):
            if path.is_file():  # another process was faster
                return _remembered(file, folder) or _check(file, folder)
            checksum = _download(file, path)
            _remember(file, folder, checksum)  # before the others stop waiting, or they would check it again
            return checksum


def _missing(file: SourceFile, folder: Path) -> UserError:
    way = "get it by hand as docs/datasets.md says, and put it there"
    if file.urls:
        size = f" ({in_bytes(file.size)})" if file.size else ""
        way = (
            f"allow its download with data.download=true, or put it there from {' or '.join(file.urls)}{size}"
        )
    return UserError(f"{folder / file.name} is missing: {way}")


def _check(file: SourceFile, folder: Path) -> str:
    """Check a file that a user may have put there, and remember that it is right."""
    path = folder / file.name
    try:
        checksum = _checksum(file, path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): repair it or get it again"
        ) from error
    except _Unusable as error:
        raise UserError(
            f"{path} is not the file that the catalog knows ({error}): "
            "move it away, then download it again or get the right one from where docs/datasets.md says"
        ) from error
    _remember(file, folder, checksum)
    return checksum


def _checksum(file: SourceFile, path: Path) -> str:
    """Return the sha256 of a file after comparing its size and checksums with the record.

    Raises:
        _Unusable: It says what was expected and what was read.
    """
    if file.size not in (None, size := path.stat().st_size):
        raise _Unusable(f"{size:,} bytes instead of {file.size:,}")
    checksums = {}
    weaker = () if file.sha256 else tuple(file.checksums)
    for kind in ("sha256", *weaker):
        with _progress() as bar, bar.open(path, "rb", description=f"checking {file.name}") as stream:
            checksums[kind] = hashlib.file_digest(cast(Any, stream), kind).hexdigest()
        expected = getattr(file, kind)
        if expected and checksums[kind] != expected.lower():
            raise _Unusable(f"{kind} {checksums[kind]} instead of {expected}")
    return checksums["sha256"]


def _remembered(file: SourceFile, folder: Path) -> str | None:
    path, entry = folder / file.name, _read_json(folder / "checksums.json").get(file.name)
    if not isinstance(entry, dict) or not path.is_file() or entry != _entry(path, entry.get("sha256", "")):
        return None
    fits = file.size in (None, entry["bytes"]) and file.sha256.lower() in ("", entry["sha256"])
    return str(entry["sha256"]) if fits else None  # the record may be newer than the memory


def _remember(file: SourceFile, folder: Path, checksum: str) -> None:
    """Note a checked file; in a folder that is read-only it is checked again each time."""
    path = folder / "checksums.json"
    # written under the lock; overwrites the one of a killed process
    temporary = path.with_name("checksums.json.tmp")
    try:
        with FileLock(path.with_name("checksums.json.lock")):
            entries = {**_read_json(path), file.name: _entry(folder / file.name, checksum)}
            temporary.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        _log.warning(
            "cannot note in %s that %s is right (%s): it is read again next time", folder, file.name, error
        )


def _entry(path: Path, checksum: str) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": checksum}


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where it is missing or damaged: that costs a check or a download."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise in one sentence what a disk refuses; errors of the network are caught before they come here."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, how = (
            ("the disk is full", "free space there") if full else (error.strerror, "make the folder writable")
        )
        where = f"{path.name} to {path.parent}"
        raise UserError(
            f"cannot write {where} ({what}): {how} or use another folder, then start again"
        ) from error


def _download(file: SourceFile, path: Path) -> str:
    part, reasons = _Part(path), []
    with requests.Session() as session:
        session.headers.update(_HEADERS)
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=RETRY))
        for url in file.urls:
            try:
                _fetch(session, url, file, part)
                return part.finish(file)
            except _Unusable as error:
                reasons.append(f"{url} ({error})")
    raise UserError(
        f"cannot download {file.name}: {'; '.join(reasons)}; run the same command again later, "
        f"or get the file by hand and put it into {path.parent}"
    )


def _fetch(session: requests.Session, url: str, file: SourceFile, part: "_Part") -> None:
    """Download from one url, resuming where a connection ended; tries that brought new bytes do not count."""
    retry, furthest = RETRY, part.size
    with _progress() as bar:
        task = bar.add_task(f"downloading {file.name}", total=file.size)
        # the part is complete where the last process ended while checking it
        while not (part.version and part.size == file.size):
            try:
                for size in _receive(session, url, file, part):
                    bar.update(task, completed=size)
                return
            except _Interrupted as error:
                if part.size <= furthest and not retry.total:
                    raise _Unusable(f"{error}, after {_TRIES} tries") from error
                retry, furthest = (
                    (RETRY, part.size) if part.size > furthest else (retry.increment(), furthest)
                )
                _log.info("%s: %s; going on at byte %d", url, error, part.size)
                retry.sleep()


def _receive(session: requests.Session, url: str, file: SourceFile, part: "_Part") -> Iterator[int]:
    """Ask for the bytes that the part lacks, append them, and yield its size after each chunk."""
    try:
        answer = session.get(url, headers=part.conditions(), stream=True, timeout=_TIMEOUT)
    except requests.RequestException as error:
        raise _Unusable(f"{_first_cause(error)}, after {_TRIES} tries") from error
    with answer:
        start = part.size if answer.status_code == requests.codes.partial_content else 0
        refused = answer.status_code == requests.codes.requested_range_not_satisfiable
        if refused or (start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")):
            part.restart()
            raise _Interrupted("the server sent another range than was asked for")
        if not answer.ok:
            raise _Unusable(f"{answer.status_code} {answer.reason}")
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else file.size
        if file.size not in (None, total):
            raise _Unusable(f"{total:,} bytes instead of {file.size:,}")  # a part of the right file stays
        _check_room(part.target, (total or 0) - start)
        if not start:  # a first answer, or the server knows no ranges, or the file has changed
            strong = answer.headers.get("ETag", "").startswith('"')  # a weak one names no exact bytes
            part.restart(answer.headers.get("ETag" if strong else "Last-Modified", ""))
        try:
            while data := answer.raw.read1(_CHUNK, decode_content=False):
                part.append(data)
                yield part.size
        except HTTPError as error:
            whole = f" of {total:,}" if total else ""
            raise _Interrupted(f"the connection ended after {part.size:,}{whole} bytes") from error
    if total and part.size < total:
        raise _Interrupted(f"the connection ended after {part.size:,} of {total:,} bytes")


def _first_cause(error: BaseException) -> str:
    """Return the message of the system's error, which requests and urllib3 wrap several times."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def _check_room(target: Path, need: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise UserError(
            f"{target.parent} has {in_bytes(free)} free and {target.name} needs {in_bytes(need)}: "
            f"free {in_bytes(need - free)} there or use another folder"
        )


class _Part:
    """An unfinished download, `<name>.part`, and the version of its file, in `<name>.part.json`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        self.version = str(_read_json(self._note).get("version", ""))
        if not self.version:
            self._path.unlink(missing_ok=True)  # of an unknown file

    @property
    def size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def conditions(self) -> dict[str, str]:
        """Return request headers that ask for the rest, if the file on the server is still the same one."""
        known = self.size and self.version
        return {"Range": f"bytes={self.size}-", "If-Range": self.version} if known else {}

    def restart(self, version: str = "") -> None:
        self._path.unlink(missing_ok=True)
        self.version = version
        self._note.write_text(json.dumps({"version": version}), encoding="utf-8")

    def append(self, data: bytes) -> None:
        with self._path.open("ab") as stream:  # closed at once: an interrupt loses nothing
            stream.write(data)

    def finish(self, file: SourceFile) -> str:
        """Check the complete file, rename it and return its sha256; remove a wrong one."""
        try:
            checksum = _checksum(file, self._path)
        except _Unusable:
            self._path.unlink()
            self._note.unlink()
            raise
        with self._path.open("ab") as stream:
            os.fsync(stream.fileno())
        self._path.replace(self.target)
        self._note.unlink(missing_ok=True)
        return checksum


def _progress() -> Progress:
    """Return a progress bar, hidden where the output is not a terminal."""
    console = Terminal(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
