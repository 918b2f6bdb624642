"""Hold a run's folder, and the same run in a store, against other processes on this machine and others."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from visprompt.errors import UserError
from visprompt.files import TEMPORARY
from visprompt.runs import lease
from visprompt.runs.board import FolderBoard, Remote
from visprompt.runs.lease import Held, Lease, holder_of
from visprompt.runs.result import Result, load_result
from visprompt.runs.run_folder import COMPLETE, RESUME, refused, tidied

log = logging.getLogger(__name__)
_MOMENT = 0.2  # seconds for which `is_free` of another process may lock a folder, at most
_TURN = 0.5  # seconds between two tries to hold a folder


class AtWork(UserError):
    """Another process is working on a run.

    Attributes:
        who: The other process: "process 17 on gpu3".
        folder: The run's folder.
        remote: The run in the store, if the other process may be on another machine and holds it there.
    """

    def __init__(self, who: str, folder: Path, remote: Remote | None = None) -> None:
        where = remote.url if remote else folder
        super().__init__(f"{who} is working on this run in {where}: wait for it, or end it")
        self.who, self.folder, self.remote = who, folder, remote

    def __reduce__(self) -> tuple[type["AtWork"], tuple[str, Path, Remote | None]]:  # rank 0 broadcasts it
        return AtWork, (self.who, self.folder, self.remote)


@dataclass(frozen=True)
class Hold:
    """A run's folder that this process holds.

    Attributes:
        folder: The folder.
        stored: Its result; None if the folder has no result, or a damaged one.
        remote: The same run in the store, or None.
    """

    folder: Path
    stored: Result | None
    remote: Remote | None
    _leases: tuple[Lease, ...]

    def check(self) -> None:
        """Look whether this process still holds the folder; called before each step that others can see.

        Raises:
            AtWork: Another process has taken the run, because this one stood still for too long.
        """
        try:
            for each in self._leases:
                each.check()
        except Held as held:
            raise AtWork(held.who, self.folder, self.remote) from None

    def push_state(self) -> None:
        """Store the resume state, if there is a store; without it another machine could not continue."""
        if self.remote is None:
            return
        try:
            self.check()
            self.remote.push_state()
        except AtWork:
            return  # the next check in the main thread ends the run
        except UserError as error:
            log.warning("the resume state is not stored, training goes on: %s", error)

    def push_finished(self, result: Result) -> Result:
        """Store the finished run, if there is a store, and return the result that counts.

        Args:
            result: The result in the folder. It does not count if another process has stored the same
                attempt, whose files then replace those in the folder.
        """
        if self.remote is None or self.remote.push_finished():
            return result
        self.remote.pull()
        return load_result(self.folder, hashed=False) or result


@contextmanager
def locked(folder: Path, remote: Remote | None = None) -> Iterator[Hold]:
    """Hold a run's folder against other processes, on this machine and others, and tidy it.

    The holder also locks the file `lock`. If a process of this machine is killed, the next one finds the file
    unlocked and need not wait until the lease is stale.

    Args:
        folder: The run's folder; it is made.
        remote: The same run in a store, which is held too, and brought to the folder if it is newer.

    Yields:
        What this process holds.

    Raises:
        AtWork: Another process holds the folder, or has taken it while the body ran.
        UserError: The folder cannot be written, or the store gives no answer.
    """
    board = FolderBoard(folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(_lock(folder, _MOMENT))
            record = lease.newest(board)[1]
            # a process locks the file before it creates its lease; only one that stood still locks it longer
            if lock is None and record.state != "revoked":
                raise Held(holder_of(record))
            leases = [stack.enter_context(lease.taken(board, lock or ""))]
            stored = tidied(folder)
            if remote:
                leases.append(stack.enter_context(lease.taken(remote, lock or "")))
                stored = _synchronised(folder, remote)
        except Held as held:
            raise AtWork(held.who, folder, remote) from None
        except OSError as error:
            raise refused(folder, error) from error
        hold = Hold(folder, stored, remote, tuple(leases))
        try:
            yield hold
        except (OSError, UserError):
            hold.check()  # a process that has lost the run may fail at files that are no longer there
            raise


def _synchronised(folder: Path, remote: Remote) -> Result | None:
    """Bring what the store has, and store a finished run that it lacks; return the folder's result."""
    if not remote.pull() and not remote.push_finished():
        remote.pull()
    return tidied(folder)


@contextmanager
def _lock(folder: Path, patience: float = 0.0) -> Iterator[str | None]:
    """Lock the file `lock` of a folder.

    Yields:
        A name that no other file `lock` has; None if another process locks it; "" if the file system has no
        locks.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    alone: bool | None = None
    try:
        limit = time.monotonic() + patience
        while (alone := _try_lock(descriptor)) is False and time.monotonic() < limit:
            time.sleep(0.02)
        yield _name_of(descriptor) if alone else "" if alone is None else None
    finally:
        if alone:  # closing does not unlock it if workers that load data have inherited it
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _name_of(descriptor: int) -> str:
    """Return what is written in a file, which no other has; its device and inode tell it from a copy."""
    name = os.pread(descriptor, 64, 0).decode(errors="replace")
    if not name:
        name = uuid4().hex
        os.pwrite(descriptor, name.encode(), 0)
    about = os.fstat(descriptor)
    return f"{name} {about.st_dev}:{about.st_ino}"


def _try_lock(descriptor: int) -> bool | None:
    """Lock a file; return False if another process locks it, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_free(folder: Path, remote: Remote | None = None) -> bool:
    """Return whether no process is working on a run.

    A process on another machine is known by its signs of life: its run becomes free if there was none between
    calls of this function for the life of its lease.

    Args:
        folder: The run's folder.
        remote: The same run in a store, or None.
    """
    board = FolderBoard(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # on another node of a Ray cluster
        with _lock(folder) as lock:
            if lock is None and lease.newest(board)[1].state == "free":
                return False  # its holder is about to create its lease, or has just released it
            free = lease.is_free(board, lock or "")
        return free and (remote is None or lease.is_free(remote, lock or ""))
    except (OSError, UserError):
        return True  # who tries to hold it says what is wrong


def is_given_up(folder: Path, remote: Remote | None = None) -> bool:
    """Wait for a sign of life of the process that holds a run; return True if the run becomes free first.

    A process that locks the file `lock` lives on this machine, and is not waited for.
    """
    try:
        with _lock(folder) as lock:
            if lock is None:
                return False
        boards = [FolderBoard(folder), *([remote] if remote else [])]
        records = [lease.newest(board)[1] for board in boards]
        holders = {record.who for record in records if record.state == "held"}
        if holders:
            log.warning("%s holds the run in %s: waiting for its sign of life", min(holders), boards[-1])
        while [lease.newest(board)[1] for board in boards] == records:
            if is_free(folder, remote):
                return True
            time.sleep(_TURN)
        return is_free(folder, remote)
    except (OSError, UserError):
        return False


@contextmanager
def locked_in_turn(folder: Path, remote: Remote | None = None) -> Iterator[Hold]:
    """Hold a folder as `locked` does, after the processes that hold it now."""
    with ExitStack() as stack:
        while True:
            try:
                hold = stack.enter_context(locked(folder, remote))
                break
            except AtWork as error:
                if not is_free(folder, error.remote):
                    time.sleep(_TURN)
        yield hold


def tidy(folder: Path, remote: Remote | None = None) -> None:
    """Tidy a run's folder before it is read without being held; do nothing if it is held or read-only.

    Args:
        folder: The run's folder.
        remote: The same run in a store, which is brought if it is newer.

    Raises:
        UserError: The store gives no answer.
    """
    if remote:
        with suppress(AtWork), locked(folder):
            _synchronised(folder, remote)
        return
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return
    if {RESUME, COMPLETE} & set(names) or any(TEMPORARY.fullmatch(name) for name in names):
        try:
            with locked(folder):
                pass
        except UserError:
            return
