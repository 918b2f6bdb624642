"""What a report says: facts about its runs, then sections of tables and figures. Nothing of how it is written."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from visprompt.reports import series, sweeps, tables
from visprompt.reports.charts import Chart
from visprompt.reports.collect import Grid, Row, Run, Survey, grids, rows
from visprompt.reports.comparable import Protocol, protocols, references
from visprompt.reports.figures import Plot, plots
from visprompt.reports.render import Table
from visprompt.reports.runs import method_place, task_place
from visprompt.reports.summary import device_of, full_of

if TYPE_CHECKING:
    from visprompt.reports.closeups import Closeups

Facts = tuple[tuple[str, tuple[str, ...]], ...]
"""Terms and what is said of each, a sentence or a list's entry at a time."""
_MOST_OPEN = 12  # figures of one kind; more are folded


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a report under a heading.

    Attributes:
        name: Of its place in the page.
        title: The heading.
        tables: By the names of their files.
        plots: Figures.
        folded: Whether figures are shown on demand only, since they are many.
    """

    name: str
    title: str
    tables: Mapping[str, Table] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    folded: bool = False


@dataclass(frozen=True, eq=False)
class Contents:
    """A whole report.

    Attributes:
        title: Its heading.
        facts: The summary that comes first.
        sections: In order; none is empty.
    """

    title: str
    facts: Facts
    sections: tuple[Section, ...]


def contents(
    found: Survey,
    folders: Sequence[Path],
    made: datetime,
    *,
    against: str | None = None,
    paper: str | None = None,
    closeups: "Closeups | None" = None,
) -> Contents:
    """Puts a report together.

    Args:
        found: All runs.
        folders: Where they were looked for.
        made: When this is.
        against: Name of the method that others are tested against, see `references`.
        paper: The paper to compare with, see `published`.
        closeups: What was seen of some runs with the model.

    Raises:
        UserError: No row is of the method `against`.
    """
    made_rows, made_grids = rows(found.runs), grids(found.runs)
    under = protocols(made_rows)
    sections = [
        Section("accuracy", "Test accuracy", _accuracy(made_rows, paper)),
        Section("cost", "Cost", _cost(made_rows, closeups)),
        Section("tests", "Tests and ranks", _tests(under, made_rows, against)),
        Section("choices", "What was chosen, kept apart and left out", _kept(found, made_rows, made_grids, closeups)),
        *_figures(found.runs, made_rows, made_grids),
        Section("closeups", "Some runs seen closely", {}, closeups.plots if closeups else ()),
    ]
    kept = [section for section in sections if section.tables or section.plots]
    told = facts(found, under, made_grids, folders, made)
    return Contents("Visual prompt tuning: report", told, tuple(_with_own_names(kept)))


def _with_own_names(sections: Sequence[Section]) -> Iterator[Section]:
    """Sections in which no two figures have the same name, and so the same files."""
    taken: set[str] = set()
    for section in sections:
        own = []
        for plot in section.plots:
            tried = (f"{plot.name}{_numbered(number)}" for number in count())
            name = next(one for one in tried if not taken & {one, f"{one}_dark"})
            taken |= {name, f"{name}_dark"}  # the same figure on a dark page
            own.append(replace(plot, name=name))
        yield replace(section, plots=tuple(own))


def _accuracy(made: Sequence[Row], paper: str | None) -> dict[str, Table]:
    found = {f"accuracy_{_plain(group)}": tables.accuracy(made, group, paper) for group in tables.groups(made)}
    return found | _filled(
        means=tables.aggregates(made, paper),
        wins=tables.wins_over_full(made) if any(full_of(row, made) for row in made if row.method != "full") else None,
    )


def _cost(made: Sequence[Row], closeups: "Closeups | None") -> dict[str, Table]:
    return _filled(cost=tables.costs(made), latency=closeups.latency if closeups else None)


def _tests(under: Sequence[Protocol], made: Sequence[Row], against: str | None) -> dict[str, Table]:
    """Tests and ranks, of each protocol by itself."""
    found: dict[str, Table] = {}
    pairs = [(one, other) for one, other in references(under, against) if _compares(one)]
    for number, (protocol, reference) in enumerate(pairs):
        found |= _filled(**{f"tests{_numbered(number)}": tables.paired_tests(protocol.rows, reference)})
    for number, protocol in enumerate(one for one in under if len(one.rows) > 1):
        table = tables.ranks(protocol.rows)
        found |= _filled(**{f"ranks{_numbered(number)}": replace(table, title=protocol.titled(table.title))})
    return found | _filled(seeds=tables.seed_intervals(made))


def _compares(protocol: Protocol) -> bool:
    """Whether there is anything to test: two tasks at least."""
    return len({task for row in protocol.rows for task in row.cells}) > 1


def _kept(
    found: Survey, made: Sequence[Row], made_grids: Sequence[Grid], closeups: "Closeups | None"
) -> dict[str, Table]:
    seen = closeups.left_out if closeups else ()
    everything = Survey(found.runs, (*found.left_out, *seen))
    return _filled(choices=tables.choices(made_grids), rows=tables.own_rows(made), left_out=tables.left_out(everything))


def _figures(runs: Sequence[Run], made: Sequence[Row], made_grids: Sequence[Grid]) -> list[Section]:
    """Sections of charts; a label looks the same in all of them."""
    axes = (sweeps.LENGTH, sweeps.DEPTH, sweeps.FRACTION)
    kinds: dict[str, tuple[str, list[Chart]]] = {
        "parameters": ("Accuracy by tuned parameters", series.by_parameters(made)),
        "settings": (
            "Accuracy by prompt length, prompt depth and training data",
            [chart for axis in axes for chart in sweeps.along(runs, axis)],
        ),
        "training": ("Training curves", series.training(made, made_grids)),
    }
    drawn = iter(plots([chart for _, charts in kinds.values() for chart in charts]))
    return [
        Section(name, title, {}, tuple(next(drawn) for _ in charts), folded=len(charts) > _MOST_OPEN)
        for name, (title, charts) in kinds.items()
    ]


def _filled(**found: Table | None) -> dict[str, Table]:
    return {name: table for name, table in found.items() if table is not None and table.rows}


def _numbered(number: int) -> str:
    return f"_{number + 1}" if number else ""


def _plain(name: str) -> str:
    return name.replace(" ", "_")


def facts(
    found: Survey, under: Sequence[Protocol], made_grids: Sequence[Grid], folders: Sequence[Path], made: datetime
) -> Facts:
    """What was run, and on what, in words."""
    runs = found.runs
    results = [run.result for run in runs]
    listed = (
        ("Tasks", sorted({run.task for run in runs}, key=task_place)),
        ("Methods", sorted({run.method for run in runs}, key=method_place)),
        ("Backbones", sorted({str(result.backbone["name"]) for result in results})),
        ("Seeds", [str(seed) for seed in sorted({result.seed for result in results})]),
    )
    data = dict.fromkeys(map(_data, runs))
    libraries: dict[str, Counter[str]] = {}
    for name, version in ((name, version) for result in results for name, version in result.versions.items()):
        libraries.setdefault(name, Counter())[version or "not recorded"] += 1
    commits = libraries.pop("git_commit", Counter())
    known = ", ".join(f"{name} {' and '.join(sorted(counts))}" for name, counts in libraries.items())
    return (
        *((term, (f"{len(entries)}: {', '.join(entries)}",)) for term, entries in listed),
        ("Runs", _numbers(found)),
        ("Data", tuple(data)),
        ("Protocol", tuple(_protocol(runs, under, made_grids))),
        ("Machines", _counted(Counter(map(device_of, runs)))),
        ("Versions", (known,) if known else ()),
        ("Commits", (*_counted(commits), *(["+: with changes that were not committed"] if _changed(commits) else []))),
        ("Read from", tuple(map(str, folders))),
        ("Made", (f"{made:%Y-%m-%d %H:%M %Z}".strip(),)),
    )


def _numbers(found: Survey) -> tuple[str, ...]:
    splits = Counter(run.result.split for run in found.runs)
    lost = sum(run.result.status == "diverged" for run in found.runs)
    left = len(found.left_out)
    return (
        f"{len(found.runs)}: {splits['final']} of split=final, {splits['tune']} of split=tune",
        *([f"{lost} of them diverged"] if lost else []),
        *([f"{left} folder{'s are' if left > 1 else ' is'} left out, see the table Left out"] if left else []),
    )


def _protocol(runs: Sequence[Run], under: Sequence[Protocol], made_grids: Sequence[Grid]) -> Iterable[str]:
    ran = {run.base for run in runs if run.result.split == "final"}
    tried = {grid.runs[0].base for grid in made_grids if not grid.pruning and len(grid.points) > 1}
    yield (
        "Test accuracies are of runs of split=final, after their last epoch; choices are made by the accuracy of runs "
        "of split=tune on the validation images, after their last epoch."
    )
    if ran and ran <= tried:
        yield (
            "All settings of a method on a task with final runs have a grid on the validation images among these runs."
        )
    elif ran:
        yield (
            f"Settings of a method on a task with final runs: {len(ran)}; with a grid on the validation images among "
            f"these runs: {len(ran & tried)}; for the others no choice is recorded."
        )
    if len(under) > 1:
        names = "; ".join(f"{one.words or 'the others'} ({len(one.rows)} rows)" for one in under)
        yield f"Methods compare only under one protocol, and here are {len(under)}: {names}."


def _data(run: Run) -> str:
    source, form, size = run.at(("data.source", "data.form", "data.preprocessing.size"))
    return f"{run.family}: source {source}, form {form}, {size} pixels"


def _counted(found: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{name} ({count} run{'s' * (count > 1)})" for name, count in found.most_common())


def _changed(commits: Iterable[str]) -> bool:
    return any(commit.endswith("+") for commit in commits)
