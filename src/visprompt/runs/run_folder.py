"""A run's folder: one process at a time, a complete attempt put in place, and nothing that a killed process left.

A new attempt is written whole under `resume/`, its `result.json` last, and only then moved to where readers
look. A kill at any step leaves either the old result, or a complete attempt that the next look at the folder
puts in place.
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
STATE = "state.safetensors"  # below it: what an unfinished attempt goes on from
_RESULT = "result.json"
_STATE, _CURVE = "tuned.safetensors", "metrics.csv"
_PARTS = ("config.yaml", _CURVE, _STATE)  # of an attempt, besides its result


class AtWork(UserError):
    """Another process is at work on a run.

    Attributes:
        who: That process.
        folder: The run's folder.
    """

    def __init__(self, who: str, folder: Path) -> None:
        super().__init__(f"{who} is at work on this run in {folder}: wait for it, or end it")
        self.who, self.folder = who, folder

    def __reduce__(self) -> tuple[type["AtWork"], tuple[str, Path]]:  # rank 0 sends it to the others
        return AtWork, (self.who, self.folder)


@contextmanager
def locked(folder: Path) -> Iterator[Result | None]:
    """Keep other processes out of a run's folder, and tidies it.

    Args:
        folder: The run's folder; it is made.

    Yields:
        The result that it holds, None where it has none that is whole.

    Raises:
        AtWork: Another process holds the lock.
        UserError: The folder cannot be written.
    """
    lock, holder = FileLock(folder / "lock"), folder / "holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)  # who only looks whether it is free holds it for a moment
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
    """Return whether nobody is at work on a run."""
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
    """Tidy a run's folder before it is read without its lock, unless somebody is at work on it or it is read-only."""
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
    """Return the number of the attempt to make in a run's folder, None where it is finished and not to be run anew.

    An unfinished attempt is gone on with: by `rerun=true` one that itself began, otherwise any of a run
    without result.

    Args:
        folder: The run's folder, locked.
        stored: The result that it holds.
        rerun: Whether a finished run is run anew.
    """
    if stored and not rerun:
        return None
    begun, resume = _begun(folder), folder / RESUME
    attempt = (stored.attempt if stored else 0) + 1 if rerun else begun or 0
    stale = begun not in (None, attempt)  # of the original run, or left by a kill after its end
    if resume.is_dir() and (stale or not (resume / STATE).is_file()):
        shutil.rmtree(resume)
    return attempt


def _begun(folder: Path) -> int | None:
    """Return the number of the unfinished attempt that a folder's resume state is of.

    None where it has none of this run.
    """
    owner = _owner(folder)
    return owner.attempt if owner and owner.run.startswith(folder.name) else None


def _owner(folder: Path) -> Owner | None:
    state = folder / RESUME / STATE
    return owner_of(state) if state.is_file() else None


def put_in_place(folder: Path) -> None:
    """Make a complete attempt under `resume/` the run's; may be repeated after a kill at any step.

    Raises:
        DamagedRecord: Its result is damaged; nothing was moved.
        UserError: The file system refuses.
    """
    resume = folder / RESUME
    try:
        record = read_record(resume / _RESULT) or {}
        for name in _PARTS:
            if (resume / name).is_file():
                (resume / name).replace(folder / name)
        lacks = {_STATE: record.get("status") == "diverged", _CURVE: _CURVE not in record.get("files", {})}
        for name in (name for name, lacking in lacks.items() if lacking):
            (folder / name).unlink(missing_ok=True)  # of an older result
        (resume / _RESULT).replace(folder / _RESULT)
        shutil.rmtree(resume)
    except OSError as error:
        raise _refused(folder, error) from error


def _tidied(folder: Path) -> Result | None:
    """Put a complete attempt in place, removes what a killed process left, and returns the folder's result."""
    resume = folder / RESUME
    owner = _owner(folder)
    if (resume / _RESULT).is_file() and (
        owner is None or owner.run.startswith(folder.name)
    ):  # else `find` refuses it
        try:
            put_in_place(folder)
        except DamagedRecord as error:
            log.warning("%s: the attempt is scored again", error)
            (resume / _RESULT).unlink()
    for path in (*folder.glob(".*"), *resume.glob(".*")):
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    stored = _whole_result(folder)
    if stored and resume.is_dir() and _is_over(folder, stored):
        shutil.rmtree(resume)
    return stored


def _whole_result(folder: Path) -> Result | None:
    """Return the result that a folder holds, None where it has none that is whole; a damaged one is said."""
    try:
        return load_result(folder)
    except DamagedRecord as error:
        log.warning("%s: the run starts again", error)
        return None


def _is_over(folder: Path, stored: Result) -> bool:
    """Return whether what lies under `resume/` is of no attempt that could go on.

    A rerun that began, or a foreign state.
    """
    begun = _begun(folder)
    return begun <= stored.attempt if begun is not None else _owner(folder) is None
