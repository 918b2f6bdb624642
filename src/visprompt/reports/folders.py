"""Finds runs below folders: each once, however often it was copied or linked, and names what is no finished run."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from visprompt.errors import UserError
from visprompt.reports.runs import Run
from visprompt.reports.settings import text
from visprompt.runs.result import read_result
from visprompt.runs.run_folder import tidy

_HASH = re.compile(r"[0-9a-f]{12}")  # what a run's folder is called
_CHAIN = frozenset({"initial.json", "importance.json", "masks.json"})  # in a chain's folder, in which no run lies
_DAMAGED = (
    "damaged, or of another version of visprompt: result.json or the tuned state beside it is not whole; run the same "
    "command again"
)
_DEBUG = "a debug run, which is no result"
_NUMBER = (int, float)
# what the report reads of a record's parts, which its schema leaves open
_READ: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "method": {"name": str, "num_tokens": int},
    "recipe": {"lr": _NUMBER, "weight_decay": _NUMBER},
    "backbone": {"name": str, "sha256": str},
    "tuned": {
        **{"parameters": int, "head_parameters": int, "share": _NUMBER},
        **{"macs": int, "depth": int, "kept_tokens": int},
    },
    "time": {"train_s": _NUMBER},
    "peak_memory": {"bytes": int, "of": str},
    "machine": {"device": str, "devices": int, "threads": int},
}
_NOT_OF_ALL = frozenset({"num_tokens", "macs", "depth", "kept_tokens", "threads"})  # counts that a record may lack


@dataclass(frozen=True)
class LeftOut:
    """What was found and takes no part in the report.

    Attributes:
        folder: Where it lies.
        why: The reason, in words.
    """

    folder: Path
    why: str


@dataclass(frozen=True)
class Survey:
    """All that was found below some folders.

    Attributes:
        runs: Finished runs, each once, diverged ones among them; sorted by folder.
        left_out: Everything else that is a run's folder.
    """

    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]


def survey(folders: Sequence[Path]) -> Survey:
    """Reads all runs below some folders, at any depth and through links.

    Args:
        folders: Runs, or folders in which they lie, one within another or not; of a run that lies in two of them, that
            of the first is taken.

    Returns:
        Runs and what was left out.

    Raises:
        UserError: One of them is no folder.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} to read runs from: name one that holds runs, as logs does")
        for found in _below(folder, seen):
            if isinstance(found, Run):
                runs.append(found)
            else:
                left_out.append(found)
    once = _once(runs, left_out)
    return Survey(tuple(once), tuple(left_out))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of `survey` alone."""
    return list(survey(folders).runs)


def _below(top: Path, seen: set[str]) -> Iterator[Run | LeftOut]:
    """Walks a folder and its links, each true folder once."""
    refused: list[OSError] = []
    for path, folders, files in os.walk(top, followlinks=True, onerror=refused.append):
        here, true = Path(path), os.path.realpath(path)
        if true in seen:
            folders.clear()
            continue
        seen.add(true)
        folders.sort()
        names = {*folders, *files}
        if names & {"result.json", "resume"}:
            tidy(here)
            names = {path.name for path in here.iterdir()}
        if "result.json" in names:
            folders.clear()  # what a run keeps below is its own
            result = read_result(here, hashed=False)  # of thousands of runs: header and size say whose state it is
            if result is None or not _has_all(Run(here, result)):
                yield LeftOut(here, _DAMAGED)
            else:
                yield LeftOut(here, _DEBUG) if "debug" in result.tags else Run(here, result)
        elif "resume" in names or (_HASH.fullmatch(here.name) and "lock" in files and not names & _CHAIN):
            folders.clear()
            yield LeftOut(here, "not finished")
    for error in refused:
        yield LeftOut(Path(str(error.filename)), f"cannot be read: {error.strerror}")


def _has_all(run: Run) -> bool:
    """Whether a result holds what the report reads of it, each of its kind."""
    try:
        known = run.result.split in ("tune", "final") and bool(run.settings)
        return known and all(_is(value, kind) for value, kind in _read(run))
    except (AttributeError, KeyError, TypeError):
        return False


def _read(run: Run) -> Iterator[tuple[Any, type | tuple[type, ...]]]:
    """What the report reads of a result, and the kind that it should have."""
    result = run.result
    for part, kinds in _READ.items():
        for name, kind in kinds.items():
            needed = name not in _NOT_OF_ALL or (run.prunes and name == "kept_tokens")
            yield getattr(result, part).get(name, None if needed else 0), kind
    yield from ((result.task, str), (result.seed, int), (result.attempt, int), (result.versions, Mapping))
    if result.status == "finished":
        yield result.score, _NUMBER


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a value is of a kind; a number has to be finite, and True is none."""
    if isinstance(value, int | float) and (isinstance(value, bool) or not isfinite(value)):
        return False
    return isinstance(value, kind)


def _once(runs: Sequence[Run], left_out: list[LeftOut]) -> Iterator[Run]:
    """Each run once; where it is not clear which of several is meant, none of them."""
    alike: Mapping[object, list[Run]] = defaultdict(list)
    for run in runs:
        alike[_identity(run)].append(run)
    for found in alike.values():
        first, *others = sorted(found, key=lambda run: -run.result.attempt)  # of several attempts the last stands
        contradicting = [run for run in others if not _same(first, run)]
        if contradicting:
            for run in (first, *others):
                other = contradicting[0] if run is first else first
                why = f"recorded exactly as {other.folder}, but its scores differ: keep the one that is meant"
                left_out.append(LeftOut(run.folder, why))
            continue
        left_out += [LeftOut(run.folder, _counted(first, run)) for run in others]
        yield first


def _counted(first: Run, other: Run) -> str:
    """Why a run that is counted elsewhere is not counted here."""
    attempts = (first.result.attempt, other.result.attempt)
    said = "" if attempts[0] == attempts[1] else f" (attempt {attempts[0]}; here is attempt {attempts[1]})"
    scores = "" if _scores(first) == _scores(other) else ", though its scores differ"
    return f"the same run as {first.folder}, counted there{said}{scores}"


def _identity(run: Run) -> object:
    """What may be in the report once. Many prunings of a seed are tried, and one is the seed's final run."""
    result = run.result
    own = "" if result.split == "final" else text(dict(result.method))
    return (run.task, run.method, result.split, result.seed, own, tuple(sorted(run.settings.items())))


def _same(one: Run, other: Run) -> bool:
    """Whether two runs that are recorded alike are copies, or repetitions that came to the same."""
    if one.folder.name == other.folder.name and _HASH.fullmatch(one.folder.name):
        return True
    return _scores(one) == _scores(other)


def _scores(run: Run) -> object:
    return (run.result.status, run.result.metrics)
