"""Leases of runs as other processes and other machines leave them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visprompt.runs import lease, run_lock
from visprompt.runs.board import FolderBoard


def write_lease(folder: Path, **record: object) -> None:
    """Create the next lease of a run; by default one that is held on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    board = FolderBoard(folder)
    held = {"state": "held", "who": "process 4711 on thor", "host": "thor", "life": 60.0}
    board.create_lease(lease.newest(board)[0] + 1, lease.Record(**{**held, **record}).text())


class Locked:
    """The locked file `lock` of a folder; its lock goes with the process that has it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.name = run_lock._name_of(self._descriptor)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def at_work(folder: Path, who: str = "process 4711 on thor") -> Iterator[Locked]:
    """Hold a run as another process of this machine does; when the lock is released, it has been killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Locked(folder)
    write_lease(folder, who=who, host=lease.this_host(), lock=lock.name)
    try:
        yield lock
    finally:
        lock.release()


def holder(folder: Path) -> str | None:
    """Who holds a run, None if nobody does."""
    record = lease.newest(FolderBoard(folder))[1]
    return record.who if record.state == "held" else None
