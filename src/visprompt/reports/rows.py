"""Puts final runs into the rows of a table: which runs are averaged, which are not, and which rows compare.

A row is a method with its options on a backbone, with one preprocessing, source and form of the data,
precision and fraction. From task to task it may differ in what a recipe's row or a grid chose for the task:
learning rate, weight decay, epochs, number of prompts and the like. Within a task nothing differs but the
seed (`result.cell` refuses it). Where the runs of a task differ in more, they stand in several rows; if the
recorded grid of `split=tune` says which of them validation chose, that one stands in the row of the other
tasks as well.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from visprompt.errors import unknown
from visprompt.reports.choices import chosen
from visprompt.reports.load import UNPRUNED, LeftOut, at, columns, differing, groups, held
from visprompt.reports.settings import (
    OF_EACH_TASK,
    TRAINING,
    UNRECORDED,
    built,
    differences,
    family,
    is_protocol,
    labels,
    method_place,
    scope,
    task_place,
    telling,
    words,
)
from visprompt.runs.result import Cell, cell

_REFERENCES = ("full", "linear")  # what other methods are compared with, unless another is named
_IN_NO_MEAN = "it has no test score, and its seed is in no mean"
_NO_SCORE = {
    "diverged": f"diverged at step {{}}: {_IN_NO_MEAN}",
    "unscored": f"trained without test images (data.test=none): {_IN_NO_MEAN}",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Runs of one method that may stand side by side.

    Attributes:
        label: The method, and what tells this row from its others.
        method: Its name.
        backbone: Name of the backbone.
        cells: Test accuracies by task.
        why: What makes it a row apart, and how its tasks are trained differently; "" for the only row of a
            method where they are trained alike.
        runs: Its runs, all of `split=final` and with a test score.
        told: Settings of all its runs by key, those of a family under "key (family)".
    """

    label: str
    method: str
    backbone: str
    cells: Mapping[str, Cell]
    why: str
    runs: pd.DataFrame
    told: Mapping[str, str]


@dataclass
class _Part:
    """A row in the making: its runs, what divisions say of all of them, and what they left behind."""

    runs: pd.DataFrame
    told: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def rows(runs: pd.DataFrame) -> list[Row]:
    """Return rows in the order of `METHODS`; runs of `split=tune` settle which runs are the chosen ones.

    A run may stand in two rows: in that of its setting, and in that of what was chosen.
    """
    finals = runs[(runs["split"] == "final") & (runs["status"] == "finished")]
    tried = runs[(runs["split"] == "tune") & (runs["pruning"] == UNPRUNED)]
    parts = []
    for of_method in groups(finals, ["method"]):
        for alike in groups(of_method, columns(of_method, "row")):
            parts += _divided(alike, tried)
    return sorted(_labelled(parts), key=lambda row: (method_place(row.method), -len(row.cells), row.label))


def without_score(runs: pd.DataFrame) -> list[LeftOut]:
    """Return final runs without a test score: their seeds are in no mean."""
    found = runs[(runs["split"] == "final") & runs["status"].isin(_NO_SCORE)]
    pairs = zip(found["folder"], found["result"], strict=True)
    return [
        LeftOut(folder, _NO_SCORE[result.status].format(result.diverged_step)) for folder, result in pairs
    ]


def _divided(runs: pd.DataFrame, tried: pd.DataFrame) -> list[_Part]:
    """Divide runs that share all settings of a row: by family, by the facts of a task, by what was chosen."""

    def settle(own: pd.DataFrame) -> pd.DataFrame:
        """Return those of a task's runs that validation chose; none where that is not known."""
        best = chosen(tried[tried["base"] == own["base"].iat[0]], own)
        variants = groups(own, columns(own, "chosen"))
        found = [part for part in variants if best is not None and part["choice"].iat[0] == best["choice"]]
        return found[0] if len(found) == 1 else own[:0]

    parts = _divide(_Part(runs), "family", "family")
    parts = [piece for part in parts for piece in _divide(part, "task", "task")]
    return [piece for part in parts for piece in _divide(part, "chosen", "task", settle)]


def _divide(
    part: _Part, reach: str, unit: str, settle: Callable[[pd.DataFrame], pd.DataFrame] = lambda own: own[:0]
) -> list[_Part]:
    """Divide a part of which a unit (a task, or a family) has runs with different settings.

    Args:
        part: Runs.
        reach: The scope of the settings that should be the same within a unit.
        unit: The column that names the unit.
        settle: Returns those of a unit's runs that were chosen, none where that is not known.

    Returns:
        A part with the units that have one setting and with the chosen runs of the others; and for each value
        of the settings that differ a part with all runs of those other units that have it.
    """
    units = {own[unit].iat[0]: own for own in groups(part.runs, [unit])}
    by_unit = {name: differing(own, columns(own, reach)) for name, own in units.items()}
    keys = sorted({key for found in by_unit.values() for key in found})
    if not keys:
        return [part]
    torn = [name for name, found in by_unit.items() if found]
    settled = {name: settle(units[name]) for name in torn}
    main = pd.concat([settled.get(name, own) for name, own in units.items()])
    variants = groups(pd.concat([units[name] for name in torn]), keys)
    if len(main) and not differing(main, keys):  # the same everywhere: it joins the variant that has it
        same = [at(variant, keys) == at(main, keys) for variant in variants]
        if any(same):
            joined = pd.concat([variants[same.index(True)], main])
            variants[same.index(True)] = joined[~joined.index.duplicated()]
            main = main[:0]
    told = [] if reach == "family" else keys  # a family's are told of every row
    parts = []
    if len(main):
        remarks = (*part.remarks, *_remarks(settled, keys))
        parts.append(_Part(main, part.told | dict.fromkeys(told, OF_EACH_TASK), remarks))
    for variant in variants:
        if not set(variant.index) <= set(main.index):
            parts.append(
                _Part(variant, part.told | dict(zip(told, at(variant, told), strict=True)), part.remarks)
            )
    return parts


def _remarks(settled: Mapping[str, pd.DataFrame], keys: Sequence[str]) -> Iterable[str]:
    """Yield what a row that stands between others has to say of the units that have several settings."""
    named = ", ".join(map(words, keys))
    if known := [unit for unit, runs in settled.items() if len(runs)]:
        yield f"runs of {', '.join(known)} differ in {named}: here stand those that validation chose"
    if unsettled := [unit for unit, runs in settled.items() if not len(runs)]:
        names = ", ".join(unsettled)
        yield f"runs of {names} differ in {named}, and nothing chose: they have rows of their own"


def _labelled(parts: Sequence[_Part]) -> list[Row]:
    """Return rows whose labels tell all rows' protocols apart, and then the rows of a method."""
    told = [known | part.told for part, known in zip(parts, held([part.runs for part in parts]), strict=True)]
    methods = [part.runs["method"].iat[0] for part in parts]
    names = [
        [method, *said]
        for method, said in zip(methods, telling([_only(one, True) for one in told]), strict=True)
    ]
    whys = [""] * len(parts)
    for method in set(methods):
        places = [i for i, name in enumerate(methods) if name == method]
        own = [told[i] for i in places]
        for i, said, why in zip(
            places, telling([_only(one, False) for one in own]), differences(own), strict=True
        ):
            names[i] += said
            whys[i] = "; ".join(text for text in (why, *parts[i].remarks, *_training(parts[i])) if text)
    return [_row(*made) for made in zip(parts, labels(names), whys, told, strict=True)]


def _training(part: _Part) -> Iterable[str]:
    """Yield what a row has to say of how its tasks are trained."""
    different = differing(part.runs, [key for key in TRAINING if key not in part.told])
    if different:
        yield f"different from task to task: {', '.join(words(key) for key in TRAINING if key in different)}"


def _only(told: Mapping[str, str], protocol: bool) -> dict[str, str]:
    return {key: value for key, value in told.items() if is_protocol(key) == protocol}


def _row(part: _Part, label: str, why: str, told: Mapping[str, str]) -> Row:
    runs = part.runs
    runs = runs.loc[sorted(runs.index, key=lambda i: (task_place(runs["task"][i]), runs["seed"][i]))]
    method, backbone = runs["method"].iat[0], str(runs["result"].iat[0].backbone["name"])
    cells = {own["task"].iat[0]: cell(map(built, own["result"])) for own in groups(runs, ["task"])}
    return Row(label=label, method=method, backbone=backbone, cells=cells, why=why, runs=runs, told=told)


# which rows compare


@dataclass(frozen=True)
class Protocol:
    """Rows with the same backbone, data, preprocessing and precision.

    Attributes:
        words: What the labels of all of them say, so that it need not be said of each; "" where that is
            nothing.
        rows: In their order.
    """

    words: str
    rows: tuple[Row, ...]

    def name(self, row: Row) -> str:
        """Return a row's label without what is said of all."""
        said = _phrases(self.words)
        return ", ".join(part for part in _phrases(row.label) if part not in said)

    def titled(self, title: str) -> str:
        """Return a title that says which protocol it is of."""
        return f"{title}, {self.words}" if self.words else title


def protocols(rows: Sequence[Row]) -> list[Protocol]:
    """Divide rows by protocol, in the order in which their first rows stand."""
    found: list[list[Row]] = []
    for row in rows:
        alike = next((one for one in found if all(same_protocol(row, other) for other in one)), None)
        if alike is None:
            found.append([row])
        else:
            alike.append(row)
    return [Protocol(_shared_words([row.label for row in one]), tuple(one)) for one in found]


def _shared_words(labels: Sequence[str]) -> str:
    """Return what all labels say after the name of the method."""
    others = [set(_phrases(label)[1:]) for label in labels]
    return ", ".join(part for part in _phrases(labels[0])[1:] if all(part in said for said in others))


def _phrases(label: str) -> list[str]:
    return label.split(", ") if label else []


def same_protocol(one: Row, other: Row) -> bool:
    """Return whether two rows have the same backbone, data, preprocessing and precision, so compare."""
    shared = {f"({family(task)})" for task in one.cells} & {f"({family(task)})" for task in other.cells}
    keys = {key for key in one.told.keys() | other.told.keys() if _is_shared(key, shared)}
    alike = all(one.told.get(key, UNRECORDED) == other.told.get(key, UNRECORDED) for key in keys)
    images, others = (
        dict(zip(row.runs["task"], row.runs["data.fingerprint"], strict=True)) for row in (one, other)
    )
    return alike and all(images[task] == others[task] for task in images.keys() & others.keys())


def _is_shared(key: str, families: Collection[str]) -> bool:
    """Return whether a setting is of the protocol of all tasks, or of those of some families."""
    name, _, bracket = key.partition(" ")
    return is_protocol(name) and scope(name, "") != "task" and (not bracket or bracket in families)


def full_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the row of full fine-tuning that a row may be compared with, or None."""
    alike = (other for other in rows if other.method == "full" and same_protocol(row, other))
    return max(alike, key=lambda other: len(other.cells.keys() & row.cells.keys()), default=None)


def references(found: Sequence[Protocol], against: str | None) -> list[tuple[Protocol, Row]]:
    """Return the row of each protocol that its others are compared with: of its method that of most tasks.

    Args:
        found: Protocols; those without a row of the method, or with no other, have no reference.
        against: Name of a method. None: full fine-tuning or, where a protocol has none, linear probing.

    Raises:
        UserError: No row is of the method that was named.
    """
    methods = {row.method for protocol in found for row in protocol.rows}
    if against is not None and against not in methods:
        raise unknown("method to compare with among these runs", against, methods)
    taken = []
    for protocol in (one for one in found if len(one.rows) > 1):
        for method in _REFERENCES if against is None else (against,):
            own = [row for row in protocol.rows if row.method == method]
            if own:
                taken.append((protocol, max(own, key=lambda row: len(row.cells))))
                break
    return taken
