"""Raw files: downloaded with resume, checked against the catalog once, and remembered as checked.

Beside a file `<name>` may lie `<name>.part` and `<name>.part.json` (a download to go on with), `<name>.lock` (who
downloads it) and, one per folder, `checksums.json` (what was checked). A file under its own name is always whole.
"""

import errno
import http.client
import json
import logging
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from hashlib import md5, sha256
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from visprompt.data.catalog.task import SourceFile, in_bytes
from visprompt.errors import UserError
from visprompt.files import alone
from visprompt.text import Terminal

PAUSES = (1.0, 5.0, 15.0)
"""Seconds before each new try on a connection that broke without a new byte; after the last one the next url follows"""

_TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 1 << 20
_AGENT = {"User-Agent": "visprompt (data preparation; python-urllib)"}  # some hosts refuse urllib's own name
_PASSING = frozenset({408, 416, 425, 429, 500, 502, 503, 504})  # the next answer may be better

_Bar = Callable[[int], None]  # takes the bytes so far
_log = logging.getLogger(__name__)


class _Broken(Exception):
    """A connection that ended early or a server in trouble: worth another try."""


class _Useless(Exception):
    """A url that does not have the file: the next one may."""


def obtain(file: SourceFile, folder: Path, *, download: bool, progress: bool = True) -> str:
    """Makes sure that a raw file is there and is the right one.

    What was checked before and has not changed is not read again. Several processes may ask at once: one downloads.

    Args:
        file: Its record.
        folder: The dataset's raw folder; made where it is missing.
        download: Whether a missing file may be fetched.
        progress: Show a bar, where the output is a terminal.

    Returns:
        Its sha256, in hex.

    Raises:
        UserError: The file is missing and may not or cannot be fetched, is not the right one (it stays where it is),
            or the disk is full or read-only.
    """
    path = folder / file.name
    if known := _remembered(file, folder):
        return known
    if path.is_file():
        return _checked(file, folder, progress)
    if not download or not file.urls:
        raise _missing(file, folder)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f"{path.name}.lock"), f"downloading {path}"):
            if path.is_file():  # another process was faster
                return _remembered(file, folder) or _checked(file, folder, progress)
            found = _fetch(file, path, progress)
            _remember(file, folder, found)  # before the others stop waiting, or they would check it again
            return found


def _missing(file: SourceFile, folder: Path) -> UserError:
    way = "get it by hand as docs/datasets.md says, and put it there"
    if file.urls:
        size = f" ({in_bytes(file.size)})" if file.size else ""
        way = f"allow its download with data.download=true, or put it there from {' or '.join(file.urls)}{size}"
    return UserError(f"{folder / file.name} is missing: {way}")


def _checked(file: SourceFile, folder: Path, progress: bool) -> str:
    """Reads a file that is there, whoever put it there, and remembers that it is right."""
    path = folder / file.name
    hashes, size = _Hashes(file), path.stat().st_size
    if file.size not in (None, size):
        hashes.size = size  # reading it would tell nothing more
    else:
        try:
            with _bar(file, progress, "checking") as bar, path.open("rb") as stream:
                hashes.read(stream, bar)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror or error}): mend that or get it again") from error
    if fault := hashes.fault():
        raise UserError(
            f"{path} is not the file that the catalog knows ({fault}): "
            "move it away, then download it again or get the right one from where docs/datasets.md says"
        )
    _remember(file, folder, hashes.sha256)
    return hashes.sha256


class _Hashes:
    """Size and hashes of bytes that pass by, and what the record expects."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._md5_wanted = bool(file.md5) and not file.sha256  # it would take a third of the time for nothing
        self.reset()

    def reset(self) -> None:
        self.size = 0
        self._sha256, self._md5 = sha256(), md5(usedforsecurity=False)

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self._sha256.update(data)
        if self._md5_wanted:
            self._md5.update(data)

    def read(self, stream: IO[bytes], bar: _Bar) -> None:
        while data := stream.read(_CHUNK):
            self.add(data)
            bar(self.size)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def fault(self) -> str:
        """Says what is expected and what was found, or nothing where they agree."""
        if self._file.size is not None and self.size != self._file.size:
            return f"{self.size:,} bytes instead of {self._file.size:,}"
        if self._file.sha256 and self.sha256 != self._file.sha256.lower():
            return f"sha256 {self.sha256} instead of {self._file.sha256}"
        if self._md5_wanted and self._md5.hexdigest() != self._file.md5.lower():
            return f"md5 {self._md5.hexdigest()} instead of {self._file.md5}"
        return ""


def _memory(folder: Path) -> dict[str, Any]:
    try:
        entries = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # costs a check, nothing else
    return entries if isinstance(entries, dict) else {}


def _entry(path: Path, found: str) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": found}


def _remembered(file: SourceFile, folder: Path) -> str | None:
    path, entry = folder / file.name, _memory(folder).get(file.name)
    if not isinstance(entry, dict) or not path.is_file() or entry != _entry(path, entry.get("sha256", "")):
        return None
    fits = file.size in (None, entry["bytes"]) and file.sha256.lower() in ("", entry["sha256"])
    return str(entry["sha256"]) if fits else None  # the record may be newer than the memory


def _remember(file: SourceFile, folder: Path, found: str) -> None:
    """Notes a checked file; a folder that takes no note (somebody else's, read-only) costs a check each time."""
    path = folder / "checksums.json"
    temporary = path.with_name("checksums.json.tmp")  # of whoever holds the lock: the next overwrites a killed one's
    try:
        with FileLock(path.with_name("checksums.json.lock")):
            entries = {**_memory(folder), file.name: _entry(folder / file.name, found)}
            temporary.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        _log.warning("cannot note in %s that %s is right (%s): it is read again next time", folder, file.name, error)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into one sentence; what a network does is caught before it comes here."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, how = ("the disk is full", "free space there") if full else (error.strerror, "make the folder writable")
        where = f"{path.name} to {path.parent}"
        raise UserError(f"cannot write {where} ({what}): {how} or use another folder, then start again") from error


def _fetch(file: SourceFile, path: Path, progress: bool) -> str:
    reasons = []
    with _bar(file, progress, "downloading") as bar:
        part = _Part(file, path, bar)
        for url in file.urls:
            try:
                if part.hashes.size != file.size:  # else it is whole, and the last process ended before it was renamed
                    _persist(url, part)
                part.finish()
            except _Useless as error:
                reasons.append(f"{url} ({error})")
            else:
                return part.hashes.sha256
    raise UserError(
        f"cannot download {file.name}: {'; '.join(reasons)}; run the same command again later, "
        f"or get the file by hand and put it into {path.parent}"
    )


def _persist(url: str, part: "_Part") -> None:
    """Tries one url until the file is complete; only tries that brought no new byte are counted."""
    furthest, failures = part.hashes.size, 0
    while True:
        try:
            return _attempt(url, part)
        except _Broken as error:
            failures = 0 if part.hashes.size > furthest else failures + 1
            furthest = max(furthest, part.hashes.size)
            if failures > len(PAUSES):
                raise _Useless(f"{error}, after {failures} tries") from error
            _log.info("%s: %s; going on at byte %d", url, error, part.hashes.size)
            time.sleep(PAUSES[max(0, failures - 1)])


def _attempt(url: str, part: "_Part") -> None:
    """Asks once, for the rest where a part is there, and appends what comes."""
    try:
        with urlopen(Request(url, headers=_AGENT | part.conditions()), timeout=_TIMEOUT) as answer:
            total = part.begin(answer.status, answer.headers)
            while data := answer.read(_CHUNK):
                part.append(data)
    except HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.restart()
        raise (_Broken if error.code in _PASSING else _Useless)(f"{error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        gone = isinstance(reason, str | socket.gaierror | ssl.SSLCertVerificationError)
        raise (_Useless if gone else _Broken)(str(reason) or type(reason).__name__) from error
    if total and part.hashes.size < total:
        raise _Broken(f"the connection ended after {part.hashes.size:,} of {total:,} bytes")


class _Part:
    """A file on its way: `<name>.part`, with the version that it is part of in `<name>.part.json`."""

    def __init__(self, file: SourceFile, target: Path, bar: _Bar) -> None:
        self.hashes = _Hashes(file)
        self._file, self._target, self._bar = file, target, bar
        self._path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        try:
            self._version = str(json.loads(self._note.read_text(encoding="utf-8"))["version"])
            with self._path.open("rb") as stream:
                self.hashes.read(stream, bar)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._version = ""  # nothing there that is known to be a part of something

    def conditions(self) -> dict[str, str]:
        """Request headers that ask for the rest, if the file is still the same one."""
        known = self.hashes.size and self._version
        return {"Range": f"bytes={self.hashes.size}-", "If-Range": self._version} if known else {}

    def restart(self) -> None:
        self.hashes.reset()
        self._path.unlink(missing_ok=True)

    def begin(self, status: int, headers: Message) -> int | None:
        """Takes the head of an answer and returns the bytes of the whole file, where they are known."""
        whole = status != http.HTTPStatus.PARTIAL_CONTENT
        length, start = headers.get("Content-Length", ""), 0 if whole else self.hashes.size
        total = start + int(length) if length.isdecimal() else self._file.size
        if self._file.size not in (None, total):
            raise _Useless(f"{total:,} bytes instead of {self._file.size:,}")  # what is there of the right file stays
        right = whole or headers.get("Content-Range", "").startswith(f"bytes {start}-")
        with _writing(self._target):
            if whole or not right:
                self.restart()  # the server knows no ranges, or the file has changed
            if not right:
                raise _Broken("the server sent another range than was asked for")
            self._check_room((total or 0) - start)
            if whole:
                strong = headers.get("ETag", "").startswith('"')  # a weak one names no exact bytes
                self._version = headers["ETag"] if strong else headers.get("Last-Modified", "")
                self._note.write_text(json.dumps({"version": self._version}), encoding="utf-8")
        return total

    def _check_room(self, need: int) -> None:
        folder, free = self._target.parent, shutil.disk_usage(self._target.parent).free
        if need > free:
            raise UserError(
                f"{folder} has {in_bytes(free)} free and {self._target.name} needs {in_bytes(need)}: "
                f"free {in_bytes(need - free)} there or use another folder"
            )

    def append(self, data: bytes) -> None:
        with _writing(self._target), self._path.open("ab") as stream:  # closed at once: an interrupt loses nothing
            stream.write(data)
        self.hashes.add(data)
        self._bar(self.hashes.size)

    def finish(self) -> None:
        """Gives the complete file its name, or removes it where it is not the right one."""
        if fault := self.hashes.fault():
            self.restart()
            self._note.unlink(missing_ok=True)
            raise _Useless(fault)
        with self._path.open("ab") as stream:
            os.fsync(stream.fileno())
        self._path.replace(self._target)
        self._note.unlink(missing_ok=True)


@contextmanager
def _bar(file: SourceFile, progress: bool, doing: str) -> Iterator[_Bar]:
    """Shows how far a long read or download is, where somebody looks at a terminal."""
    console = Terminal(stderr=True)
    hidden = not (progress and console.is_terminal)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as shown:
        task = shown.add_task(f"{doing} {file.name}", total=file.size)
        yield lambda size: shown.update(task, completed=size)
