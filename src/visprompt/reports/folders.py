"""Finds runs below folders: each once, however often it was copied or linked, and names what is no finished run."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visprompt.errors import UserError
from visprompt.reports.runs import Run
from visprompt.reports.settings import text
from visprompt.results import read_result

_HASH = re.compile(r"[0-9a-f]{12}")  # what a run's folder is called
_CHAIN = frozenset({"initial.json", "importance.json", "masks.json"})  # a chain's own folder, in which no run lies
_DAMAGED = "damaged: result.json or the tuned state beside it is not whole; run the same command again"
_READ = {
    "method": ("name",),
    "recipe": ("lr", "weight_decay"),
    "backbone": ("name", "sha256"),
    "tuned": ("parameters", "head_parameters", "share"),
    "time": ("train_s",),
    "peak_memory": ("bytes", "of"),
    "machine": ("device", "devices"),
}


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
        if "result.json" in names:
            folders.clear()  # what a run keeps below is its own
            result = read_result(here)
            whole = result is not None and _has_all(Run(here, result))
            yield Run(here, result) if result is not None and whole else LeftOut(here, _DAMAGED)
        elif "resume" in folders or (_HASH.fullmatch(here.name) and "lock" in files and not names & _CHAIN):
            folders.clear()
            yield LeftOut(here, "not finished")
    for error in refused:
        yield LeftOut(Path(str(error.filename)), f"cannot be read: {error.strerror}")


def _has_all(run: Run) -> bool:
    """Whether a result holds what the report reads of it, which its schema leaves open."""
    try:
        held = all(name in getattr(run.result, part) for part, names in _READ.items() for name in names)
        return held and bool(run.settings) and run.result.score is not None
    except (AttributeError, KeyError, TypeError):
        return False


def _once(runs: Sequence[Run], left_out: list[LeftOut]) -> Iterator[Run]:
    """Each run once; where it is not clear which of several is meant, none of them."""
    alike: Mapping[object, list[Run]] = defaultdict(list)
    for run in runs:
        alike[_identity(run)].append(run)
    for first, *others in alike.values():
        contradicting = [run for run in others if not _same(first, run)]
        if contradicting:
            for run in (first, *others):
                other = contradicting[0] if run is first else first
                why = f"recorded exactly as {other.folder}, but its scores differ: keep the one that is meant"
                left_out.append(LeftOut(run.folder, why))
            continue
        left_out += [LeftOut(run.folder, f"the same run as {first.folder}, counted there") for run in others]
        yield first


def _identity(run: Run) -> object:
    """What may be in the report once. Many prunings of a seed are tried, and one is the seed's final run."""
    result = run.result
    own = "" if result.split == "final" else text(dict(result.method))
    return (run.task, run.method, result.split, result.seed, own, tuple(sorted(run.settings.items())))


def _same(one: Run, other: Run) -> bool:
    """Whether two runs that are recorded alike are copies, or repetitions that came to the same."""
    if one.folder.name == other.folder.name and _HASH.fullmatch(one.folder.name):
        return True
    return (one.result.status, one.result.metrics) == (other.result.status, other.result.metrics)
