"""The contents of a report, and the HTML page, which loads nothing and runs no script."""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pandas as pd

from visprompt.reports import sweeps, tables
from visprompt.reports.charts import Chart, by_parameters, training
from visprompt.reports.choices import Grid, grids
from visprompt.reports.figures import Plot, plots
from visprompt.reports.load import Survey
from visprompt.reports.rows import Protocol, Row, full_of, protocols, references, rows
from visprompt.reports.settings import method_place, task_place
from visprompt.reports.summary import device_of
from visprompt.reports.writers import Table, html
from visprompt.text import visible

if TYPE_CHECKING:
    from visprompt.reports.closeups import Closeups

Facts = tuple[tuple[str, tuple[str, ...]], ...]
"""Terms, each with its sentences or list entries."""
_MOST_OPEN = 12  # figures of a section; if there are more, the section is folded
_TEMPLATE = Path(__file__).with_name("page.html.j2")
_MEASURED = (
    "Test scores are of runs of split=final, after their last epoch; choices are made by the score of "
    "runs of split=tune on the validation images, after their last epoch."
)
_WITH_A_GRID = "a grid on the validation images among these runs"


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a report under a heading.

    Attributes:
        name: Its id in the page.
        title: The heading.
        tables: Tables by the names of their files.
        plots: Figures.
        folded: Whether the figures are shown only on demand, because there are many.
    """

    name: str
    title: str
    tables: Mapping[str, Table] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    folded: bool = False


@dataclass(frozen=True, eq=False)
class Contents:
    """A whole report: its heading, the summary that comes first, and its sections, none of them empty."""

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
    """Put a report together.

    Args:
        found: All runs.
        folders: The folders that were searched for them.
        made: The date and time of the report.
        against: Name of the method that others are tested against, see `references`.
        paper: The paper to compare with, see `published`.
        closeups: Figures and latency of some runs, which needed the model.

    Raises:
        UserError: No row is of the method `against`.
    """
    made_rows, made_grids = rows(found.runs), grids(found.runs)
    under = protocols(made_rows)
    everything = Survey(found.runs, (*found.left_out, *(closeups.left_out if closeups else ())))
    choices = {
        "choices": tables.choices(made_grids),
        "rows": tables.own_rows(made_rows),
        "left_out": tables.left_out(everything),
    }
    costs = {"cost": tables.costs(made_rows), "latency": closeups.latency if closeups else None}
    sections = [
        Section("accuracy", "Test accuracy", _filled(_accuracy(made_rows, paper))),
        Section("cost", "Cost", _filled(costs)),
        Section("tests", "Tests and ranks", _filled(_tests(under, made_rows, against))),
        Section("choices", "What was chosen, kept apart and left out", _filled(choices)),
        *_figures(found.runs, made_rows, made_grids),
        *(
            [Section("closeups", "Some runs seen closely", closeups.tables, closeups.plots)]
            if closeups
            else []
        ),
    ]
    filled = [section for section in sections if section.tables or section.plots]
    told = facts(found, under, made_grids, folders, made)
    return Contents("Visual prompt tuning: report", told, tuple(_with_different_names(filled)))


def _with_different_names(sections: Sequence[Section]) -> Iterator[Section]:
    """Yield sections with figures renamed so that no two have the same name, and so the same files."""
    taken: set[str] = set()
    for section in sections:
        named = []
        for plot in section.plots:
            tried = (f"{plot.name}{_numbered(number)}" for number in count())
            name = next(one for one in tried if not taken & {one, f"{one}_dark"})
            taken |= {name, f"{name}_dark"}  # the same figure on a dark page
            named.append(replace(plot, name=name))
        yield replace(section, plots=tuple(named))


def _filled(found: Mapping[str, Table | None]) -> dict[str, Table]:
    return {name: table for name, table in found.items() if table is not None and table.rows}


def _accuracy(made: Sequence[Row], paper: str | None) -> dict[str, Table | None]:
    by_task: dict[str, Table | None] = {
        f"accuracy_{group.replace(' ', '_')}": tables.accuracy(made, group, paper)
        for group in tables.task_groups(made)
    }
    compared = any(full_of(row, made) for row in made if row.method != "full")
    wins = tables.wins_over_full(made) if compared else None
    return by_task | {"means": tables.aggregates(made, paper), "wins": wins}


def _tests(under: Sequence[Protocol], made: Sequence[Row], against: str | None) -> dict[str, Table | None]:
    """Return tests and ranks, separately for each protocol; a test needs at least two tasks."""
    found: dict[str, Table | None] = {}
    pairs = [
        (one, row)
        for one, row in references(under, against)
        if len({t for r in one.rows for t in r.cells}) > 1
    ]
    for number, (protocol, reference) in enumerate(pairs):
        found[f"tests{_numbered(number)}"] = tables.paired_tests(protocol.rows, reference)
    for number, protocol in enumerate(one for one in under if len(one.rows) > 1):
        table = tables.ranks(protocol.rows)
        found[f"ranks{_numbered(number)}"] = replace(table, title=protocol.titled(table.title))
    return found | {"seeds": tables.seed_intervals(made)}


def _figures(runs: pd.DataFrame, made: Sequence[Row], made_grids: Sequence[Grid]) -> list[Section]:
    """Return sections of charts; lines with the same label look the same in all of them."""
    axes = (sweeps.LENGTH, sweeps.DEPTH, sweeps.FRACTION)
    by_setting = [chart for axis in axes for chart in sweeps.along(runs, axis)]
    kinds: dict[str, tuple[str, list[Chart]]] = {
        "parameters": ("Accuracy by tuned parameters", by_parameters(made)),
        "settings": ("Accuracy by prompt length, prompt depth and training data", by_setting),
        "training": ("Training curves", training(made, made_grids)),
    }
    drawn = iter(plots([chart for _, charts in kinds.values() for chart in charts]))
    return [
        Section(name, title, {}, tuple(next(drawn) for _ in charts), folded=len(charts) > _MOST_OPEN)
        for name, (title, charts) in kinds.items()
    ]


def _numbered(number: int) -> str:
    return f"_{number + 1}" if number else ""


def facts(
    found: Survey,
    under: Sequence[Protocol],
    made_grids: Sequence[Grid],
    folders: Sequence[Path],
    made: datetime,
) -> Facts:
    """Return what was run, on which data and on which machines, in words."""
    runs, results = found.runs, list(found.runs["result"])
    listed = (
        ("Tasks", sorted({*runs["task"]}, key=task_place)),
        ("Methods", sorted({*runs["method"]}, key=method_place)),
        ("Backbones", sorted({str(result.backbone["name"]) for result in results})),
        ("Seeds", [str(seed) for seed in sorted({*runs["seed"]})]),
    )
    data = runs[["family", "data.source", "data.form", "data.preprocessing.size"]].itertuples(
        index=False, name=None
    )
    versions: dict[str, Counter[str]] = {}
    for name, version in ((name, version) for result in results for name, version in result.versions.items()):
        versions.setdefault(name, Counter())[version or "not recorded"] += 1
    commits = versions.pop("git_commit", Counter())
    changed = any(commit.endswith("+") for commit in commits)
    known = ", ".join(f"{name} {' and '.join(sorted(counts))}" for name, counts in versions.items())
    return (
        *((term, (f"{len(entries)}: {', '.join(entries)}",)) for term, entries in listed),
        ("Runs", _numbers(found)),
        ("Data", tuple(dict.fromkeys("{}: source {}, form {}, {} pixels".format(*one) for one in data))),
        ("Protocol", tuple(_protocol(runs, under, made_grids))),
        ("Machines", _counted(map(device_of, results))),
        ("Versions", (known,) if known else ()),
        ("Commits", (*_counted(commits), *(["+: with changes that were not committed"] if changed else []))),
        ("Read from", tuple(map(str, folders))),
        ("Made", (f"{made:%Y-%m-%d %H:%M %Z}".strip(),)),
    )


def _numbers(found: Survey) -> tuple[str, ...]:
    splits, status, left = list(found.runs["split"]), list(found.runs["status"]), len(found.left_out)
    return (
        f"{len(splits)}: {splits.count('final')} of split=final, {splits.count('tune')} of split=tune",
        *([f"{lost} of them diverged"] if (lost := status.count("diverged")) else []),
        *(
            [f"{left} folder{'s are' if left > 1 else ' is'} left out, see the table Left out"]
            if left
            else []
        ),
    )


def _protocol(runs: pd.DataFrame, under: Sequence[Protocol], made_grids: Sequence[Grid]) -> Iterable[str]:
    ran = {*runs["base"][runs["split"] == "final"]}
    tried = {grid.runs["base"].iat[0] for grid in made_grids if not grid.pruning and len(grid.points) > 1}
    yield _MEASURED
    if ran and ran <= tried:
        yield f"All settings of a method on a task with final runs have {_WITH_A_GRID}."
    elif ran:
        yield (
            f"Settings of a method on a task with final runs: {len(ran)}; with {_WITH_A_GRID}: "
            f"{len(ran & tried)}; for the others no choice is recorded."
        )
    if len(under) > 1:
        names = "; ".join(f"{one.words or 'the others'} ({len(one.rows)} rows)" for one in under)
        yield f"Methods compare only under one protocol, and here are {len(under)}: {names}."


def _counted(names: Iterable[str] | Counter[str]) -> tuple[str, ...]:
    return tuple(
        f"{name} ({number} run{'s' * (number > 1)})" for name, number in Counter(names).most_common()
    )


# the HTML page


@dataclass(frozen=True)
class Picture:
    """A figure in the page: its SVG for the light theme and that for the dark theme."""

    light: str
    dark: str

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height in CSS pixels; matplotlib's SVG states them in points."""
        found = dict(
            re.findall(r' (width|height)="([\d.]+)pt"', self.light[: self.light.index("<metadata>")])
        )
        return round(float(found["width"]) * 96 / 72), round(float(found["height"]) * 96 / 72)

    def uri(self, theme: str) -> str:
        """Return the SVG of a theme as a data URI."""
        return "data:image/svg+xml;base64," + b64encode(getattr(self, theme).encode()).decode()


def page(report: Contents, pictures: Mapping[str, Picture]) -> str:
    """Render a report, with its figures by their names, as a whole HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template(_TEMPLATE.name)
    return template.render(report=report, pictures=pictures, table_html=_table_html)


def _visible(value: object) -> object:
    """Return text without control characters; HTML is returned unchanged."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _table_html(table: Table) -> str:
    """Return a table as HTML without its notes, which are outside the box in which it scrolls."""
    return html(replace(table, notes=()))
