"""Lock a run's folder, move complete attempts into place, and remove what killed processes left.

A new attempt is written under `resume/`, with `result.json` as its last file, and then moved to the run's
folder. A kill at any step leaves either the old result, or a complete attempt that the next process to open
the folder moves into place.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from visprompt.errors import UserError
from visprompt.files import TEMPORARY, DamagedRecord, read_record
from visprompt.runs import environment, signals
from visprompt.runs.result import Result, load_result
from visprompt.runs.resume_state import Owner, owner_of

log = logging.getLogger(__name__)
RESUME = "resume"
STATE = "state.safetensors"  # in the folder RESUME: the resume state of an unfinished attempt
TUNED = "tuned.safetensors"
CONFUSION, CLASSES = "confusion.csv", "classes.csv"
LISTED = ("metrics.csv", CONFUSION, CLASSES)  # the files whose sha256 the result records, if they exist
_RESULT = "result.json"
_PARTS = ("config.yaml", *LISTED, TUNED)  # the other files of a complete attempt


class AtWork(UserError):
    """Another process is working on a run.

    Attributes:
        who: The other process: "process 17 on gpu3".
        folder: The run's folder.
    """

    def __init__(self, who: str, folder: Path) -> None:
        super().__init__(f"{who} is working on this run in {folder}: wait for it, or end it")
        self.who, self.folder = who, folder

    def __reduce__(self) -> tuple[type["AtWork"], tuple[str, Path]]:  # rank 0 broadcasts it to the others
        return AtWork, (self.who, self.folder)


@contextmanager
def locked(folder: Path) -> Iterator[Result | None]:
    """Lock a run's folder against other processes, and tidy it.

    Args:
        folder: The run's folder; it is made.

    Yields:
        The folder's result, or None if there is none or it is damaged.

    Raises:
        AtWork: Another process holds the lock.
        UserError: The folder cannot be written.
    """
    lock, holder = FileLock(folder / "lock"), folder / "holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)  # not 0, because `is_free` in another process holds the lock for a moment
    except Timeout:
        raise AtWork(_holder(folder), folder) from None
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        try:
            holder.write_text(environment.this_process())
            stored = _tidied(folder)
        except OSError as error:
            raise _refused(folder, error) from error
        yield stored
    finally:
        with signals.deferred():
            try:
                holder.unlink(missing_ok=True)
            finally:
                lock.release()


def is_free(folder: Path) -> bool:
    """Return whether no process is working on a run."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def _holder(folder: Path) -> str:
    try:
        return (folder / "holder").read_text() or "another process"
    except OSError:
        return "another process"


def _refused(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {folder}: {error}; choose another folder with paths.log_dir=...")


def tidy(folder: Path) -> None:
    """Tidy a run's folder before it is read without the lock; do nothing if it is locked or read-only."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return
    if {RESUME, "holder"} & set(names) or any(TEMPORARY.fullmatch(name) for name in names):
        try:
            with locked(folder):
                pass
        except UserError:
            return


def next_attempt(folder: Path, stored: Result | None, rerun: bool) -> int | None:
    """Return the number of the attempt to make, or None if the run is finished and not to be run again.

    An unfinished attempt is continued: with `rerun=true` only one that an earlier `rerun=true` started,
    otherwise any attempt of a run without a result. Remove a resume state that is not continued.

    Args:
        folder: The run's folder, locked.
        stored: The folder's result.
        rerun: Whether a finished run is run again.
    """
    if stored and not rerun:
        return None
    unfinished, resume = _unfinished_attempt(folder), folder / RESUME
    attempt = (stored.attempt if stored else 0) + 1 if rerun else unfinished or 0
    # a state of the attempt before a rerun, or of an attempt that was killed after its end
    stale = unfinished not in (None, attempt)
    if resume.is_dir() and (stale or not (resume / STATE).is_file()):
        shutil.rmtree(resume)
    return attempt


def _unfinished_attempt(folder: Path) -> int | None:
    """Return the number of the attempt whose resume state is in the folder, or None if there is none."""
    owner = _owner(folder)
    return owner.attempt if owner and owner.run.startswith(folder.name) else None


def _owner(folder: Path) -> Owner | None:
    """Return the owner of the resume state in a folder, or None if there is none or it cannot be read."""
    state = folder / RESUME / STATE
    return owner_of(state) if state.is_file() else None


def put_in_place(folder: Path) -> None:
    """Move a complete attempt from `resume/` to the run's folder; may be repeated after a kill at any step.

    Raises:
        DamagedRecord: The attempt's result is damaged; nothing has been moved.
        UserError: The folder cannot be written.
    """
    resume = folder / RESUME
    try:
        record = read_record(resume / _RESULT) or {}
        for name in _PARTS:
            if (resume / name).is_file():
                (resume / name).replace(folder / name)
        # files of an older result that the new attempt does not have
        if record.get("status") == "diverged":
            (folder / TUNED).unlink(missing_ok=True)
        for name in set(LISTED) - set(record.get("files", {})):
            (folder / name).unlink(missing_ok=True)
        (resume / _RESULT).replace(folder / _RESULT)
        shutil.rmtree(resume)
    except OSError as error:
        raise _refused(folder, error) from error


def _tidied(folder: Path) -> Result | None:
    """Move a complete attempt into place, remove what a killed process left; return the folder's result."""
    resume = folder / RESUME
    owner = _owner(folder)
    # of another run's files `ResumeCheckpoint.find` will say that they do not belong here
    is_this_runs = owner is None or owner.run.startswith(folder.name)
    if (resume / _RESULT).is_file() and is_this_runs:
        try:
            put_in_place(folder)
        except DamagedRecord as error:
            log.warning("%s: the attempt is scored again", error)
            (resume / _RESULT).unlink()
    for path in (*folder.glob(".*"), *resume.glob(".*")):
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    stored = _undamaged_result(folder)
    if stored and resume.is_dir() and _is_over(folder, stored):
        shutil.rmtree(resume)
    return stored


def _undamaged_result(folder: Path) -> Result | None:
    """Return the result in a folder; None if there is none, or, with a warning, if it is damaged."""
    try:
        return load_result(folder)
    except DamagedRecord as error:
        log.warning("%s: the run starts again", error)
        return None


def _is_over(folder: Path, stored: Result) -> bool:
    """Return whether no attempt can continue from the files under `resume/`.

    A rerun that has started can continue. The resume state of another run is kept, to be refused later.
    """
    unfinished = _unfinished_attempt(folder)
    return unfinished <= stored.attempt if unfinished is not None else _owner(folder) is None
