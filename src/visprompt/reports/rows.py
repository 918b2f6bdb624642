"""Puts final runs into the rows of a table: which runs are averaged, and which rows are comparable.

A row is a method with its options on a backbone, with one preprocessing, source and form of the data,
precision and fraction. From task to task it may differ in what a recipe's row or a grid chose for the task:
learning rate, weight decay, epochs, number of prompts and the like. Within a task only the seed differs
(`result.cell` refuses anything else). If the runs of a task differ in more, they are put into several rows;
if the recorded grid of `split=tune` shows which of them validation chose, that one is in the row of the other
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
    """A row of a table: runs of one method that belong together.

    Attributes:
        label: The method, and what distinguishes this row from other rows of the method.
        method: Name of the method.
        backbone: Name of the backbone.
        cells: Test accuracies by task.
        why: Why it is a separate row, and what differs in training between its tasks; "" if it is the only
            row of the method and nothing differs.
        runs: Its runs, all of `split=final` and with a test score.
        told: Settings that all its runs share by key, those of a family under "key (family)".
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
    """A row in the making: its runs, settings by which `_divide` separated it, and remarks for `Row.why`."""

    runs: pd.DataFrame
    told: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def rows(runs: pd.DataFrame) -> list[Row]:
    """Return rows in the order of `METHODS`; runs of `split=tune` decide which runs are the chosen ones.

    A run may be in two rows: in that of its settings, and in that of what was chosen for each task.
    """
    finals = runs[(runs["split"] == "final") & (runs["status"] == "finished")]
    tried = runs[(runs["split"] == "tune") & (runs["pruning"] == UNPRUNED)]
    parts = []
    for of_method in groups(finals, ["method"]):
        for alike in groups(of_method, columns(of_method, "row")):
            parts += _divided(alike, tried)
    return sorted(_labelled(parts), key=lambda row: (method_place(row.method), -len(row.cells), row.label))


def without_score(runs: pd.DataFrame) -> list[LeftOut]:
    """Return the final runs without a test score, which no mean includes."""
    found = runs[(runs["split"] == "final") & runs["status"].isin(_NO_SCORE)]
    pairs = zip(found["folder"], found["result"], strict=True)
    return [
        LeftOut(folder, _NO_SCORE[result.status].format(result.diverged_step)) for folder, result in pairs
    ]


def _divided(runs: pd.DataFrame, tried: pd.DataFrame) -> list[_Part]:
    """Divide runs with the same settings of scope "row" by the other scopes; see `settings.scope`."""

    def settle(own: pd.DataFrame) -> pd.DataFrame:
        """Return the runs of a task that validation chose; no runs if that is not known."""
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
    """Divide a part so that the runs of each unit (a task, or a family) in it have the same settings.

    For example, digits was trained with rate 0.1 only, and digits_loc with 0.1 and 0.4, of which validation
    chose 0.4. The result is a part with digits and with digits_loc at 0.4, then one with digits_loc at 0.1.

    Args:
        part: The part to divide.
        reach: The scope of the settings that should be the same within a unit.
        unit: The column that names the unit, "task" or "family".
        settle: Returns the runs of a unit that were chosen; no runs if that is not known.

    Returns:
        A part with all units that have the same settings throughout and the chosen runs of the other units;
        then, for each combination of values of the differing settings, a part with the runs of the other
        units that have it, unless they are all in the first part.
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
    if len(main) and not differing(main, keys):  # main has one combination of values: it joins that variant
        same = [at(variant, keys) == at(main, keys) for variant in variants]
        if any(same):
            joined = pd.concat([variants[same.index(True)], main])
            variants[same.index(True)] = joined[~joined.index.duplicated()]
            main = main[:0]
    told = [] if reach == "family" else keys  # `held` returns those of a family for every row
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
    """Yield remarks on the units of which a row has only the chosen runs, or no runs."""
    named = ", ".join(map(words, keys))
    if known := [unit for unit, runs in settled.items() if len(runs)]:
        yield f"runs of {', '.join(known)} differ in {named}: this row has those that validation chose"
    if unsettled := [unit for unit, runs in settled.items() if not len(runs)]:
        names = ", ".join(unsettled)
        yield f"runs of {names} differ in {named}, and no recorded grid chose one: they are in separate rows"


def _labelled(parts: Sequence[_Part]) -> list[Row]:
    """Return rows whose labels distinguish the protocols of all rows, and then the rows of a method."""
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
    """Yield a remark if tasks of a row are trained differently."""
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


# which rows are comparable


@dataclass(frozen=True)
class Protocol:
    """Rows with the same backbone, data, preprocessing and precision.

    Attributes:
        words: The phrases that the labels of all its rows have in common; "" if there are none in common.
        rows: The rows, in the given order.
    """

    words: str
    rows: tuple[Row, ...]

    def name(self, row: Row) -> str:
        """Return a row's label without the phrases that all rows of the protocol have."""
        said = _phrases(self.words)
        return ", ".join(part for part in _phrases(row.label) if part not in said)

    def titled(self, title: str) -> str:
        """Return a title with the words of the protocol."""
        return f"{title}, {self.words}" if self.words else title


def protocols(rows: Sequence[Row]) -> list[Protocol]:
    """Group rows by protocol, in the order of the first row of each."""
    found: list[list[Row]] = []
    for row in rows:
        alike = next((one for one in found if all(same_protocol(row, other) for other in one)), None)
        if alike is None:
            found.append([row])
        else:
            alike.append(row)
    return [Protocol(_shared_words([row.label for row in one]), tuple(one)) for one in found]


def _shared_words(labels: Sequence[str]) -> str:
    """Return the phrases that all labels have after the name of the method."""
    others = [set(_phrases(label)[1:]) for label in labels]
    return ", ".join(part for part in _phrases(labels[0])[1:] if all(part in said for said in others))


def _phrases(label: str) -> list[str]:
    return label.split(", ") if label else []


def same_protocol(one: Row, other: Row) -> bool:
    """Return whether two rows are comparable: with the same backbone, data, preprocessing and precision."""
    shared = {f"({name})" for name in {*one.runs["family"]} & {*other.runs["family"]}}
    keys = {key for key in one.told.keys() | other.told.keys() if _is_shared(key, shared)}
    alike = all(one.told.get(key, UNRECORDED) == other.told.get(key, UNRECORDED) for key in keys)
    images, others = (
        dict(zip(row.runs["task"], row.runs["data.fingerprint"], strict=True)) for row in (one, other)
    )
    return alike and all(images[task] == others[task] for task in images.keys() & others.keys())


def _is_shared(key: str, families: Collection[str]) -> bool:
    """Return whether a setting belongs to the protocol of all tasks or of the tasks of some families."""
    name, _, bracket = key.partition(" ")
    return is_protocol(name) and scope(name, "") != "task" and (not bracket or bracket in families)


def full_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the row of full fine-tuning with the same protocol and most common tasks, or None."""
    alike = (other for other in rows if other.method == "full" and same_protocol(row, other))
    return max(alike, key=lambda other: len(other.cells.keys() & row.cells.keys()), default=None)


def references(found: Sequence[Protocol], against: str | None) -> list[tuple[Protocol, Row]]:
    """Return each protocol with its reference, the row of the method `against` with most tasks.

    Args:
        found: Protocols; one that has a single row, or no row of the method, is left out.
        against: Name of a method. None: full fine-tuning or, in a protocol without it, linear probing.

    Raises:
        UserError: No row is of the method `against`.
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
