"""Bring a run from object storage to its local folder, and store it there whole.

The objects of the run in the folder `<log_dir>/<task>/<method>/<hash>` are below the same path in the store
(see `results_store`):

    result.json                     the finished run; it is written last, on the condition that no other
                                    process has written it since
    files/<digest>/<name>           its files, by the digest of the result.json that they belong to
    resume/state.safetensors        the last resume state, as one object
    lease-<number>                  who is working on the run

So a reader sees the last result with all its files, or the one before. Two processes that finish the same
attempt write files of different digests; the result of the first stays, and the second learns of it. A
process that is killed may leave files that no result names; they take room and do no harm.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from visprompt.errors import UserError
from visprompt.files import DamagedRecord, digest_of, file_sha256, read_record, write_atomically
from visprompt.runs import run_folder
from visprompt.runs.board import PREFIX, numbers
from visprompt.runs.object_store import Head, ObjectStore
from visprompt.runs.result import Result, load_result, read_result
from visprompt.runs.resume_state import progress_of, read_checkpoint
from visprompt.runs.run_folder import COMPLETE, CONFIG, LISTED, RESULT, RESUME, STATE, TUNED

log = logging.getLogger(__name__)
_STATE = f"{RESUME}/{STATE}"
_DIGITS = 16  # hexadecimal digits of the digest in a key
_TRIES = 5  # readings of a run that other processes replace meanwhile


class DamagedRun(UserError):
    """A finished run in the store is damaged; nothing has been brought."""


@dataclass(frozen=True)
class RemoteRun:
    """One run in the store. Its methods expect that no other process of this machine writes in its folder.

    Attributes:
        folder: The run's local folder.
        objects: The run's objects.
    """

    folder: Path
    objects: ObjectStore

    @property
    def url(self) -> str:
        """Return where the run is in the store."""
        return self.objects.url

    def __str__(self) -> str:
        return self.url

    # -- leases --

    def lease_numbers(self) -> list[int]:
        """Return the numbers of all leases, sorted."""
        return numbers(self.objects.etags(PREFIX))

    def read_lease(self, number: int) -> str | None:
        """Return a lease's text, or None if there is no such lease."""
        content = self.objects.read(f"{PREFIX}{number}")
        return None if content is None else content.decode(errors="replace")

    def create_lease(self, number: int, text: str) -> bool:
        """Create a lease with a text that no other process writes; return False if there is one."""
        return self.objects.write_if(f"{PREFIX}{number}", text.encode(), None)

    def write_lease(self, number: int, text: str) -> None:
        """Replace a lease of this process."""
        self.objects.write(f"{PREFIX}{number}", text.encode())

    def remove_lease(self, number: int) -> None:
        """Remove a lease; do nothing if it is gone."""
        self.objects.remove(f"{PREFIX}{number}")

    # -- the run --

    def pull(self) -> bool:
        """Bring the finished run and the resume state to the local folder, where the store's are newer.

        A later attempt is newer, and of two states of an attempt the one after more steps. A result of the
        same attempt is replaced too: the store's is the one that counts.

        Returns:
            False if the local folder has a finished run that the store lacks; `push_finished` stores it.

        Raises:
            UserError: An object is damaged or belongs to another run; the local folder is unchanged.
        """
        has_all = self.pull_finished()
        self._pull_state()
        return has_all

    def pull_finished(self, with_state: bool = True) -> bool:
        """Bring the finished run alone, as `pull` does.

        Args:
            with_state: Whether its tuned state is brought too.

        Raises:
            DamagedRun: An object is damaged.
        """
        for _ in range(_TRIES):
            try:
                return self._pull_result(with_state)
            except _Missing as error:  # another process has replaced the run meanwhile
                missing = error
        raise self._damaged(f"{missing} is missing, but result.json names it")

    def _pull_result(self, with_state: bool) -> bool:
        """Bring the finished run if it is newer; return what `pull` does.

        Raises:
            _Missing: A file of the run is missing.
        """
        with self._temporary() as folder:
            stored = read_result(self.folder, with_state=with_state)  # None also if a file there is damaged
            if not self.objects.download(RESULT, folder / RESULT):
                return stored is None
            record = self._checked(folder)
            if stored and stored.attempt > record["attempt"]:
                return False
            if stored and (folder / RESULT).read_bytes() == (self.folder / RESULT).read_bytes():
                return True
            for name, checksum in _files(record).items():
                if name == TUNED and not with_state:
                    continue
                key = f"files/{_short(record)}/{name}"
                if not self.objects.download(key, folder / name):
                    raise _Missing(key)
                if name == CONFIG and (head := self.objects.head(key)):  # no record has its checksum
                    checksum = head.facts.get("sha256")
                if checksum and file_sha256(folder / name) != checksum:
                    raise self._damaged(f"{key} is damaged: its checksum differs")
            try:
                load_result(folder, with_state=with_state)
            except DamagedRecord as error:
                raise self._damaged(str(error).replace(f"{folder}/", "")) from error
            self._put_in_place(folder, record["attempt"])
        return True

    def _put_in_place(self, complete: Path, attempt: int) -> None:
        """Move a complete attempt from a temporary folder into the run's, as a whole."""
        state = progress_of(self.folder / _STATE)
        if state and state[0].run.startswith(self.folder.name) and state[0].attempt > attempt:
            return  # a rerun has begun here, whose result will replace that of the store
        shutil.rmtree(self.folder / COMPLETE, ignore_errors=True)
        complete.rename(self.folder / COMPLETE)  # after a kill here `run_lock.locked` moves it into place
        run_folder.put_in_place(self.folder)

    def _pull_state(self) -> None:
        """Bring the resume state, if it is newer than what is in the local folder."""
        head = self.objects.head(_STATE)
        if head is None:
            return
        theirs = _rank(head)
        stored, ours = read_result(self.folder, hashed=False), progress_of(self.folder / _STATE)
        if stored and theirs[0] <= stored.attempt:
            return  # of an attempt that is over
        if ours and ours[0].run.startswith(self.folder.name) and (ours[0].attempt, ours[1]) >= theirs:
            return
        with self._temporary() as folder:
            file = folder / STATE
            if not self.objects.download(_STATE, file):
                return
            try:
                read_checkpoint(file)
            except UserError as error:
                raise UserError(
                    f"{self.objects.url}/{_STATE} is damaged: delete this object to start over"
                ) from error
            progress = progress_of(file)
            if progress is None or not progress[0].run.startswith(self.folder.name):
                raise UserError(
                    f"{self.objects.url}/{_STATE} is the resume state of another run: delete this object to "
                    "start over"
                )
            (self.folder / RESUME).mkdir(exist_ok=True)
            file.replace(self.folder / _STATE)

    def push_state(self) -> None:
        """Store the local resume state, in place of the one before it, if the folder has one."""
        file = self.folder / _STATE
        progress = progress_of(file)
        if progress is not None:
            self.objects.upload(_STATE, file, attempt=str(progress[0].attempt), steps=str(progress[1]))

    def push_finished(self) -> bool:
        """Store the local finished run, and remove the resume state that led to it; may be repeated.

        Returns:
            Whether the store has this result now. False: another process has stored a result of this or of a
            later attempt, which stands; `pull` brings it.

        Raises:
            UserError: There is no finished run in the local folder, or it is damaged.
        """
        result, record = self._finished()
        content = (self.folder / RESULT).read_bytes()
        digest = _short(record)
        for _ in range(_TRIES):
            head, theirs = self._stored()
            if theirs is not None and _short(theirs) == digest:
                break  # by an earlier call, or by one whose answer was lost
            if theirs is not None and theirs["attempt"] >= result.attempt:
                self._remove_files(digest)  # what this call has put there before it lost
                return False
            for name in _files(record):
                self.objects.upload(f"files/{digest}/{name}", self.folder / name)
            if self.objects.write_if(RESULT, content, head.etag if head else None):
                if theirs is not None:
                    self._remove_files(_short(theirs))
                break
        else:
            raise UserError(
                f"{self.objects.url}/{RESULT} is replaced again and again by other processes: run the same "
                "command again"
            )
        self._remove_state(result.attempt)
        return True

    def _finished(self) -> tuple[Result, dict[str, Any]]:
        """Return the local result and its record."""
        try:
            result, record = load_result(self.folder, hashed=False), read_record(self.folder / RESULT)
        except DamagedRecord as error:
            raise UserError(f"{error}; run the same command again") from error
        if result is None or record is None:
            raise UserError(f"{self.folder} holds no finished run: run its command again")
        for name in _files(record):
            if not (self.folder / name).is_file():
                raise UserError(
                    f"{self.folder / name} is missing: delete this folder and run the same command again"
                )
        return result, record

    def _stored(self) -> tuple[Head | None, dict[str, Any] | None]:
        """Return what the store has as result.json: its head, and its record if it can be read."""
        head = self.objects.head(RESULT)  # before the content: if it is replaced between, the write fails
        content = self.objects.read(RESULT) if head else None
        if head is None or content is None:
            return None, None
        try:
            record = json.loads(content)
            return head, record if record["digest"] == digest_of(record) and record["attempt"] >= 0 else None
        except (ValueError, TypeError, KeyError):
            log.warning("%s/%s is damaged: it is replaced", self.objects.url, RESULT)
            return head, None

    def _remove_files(self, digest: str) -> None:
        self.objects.remove(*self.objects.etags(f"files/{digest}/"))

    def _remove_state(self, attempt: int) -> None:
        """Remove the resume state, unless a later attempt has written it."""
        head = self.objects.head(_STATE)
        if head and _rank(head)[0] <= attempt:
            self.objects.remove(_STATE)

    def _checked(self, folder: Path) -> dict[str, Any]:
        """Return the record that was brought to a folder."""
        try:
            record = read_record(folder / RESULT)
        except DamagedRecord as error:
            raise self._damaged(str(error).replace(f"{folder}/", "")) from error
        if not record or type(record.get("attempt")) is not int or "digest" not in record:
            raise self._damaged("result.json is damaged or of another version of visprompt")
        return record

    def _damaged(self, what: str) -> "DamagedRun":
        return DamagedRun(
            f"{self.objects.url} holds a damaged run ({what}): delete its objects, and run the same command "
            "again"
        )

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """Make a temporary folder in the run's, which `run_lock.locked` removes after a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=".pull."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # -- other files --

    def pull_file(self, name: str) -> bool:
        """Bring one small file of the folder; return whether the store has it."""
        content = self.objects.read(_relative(name))
        if content is None:
            return False
        write_atomically(self.folder / name, lambda path: path.write_bytes(content))
        return True

    def push_file(self, name: str) -> None:
        """Store one small file of the folder as one object."""
        self.objects.write(_relative(name), (self.folder / name).read_bytes())


class _Missing(Exception):
    """A file of a run is missing in the store; its key is the message."""


def remote_at(folder: Path, url: str) -> RemoteRun:
    """Return the run of a local folder whose objects are below an address."""
    return RemoteRun(folder, ObjectStore(url))


def _relative(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise ValueError(f"{name} is not below the run's folder")
    return name


def _short(record: dict[str, Any]) -> str:
    return str(record["digest"])[:_DIGITS]


def _files(record: dict[str, Any]) -> dict[str, str | None]:
    """Return the files of a finished run besides result.json, with their SHA-256 where result.json has it."""
    named = record.get("files")
    sums = {name: named[name] for name in LISTED if name in named} if isinstance(named, dict) else {}
    # the tuned state has its own checksum, which `load_result` compares
    tuned = {} if record.get("status") == "diverged" else {TUNED: None}
    return {CONFIG: None, **sums, **tuned}


def _rank(state: Head) -> tuple[int, int]:
    """Return attempt and steps of a resume state in the store."""
    try:
        return int(state.facts["attempt"]), int(state.facts["steps"])
    except (KeyError, ValueError):
        return 0, 0
