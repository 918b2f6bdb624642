"""Any folder of runs as rows of a table: which runs are put together, which are not, and why.

A row is a method with its options on a backbone, with one preprocessing, source and form of the data, precision and
fraction. From task to task it may differ in what a recipe's row or a grid chose for the task: learning rate, weight
decay, epochs, number of prompts and the like. Within a task nothing differs but the seed (`results.cell` refuses it).
Where the runs of a task differ in more, they stand in several rows; if the recorded grid of `split=tune` says which of
them validation chose, that one stands in the row of the other tasks as well.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from visprompt.reports.choices import Grid, chosen, grids
from visprompt.reports.folders import LeftOut, Survey, read_runs, survey
from visprompt.reports.runs import Run, Values, differing, grouped, held, method_place, task_place
from visprompt.reports.settings import OF_EACH_TASK, UNRECORDED, built, differences, is_protocol, labels, telling, words
from visprompt.runs.result import Cell, cell

_Settle = Callable[[Mapping[Values, list[Run]]], list[Run]]
_TRAINING = tuple(f"recipe.{name}" for name in ("optimizer", "epochs", "batch_size", "head_init"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs of one method that may stand side by side.

    Attributes:
        label: The method, and what tells this row from its others.
        method: Its name.
        backbone: Name of the backbone.
        cells: Test accuracies by task.
        why: What makes it a row of its own, and how its tasks are trained differently; "" for the only row of a method
            where they are trained alike.
        runs: Its runs, all of `split=final` and with a test score.
        told: Settings of all its runs by key, those of a family under "key (family)".
    """

    label: str
    method: str
    backbone: str
    cells: Mapping[str, Cell]
    why: str
    runs: tuple[Run, ...]
    told: Mapping[str, str]


@dataclass
class _Part:
    """A row in the making: its runs, what divisions say of all of them, and what they left behind."""

    runs: list[Run]
    told: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def rows(runs: Sequence[Run]) -> list[Row]:
    """Puts final runs into rows; runs of `split=tune` settle which of a task's runs is the chosen one.

    Args:
        runs: Each once, as `read_runs` returns them.

    Returns:
        Rows in the order of `METHODS`. A run may stand in two: in that of its setting, and in that of what was chosen.
    """
    finals = [run for run in runs if run.result.split == "final" and run.result.status == "finished"]
    tried = grouped((run for run in runs if run.result.split == "tune" and not run.prunes), lambda run: run.base)
    alike = grouped(finals, lambda run: (run.method, run.values("row")))
    made = _labelled([part for found in alike.values() for part in _parts(found, tried)])
    return sorted(made, key=lambda row: (method_place(row.method), -len(row.cells), row.label))


def diverged(runs: Sequence[Run]) -> list[LeftOut]:
    """Final runs without a test score: their seeds are in no mean."""
    whys = {
        "diverged": "diverged at step {}: it has no test score, and its seed is in no mean",
        "unscored": "trained without test images (data.test=none): it has no test score, and its seed is in no mean",
    }
    found = [run for run in runs if run.result.split == "final" and run.result.status in whys]
    return [LeftOut(run.folder, whys[run.result.status].format(run.result.diverged_step)) for run in found]


def _parts(finals: list[Run], tried: Mapping[tuple[object, ...], list[Run]]) -> list[_Part]:
    """Divides final runs that share all settings of a row: by family, by the facts of a task, by what was chosen."""

    def settle(variants: Mapping[Values, list[Run]]) -> list[Run]:
        final = [run for runs in variants.values() for run in runs]
        best = chosen(tried.get(final[0].base, []), final)
        found = [runs for runs in variants.values() if best is not None and runs[0].choice == best.choice]
        return found[0] if len(found) == 1 else []

    parts = _divide(_Part(finals), "family", lambda run: run.family)
    parts = [piece for part in parts for piece in _divide(part, "task", lambda run: run.task)]
    return [piece for part in parts for piece in _divide(part, "chosen", lambda run: run.task, settle)]


def _divide(part: _Part, reach: str, unit_of: Callable[[Run], str], settle: _Settle | None = None) -> list[_Part]:
    """Divides a part in which runs of one unit, a task or a family, differ in what should hold for all of it.

    Args:
        part: Runs.
        reach: The scope of the settings in question.
        unit_of: The unit of a run.
        settle: Of a unit's variants those runs that were chosen, none where that is not known.

    Returns:
        One part of the units that do not differ in themselves, with the chosen runs of the others; and for each value
        of the settings in question a part of the units that do.
    """
    units = grouped(part.runs, unit_of)
    variants = {unit: grouped(runs, lambda run: run.values(reach)) for unit, runs in units.items()}
    torn = {unit: found for unit, found in variants.items() if len(found) > 1}
    if not torn:
        return [part]
    keys = sorted({key for found in torn.values() for key in differing(found)})
    settled = {unit: settle(found) if settle else [] for unit, found in torn.items()}
    main = [run for unit, runs in units.items() for run in (settled[unit] if unit in torn else runs)]
    own = grouped((run for unit in torn for run in units[unit]), lambda run: run.at(keys))
    if len({run.at(keys) for run in main}) == 1 and (values := main[0].at(keys)) in own:
        own[values] = list(dict.fromkeys([*own[values], *main]))  # the same everywhere: a row like those beside it
        main = []
    told = [] if reach == "family" else keys  # a family's are told of every row
    remarks = (*part.remarks, *_remarks(settled, keys))
    parts = [_Part(main, part.told | dict.fromkeys(told, OF_EACH_TASK), remarks)] if main else []
    for values, runs in own.items():
        if not set(runs) <= set(main):
            parts.append(_Part(runs, part.told | dict(zip(told, values, strict=False)), part.remarks))
    return parts


def _remarks(settled: Mapping[str, list[Run]], keys: Sequence[str]) -> Iterable[str]:
    """What a row that stands between others has to say of the units that have several settings."""
    named = ", ".join(map(words, keys))
    if known := [unit for unit, runs in settled.items() if runs]:
        yield f"runs of {', '.join(known)} differ in {named}: here stand those that validation chose"
    if unknown := [unit for unit, runs in settled.items() if not runs]:
        yield f"runs of {', '.join(unknown)} differ in {named}, and nothing chose: they have rows of their own"


def _labelled(parts: Sequence[_Part]) -> list[Row]:
    """Labels say what tells all rows' protocols apart, and then what tells rows of one method apart."""
    methods = [part.runs[0].method for part in parts]
    told = [known | part.told for part, known in zip(parts, held([part.runs for part in parts]), strict=True)]
    names = [[method, *said] for method, said in zip(methods, telling([_only(one, True) for one in told]), strict=True)]
    whys = [""] * len(parts)
    for method in set(methods):
        places = [i for i, name in enumerate(methods) if name == method]
        own = [told[i] for i in places]
        for i, said, why in zip(places, telling([_only(one, False) for one in own]), differences(own), strict=True):
            names[i] += said
            whys[i] = "; ".join(text for text in (why, *parts[i].remarks, *_unlike(parts[i])) if text)
    return [_row(*made) for made in zip(parts, labels(names), whys, told, strict=True)]


def _unlike(part: _Part) -> Iterable[str]:
    """What a row has to say of how its tasks are trained."""
    keys = [key for key in _TRAINING if key not in part.told]
    values = {key: {run.settings.get(key, UNRECORDED) for run in part.runs} for key in keys}
    if different := [words(key) for key, found in values.items() if len(found) > 1]:
        yield f"different from task to task: {', '.join(different)}"


def _only(told: Mapping[str, str], protocol: bool) -> dict[str, str]:
    return {key: value for key, value in told.items() if is_protocol(key) == protocol}


def _row(part: _Part, label: str, why: str, told: Mapping[str, str]) -> Row:
    runs = sorted(part.runs, key=lambda run: (task_place(run.task), run.result.seed))
    by_task = grouped(runs, lambda run: run.task)
    return Row(
        label=label,
        method=runs[0].method,
        backbone=str(runs[0].result.backbone["name"]),
        cells={task: cell(built(run.result) for run in found) for task, found in by_task.items()},
        why=why,
        runs=tuple(runs),
        told=told,
    )


__all__ = ["Grid", "LeftOut", "Row", "Run", "Survey", "diverged", "grids", "read_runs", "rows", "survey"]
