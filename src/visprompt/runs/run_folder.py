"""Move complete attempts of a run into place, and remove what killed processes left.

A new attempt is trained under `resume/`. Its files are written to a folder of their own, which is renamed to
`.complete/` when it is whole, and then moved to the run's folder, `result.json` last. A kill at any step
leaves either the old result, or a complete attempt that the next process to hold the folder moves into
place. All files of a result are those of one process, even if two believe for a moment to hold the run.
"""

import logging
import shutil
from pathlib import Path

from visprompt.errors import UserError
from visprompt.files import TEMPORARY, DamagedRecord, read_record
from visprompt.runs.result import Result, load_result
from visprompt.runs.resume_state import Owner, owner_of

log = logging.getLogger(__name__)
RESUME, COMPLETE = "resume", ".complete"
STATE = "state.safetensors"  # in the folder RESUME: the resume state of an unfinished attempt
TUNED = "tuned.safetensors"
CONFIG = "config.yaml"
CURVE, CONFUSION, CLASSES = "metrics.csv", "confusion.csv", "classes.csv"
LISTED = (CURVE, CONFUSION, CLASSES)  # the files whose sha256 the result records, if they exist
RESULT = "result.json"
_PARTS = (CONFIG, *LISTED, TUNED)  # the other files of a complete attempt


def refused(folder: Path, error: OSError) -> UserError:
    """Build the error that says why a run's folder cannot be written to."""
    return UserError(f"cannot write to {folder}: {error}; choose another folder with paths.log_dir=...")


def next_attempt(folder: Path, stored: Result | None, rerun: bool) -> int | None:
    """Return the number of the attempt to make, or None if the run is finished and not to be run again.

    An unfinished attempt is continued: with `rerun=true` only one that an earlier `rerun=true` started,
    otherwise any attempt of a run without a result. Remove a resume state that is not continued.

    Args:
        folder: The run's folder, held.
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
    """Move a complete attempt from `.complete/` to the run's folder; may be repeated after a kill.

    Raises:
        DamagedRecord: The attempt's result is damaged; nothing has been moved.
        OSError: The folder cannot be written.
    """
    complete = folder / COMPLETE
    record = read_record(complete / RESULT) or {}
    for name in _PARTS:
        if (complete / name).is_file():
            (complete / name).replace(folder / name)
    # files of an older result that the new attempt does not have
    if record.get("status") == "diverged":
        (folder / TUNED).unlink(missing_ok=True)
    for name in set(LISTED) - set(record.get("files", {})):
        (folder / name).unlink(missing_ok=True)
    (complete / RESULT).replace(folder / RESULT)
    shutil.rmtree(complete)
    shutil.rmtree(folder / RESUME, ignore_errors=True)


def tidied(folder: Path) -> Result | None:
    """Move a complete attempt into place, remove what a killed process left; return the folder's result."""
    resume, complete = folder / RESUME, folder / COMPLETE
    owner = _owner(folder)
    # of another run's files `ResumeCheckpoint.find` will say that they do not belong here
    if complete.is_dir() and (owner is None or owner.run.startswith(folder.name)):
        if (complete / RESULT).is_file():
            try:
                put_in_place(folder)
            except DamagedRecord as error:
                log.warning("%s: the attempt is scored again", error)
        shutil.rmtree(complete, ignore_errors=True)
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
