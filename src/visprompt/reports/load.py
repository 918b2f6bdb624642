"""Loads runs from folders into one DataFrame, with a row for each run and a column for each setting and cost.

Every column has dtype object: pandas would infer Arrow strings, which cannot hold a folder's name that is not
UTF-8.
"""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from visprompt.errors import UserError
from visprompt.reports.settings import (
    ADDED_LATER,
    FIXED_COLUMNS,
    UNRECORDED,
    before_the_choice,
    family,
    is_protocol,
    label,
    scope,
    settings,
    text,
)
from visprompt.runs.copies import has_states
from visprompt.runs.result import Result, read_result
from visprompt.runs.run_folder import COMPLETE, RESUME
from visprompt.runs.run_lock import tidy

UNPRUNED = "none"  # in the column "pruning"
FIGURES = ("parameters", "head_parameters", "share", "bytes", "macs", "train_s")
_FACTS = (
    *("folder", "result", "task", "method", "family", "split", "status", "seed", "attempt"),
    *("options", "pruning", "shared", "base", "choice", "grid", "point", *FIGURES),
)
_HASH = re.compile(r"[0-9a-f]{12}")  # what a run's folder is called
# files in the folder of a pruning chain, which is not a run's
_CHAIN = frozenset({"initial.json", "importance.json", "masks.json"})
_DAMAGED = (
    "damaged, or of another version of visprompt: result.json or the tuned state is incomplete; run "
    "the same command again"
)
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
# counts that a record may lack
_OPTIONAL = frozenset({"num_tokens", "macs", "depth", "kept_tokens", "threads"})


@dataclass(frozen=True)
class LeftOut:
    """A folder that is not in the report, and the reason in words."""

    folder: Path
    why: str


@dataclass(frozen=True, eq=False)
class Survey:
    """All runs below some folders.

    Attributes:
        runs: Finished runs, including diverged ones, each once; see `frame`.
        left_out: All other folders of runs.
    """

    runs: pd.DataFrame
    left_out: tuple[LeftOut, ...]


def survey(folders: Sequence[Path]) -> Survey:
    """Load all runs below some folders, at any depth and through links; of copies the last attempt is taken.

    Raises:
        UserError: One of the paths is not a folder.
    """
    loaded: list[dict[str, Any]] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder} to read runs from: name one that holds runs, as logs does"
            )
        for item in _walk(folder, seen):
            (left_out if isinstance(item, LeftOut) else loaded).append(item)  # type: ignore[arg-type]
    runs = _each_once(_frame(loaded), left_out)
    return Survey(runs, tuple(left_out))


def read_runs(folders: Sequence[Path]) -> pd.DataFrame:
    """Return only the runs of `survey`."""
    return survey(folders).runs


def frame(results: Iterable[tuple[Path, Result]]) -> pd.DataFrame:
    """Build the table of runs.

    There is a column for each setting (such as "recipe.lr", see `settings`) and for each of `FIGURES`, and:

    - folder, result, task, method, family, split, status, seed, attempt, options: As recorded.
    - pruning: "of seed 42" for a run of a pruning chain, else "none".
    - shared: The settings that were not chosen for the task, as a dict: a final run has these in common with
      the points of its grid.
    - base: Task, method and `shared` as one text, to group by.
    - choice: The settings that a recipe's row or a grid chose for the task, without pruning, as one text.
    - grid, point: A text for the grid that a run of `split=tune` belongs to, and one for the point in the
      grid; seeds of a point share it.
    """
    return _frame([_record(folder, result) for folder, result in results])


def groups(runs: pd.DataFrame, keys: Sequence[str]) -> list[pd.DataFrame]:
    """Divide runs by their values in some columns; groups are in the order of their first runs.

    DataFrame.groupby would convert the values to Arrow strings, and sort them.
    """
    places: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, (_, *values) in enumerate(zip(runs.index, *(runs[key] for key in keys), strict=True)):
        places[tuple(values)].append(place)
    return [runs.iloc[group] for group in places.values()]


def columns(runs: pd.DataFrame, *reaches: str) -> list[str]:
    """Return the columns of settings of some scopes (see `settings.scope`); the runs are of one method."""
    method = runs["method"].iat[0] if len(runs) else ""
    return [key for key in runs.columns if _is_setting(key) and scope(key, method) in reaches]


def differing(runs: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Return the columns, out of some, in which runs differ; sorted."""
    counts = [runs[key].nunique(dropna=False) for key in keys]
    return sorted(key for key, count in zip(keys, counts, strict=True) if count > 1)


def recorded(runs: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Return the settings, out of some, that at least one of the runs recorded."""
    return [key for key in keys if (runs[key] != UNRECORDED).any()]


def at(runs: pd.DataFrame, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the first run's values in some columns."""
    return tuple(runs[key].iat[0] for key in keys)


def held(parts: Sequence[pd.DataFrame]) -> list[dict[str, str]]:
    """Return the settings that all runs of a part share, for each part.

    These are the settings of the scope "row" by key, and those of the scope "family" under "key (family)". A
    part's runs are of one method and share both. A setting that no run of a part recorded is `UNRECORDED` if
    it was recorded elsewhere: a setting of the protocol in any part, a method's setting in a part of the same
    method, a family's setting by runs of the same family. Otherwise it is left out.
    """
    if not parts:
        return []
    everything = pd.concat(parts)
    protocol = recorded(everything, [key for key in columns(everything, "row") if is_protocol(key)])
    found = []
    for part in parts:
        alike = everything[everything["method"] == part["method"].iat[0]]
        own = recorded(alike, [key for key in columns(part, "row") if not is_protocol(key)])
        keys = sorted({*protocol, *own})
        told = dict(zip(keys, at(part, keys), strict=True))
        for tasks in groups(part, ["family"]):
            name = tasks["family"].iat[0]
            of_family = recorded(everything[everything["family"] == name], columns(part, "family"))
            told |= {f"{key} ({name})": tasks[key].iat[-1] for key in of_family}
        found.append(told)
    return found


def history(folder: Path, result: Result, metric: str) -> dict[int, float]:
    """Return the values of a metric that a run logged after each epoch.

    Returns:
        Finite values by epoch, counted from 1. Empty if the folder has no metrics.csv, or one whose sha256 is
        not that which the result recorded (older results recorded none).
    """
    values: dict[int, float] = {}
    try:
        data = (folder / "metrics.csv").read_bytes()
        if result.files.get("metrics.csv") not in (None, sha256(data).hexdigest()):
            return {}
        lines = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    except (OSError, ValueError, csv.Error):
        return {}
    for line in lines:
        with suppress(KeyError, TypeError, ValueError):  # a column that is not there, or an empty cell
            if isfinite(value := float(line[metric])):
                values[int(line["epoch"]) + 1] = value
    return values


def _is_setting(column: str) -> bool:
    return "." in column or column in ("precision", "trainer")


def _frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    keys = sorted({key for record in records for key in record if _is_setting(key)} | FIXED_COLUMNS)
    cells = [
        [record.get(column, ADDED_LATER.get(column, UNRECORDED)) for column in (*_FACTS, *keys)]
        for record in records
    ]
    return pd.DataFrame(cells, columns=pd.Index([*_FACTS, *keys], dtype=object), dtype=object)


def _record(folder: Path, result: Result) -> dict[str, Any]:
    """Return a row of the table."""
    method, found = str(result.method["name"]), settings(result)
    # most tables are of accuracies: a task with another score says so wherever it is named
    task = label(result.task, result.kind)
    # a run of a chain names the initial values that it starts from
    prunes = result.method.get("initial") is not None
    reach = {key: scope(key, method) for key in found}
    shared = {key: value for key, value in found.items() if reach[key] in ("row", "family")}
    shared = before_the_choice(shared) | {"data.fingerprint": found.get("data.fingerprint", UNRECORDED)}
    chosen = {key: value for key, value in found.items() if reach[key] == "chosen"}
    options, pruning = text(dict(result.method)), f"of seed {result.seed}" if prunes else UNPRUNED
    base, choice = text([task, method, shared]), text(before_the_choice(chosen))
    facts = {
        **{"folder": folder, "result": result, "task": task, "method": method},
        "family": family(result.task, result.kind),
        **{"split": result.split, "status": result.status, "seed": result.seed, "attempt": result.attempt},
        **{"options": options, "pruning": pruning, "shared": shared, "base": base, "choice": choice},
        "grid": text([base, pruning, choice if prunes else ""]),  # a chain prunes after all else was chosen
        "point": options if prunes else choice,  # a chain is of one seed: every run of it is a point
    }
    figures = {name: result.tuned.get(name) for name in FIGURES} | {"train_s": result.time.get("train_s")}
    return facts | figures | found


def _walk(top: Path, seen: set[str]) -> Iterator[dict[str, Any] | LeftOut]:
    """Walk a folder and follow links; each real folder is visited once."""
    refused: list[OSError] = []
    for path, folders, files in os.walk(top, followlinks=True, onerror=refused.append):
        here, true = Path(path), os.path.realpath(path)
        if true in seen:
            folders.clear()
            continue
        seen.add(true)
        folders.sort()
        names = {*folders, *files}
        if names & {"result.json", RESUME, COMPLETE}:
            tidy(here)
            names = {path.name for path in here.iterdir()}
        if "result.json" in names:
            folders.clear()  # folders inside a run's folder belong to the run
            yield _load(here)
        elif RESUME in names or (_HASH.fullmatch(here.name) and "lock" in files and not names & _CHAIN):
            folders.clear()
            yield LeftOut(here, "not finished")
    for error in refused:
        yield LeftOut(Path(str(error.filename)), f"cannot be read: {error.strerror}")


def _load(folder: Path) -> dict[str, Any] | LeftOut:
    """Load a run whose folder holds a result.json."""
    # hashing thousands of states would be slow
    result = read_result(folder, hashed=False, with_state=has_states(folder))
    try:
        if result is None or not all(_is_of(*value) for value in _read(result)):
            return LeftOut(folder, _DAMAGED)
        record = _record(folder, result)
    except (AttributeError, KeyError, TypeError):
        return LeftOut(folder, _DAMAGED)
    return LeftOut(folder, "a debug run, which is no result") if "debug" in result.tags else record


def _read(result: Result) -> Iterator[tuple[Any, type | tuple[type, ...]]]:
    """Yield the values of a result that the report reads, each with the type that it should have."""
    prunes = result.method.get("initial") is not None
    for part, kinds in _READ.items():
        for name, kind in kinds.items():
            needed = name not in _OPTIONAL or (prunes and name == "kept_tokens")
            yield getattr(result, part).get(name, None if needed else 0), kind
    if result.status == "finished":
        yield result.score, _NUMBER


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Return whether a value is of a type; a number must be finite, and bool is not a number."""
    if isinstance(value, int | float) and (isinstance(value, bool) or not isfinite(value)):
        return False
    return isinstance(value, kind)


def _each_once(runs: pd.DataFrame, left_out: list[LeftOut]) -> pd.DataFrame:
    """Return each run once; of runs with the same settings but contradicting scores, none.

    Runs of `split=tune` are identified by the method's options too: many prunings of a seed are tried, but
    only one of them is the final run.
    """
    told = runs.assign(options=runs["options"].where(runs["split"] == "tune", ""))
    keys = ["task", "method", "split", "seed", "options", *filter(_is_setting, runs.columns)]
    taken = []
    for alike in groups(told, keys):
        first, *others = sorted(alike.index, key=lambda i: -alike["attempt"][i])  # the last attempt counts
        contradicting = [other for other in others if not _same(runs.loc[first], runs.loc[other])]
        if contradicting:
            for one in (first, *others):
                other = runs["folder"][contradicting[0] if one == first else first]
                why = f"recorded exactly as {other}, but its scores differ: keep the one that is meant"
                left_out.append(LeftOut(runs["folder"][one], why))
            continue
        left_out += [
            LeftOut(runs["folder"][other], _counted(runs.loc[first], runs.loc[other])) for other in others
        ]
        taken.append(first)
    return runs.loc[taken].reset_index(drop=True)


def _same(one: pd.Series, other: pd.Series) -> bool:
    """Return whether two runs of the same settings are copies, or repetitions with the same scores."""
    is_copy = one["folder"].name == other["folder"].name and _HASH.fullmatch(one["folder"].name)
    return bool(is_copy) or _scores(one) == _scores(other)


def _scores(run: pd.Series) -> object:
    return (run["status"], run["result"].metrics)


def _counted(first: pd.Series, other: pd.Series) -> str:
    """Return why `other`, which is the same run as `first`, is not counted."""
    attempts = (first["attempt"], other["attempt"])
    said = "" if attempts[0] == attempts[1] else f" (attempt {attempts[0]}; here is attempt {attempts[1]})"
    scores = "" if _scores(first) == _scores(other) else ", though its scores differ"
    return f"the same run as {first['folder']}, counted there{said}{scores}"
