"""The report's tables, built from rows."""

from collections.abc import Iterator, Sequence

from visprompt.data.catalog import SUITES
from visprompt.reports.choices import Grid
from visprompt.reports.load import Survey
from visprompt.reports.published import FLAT, GROUPS, beside, cautions, published_of, worked_out_notes
from visprompt.reports.rows import Row, full_of, without_score
from visprompt.reports.settings import OWN_IMAGES, task_place
from visprompt.reports.statistical_tests import (
    RESAMPLES,
    Paired,
    average_ranks,
    compare,
    seed_interval,
    smallest_p,
)
from visprompt.reports.summary import SUMMED, Cost, Total, backbone_sizes, cost, means, score_words, wins
from visprompt.reports.writers import Entry, Missing, Number, Table, decimal, p_value

_PAPERS_TASKS = frozenset({*SUITES["vtab_all"], *SUITES["fgvc"]})
_LEVELS = (0.05, 0.01)
_BY_FAMILY = ("segmentation", OWN_IMAGES)  # groups of those tasks that have runs, without a mean


def task_groups(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Return the groups of tasks on which rows have runs: of VTAB-1k, "fgvc", "demo", and `_BY_FAMILY`."""
    named = {name: SUITES[name] for name in (*GROUPS, "fgvc", "demo")}
    for family in _BY_FAMILY:
        found = {task for row in rows for task in row.runs["task"][row.runs["family"] == family]}
        named[family] = tuple(sorted(found, key=task_place))
    return {
        name: tasks
        for name, tasks in named.items()
        if any(task in row.cells for row in rows for task in tasks)
    }


def suites(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """Return `task_groups` with all of VTAB-1k as one group, for tests and ranks."""
    found = task_groups(rows)
    vtab = {"vtab_all": SUITES["vtab_all"]} if found.keys() & set(GROUPS) else {}
    return vtab | {name: tasks for name, tasks in found.items() if name not in GROUPS}


def accuracy(rows: Sequence[Row], group: str, paper: str | None = None) -> Table:
    """Build the table of test scores by task; below each row are the paper's and the difference.

    Args:
        rows: Rows; those without a task of the group are left out.
        group: A name of `task_groups`.
        paper: The paper to compare with, see `published`.
    """
    tasks = task_groups(rows)[group]
    shown = [row for row in rows if any(task in row.cells for task in tasks)]
    lines: list[tuple[Entry, ...]] = []
    compared = {}
    for row in shown:
        mean = [means(row)[group]] if group in SUMMED else []
        lines.append((row.label, *(_cell(row, task) for task in tasks), *map(_percent, mean)))
        found = published_of(row, paper)
        if found is not None and any(task in found.tasks for task in tasks):
            ours = [row.cells[task].mean if task in row.cells else None for task in tasks]
            theirs = [*(found.tasks.get(task) for task in tasks), *(found.means.get(group) for _ in mean)]
            lines += beside(row, found, [*ours, *(total.value for total in mean)], theirs)
            compared[found.source, found.name] = found
    header = ("method", *tasks, *(["mean"] if group in SUMMED else []))
    title = f"Test {score_words(shown, tasks)} (%), {group}"
    return Table(title, header, tuple(lines), (_seeds(shown, tasks), *cautions(compared)))


def aggregates(rows: Sequence[Row], paper: str | None = None) -> Table:
    """Build the table of means over groups of tasks; below each row are the paper's and the difference.

    Rows without a task of these groups are left out. A mean is missing if one of its tasks is.
    """
    names = [name for name in SUMMED if any(means(row)[name].found for row in rows)]
    lines: list[tuple[Entry, ...]] = []
    compared = {}
    for row in _catalogued(rows):
        own = means(row)
        lines.append((row.label, *(_percent(own[name]) for name in names)))
        found = published_of(row, paper)
        theirs = found.all_means if found else {}
        if found is not None and any(name in theirs for name in names):
            lines += beside(
                row, found, [own[name].value for name in names], [theirs.get(name) for name in names], 2
            )
            compared[found.source, found.name] = found
    notes = (*worked_out_notes(compared, names), *cautions(compared))
    return Table("Mean test accuracy (%)", ("method", *names), tuple(lines), notes)


def wins_over_full(rows: Sequence[Row]) -> Table:
    """Count the tasks on which a row is better than full fine-tuning under the same protocol."""
    held = [(row, full_of(row, rows)) for row in _catalogued(rows) if row.method != "full"]
    names = [name for name in (*GROUPS, FLAT, "fgvc", "demo") if any(means(row)[name].found for row in rows)]
    lines: list[tuple[Entry, ...]] = []
    for row, full in held:
        won = wins(row, full) if full else {}
        lines.append((row.label, *(_count(won.get(name)) for name in names), full.label if full else "none"))
    header = ("method", *names, "compared with")
    return Table("Tasks with a mean accuracy above that of full fine-tuning", header, tuple(lines))


def costs(rows: Sequence[Row]) -> Table:
    """Build the table of costs: what each row tunes and stores, its training time and memory."""
    sizes = backbone_sizes(rows)
    header = (
        *("method", "tasks", "tuned parameters", "share (%)", "head parameters", "all tasks (backbones)"),
        *(
            "published, 24 tasks",
            "MB per task",
            "training (s)",
            "trained on",
            "peak memory (MiB)",
            "measured",
        ),
        "operations (M)",
    )
    notes = (
        "Where tasks or seeds differ: the mean over the tasks; least and most tuned parameters in brackets.",
        "All tasks: one backbone, and for each task what is tuned and its head, as a multiple of one "
        "backbone; full fine-tuning shares no backbone.",
        "Training: mean over the tasks of the time of a run. Peak memory: the highest of all runs. "
        "Operations: pairs of a multiplication and an addition for one image, in millions.",
    )
    return Table("Cost", header, tuple(_cost_line(row, cost(row, sizes)) for row in rows), notes)


def _cost_line(row: Row, found: Cost) -> tuple[Entry, ...]:
    spread = "" if found.least == found.most else f" ({found.least:,.0f} to {found.most:,.0f})"
    paper = published_of(row) if row.cells.keys() == _PAPERS_TASKS else None
    return (
        row.label,
        decimal(found.tasks, 0),
        Number(found.tuned, f"{found.tuned:,.0f}{spread}"),
        decimal(100 * found.share, 3),
        decimal(found.head, 0),
        _number(found.total, 2, "backbone's size not known"),
        _number(paper.params if paper else None, 2, ""),
        decimal(found.bytes / 1e6, 2),
        decimal(found.seconds, 1) if len(found.devices) == 1 else Missing("on several devices"),
        ", ".join(found.devices),
        decimal(found.memory / 2**20, 0)
        if len(found.memory_of) == 1
        else Missing("measured in several ways"),
        ", ".join(found.memory_of),
        _number(None if found.macs is None else found.macs / 1e6, 0, "not recorded"),
    )


def paired_tests(rows: Sequence[Row], reference: Row) -> Table:
    """Test every other row against a reference under the same protocol, paired over tasks."""
    lines: list[tuple[Entry, ...]] = []
    pairs: list[Paired] = []
    for name, tasks in suites([reference]).items():
        base = _scores(reference, tasks)
        for row in rows:
            if row is not reference and base.keys() & _scores(row, tasks).keys():
                pairs.append(compare(_scores(row, tasks), base))
                lines.append((row.label, name, *_test_line(pairs[-1])))
    header = (
        *(
            "method",
            "over",
            "tasks",
            "difference (points)",
            "95 % interval",
            "better, equal, worse",
            "Wilcoxon p",
        ),
        *("one-sided p", "smallest p", "paired t p"),
    )
    notes = (
        f"Difference: mean score over the common tasks minus that of {reference.label}. 95 % interval: "
        f"percentile bootstrap over the tasks, {RESAMPLES:,} resamples; none below four tasks, of which it "
        "would be the range.",
        "Wilcoxon p: the exact signed-rank test, two-sided; equal tasks are left out, differences of one "
        "size share their mean rank. One-sided p: of the same test, the alternative being that the method is "
        "better. Smallest p: the two-sided test's with so many unequal tasks. Paired t p: two-sided.",
        "No test: fewer than two unequal tasks or, for t, differences that are all the same. The p-values "
        "are not corrected for the number of comparisons.",
    )
    return Table(f"Against {reference.label}", header, tuple(lines), (*_out_of_reach(pairs), *notes))


def _test_line(found: Paired) -> tuple[Entry, ...]:
    low, high = found.interval or (0.0, 0.0)
    return (
        decimal(len(found.tasks), 0),
        decimal(100 * found.difference, 2, sign=True),
        f"{100 * low:+.2f} to {100 * high:+.2f}" if found.interval else "none",
        f"{found.better}, {found.equal}, {found.worse}",
        *(Missing("no test") if p is None else p_value(p) for p in (found.wilcoxon, found.greater)),
        Missing("no test") if found.smallest is None else p_value(found.smallest),
        Missing("no test") if found.t is None else p_value(found.t),
    )


def _out_of_reach(pairs: Sequence[Paired]) -> Iterator[str]:
    """Yield notes on significance levels that cannot be reached, because too few tasks differ."""
    for count in sorted({found.better + found.worse for found in pairs}):
        levels = [f"{level}" for level in _LEVELS if smallest_p(count) > level]
        if count > 1 and levels:
            yield (
                f"With {count} tasks that differ the two-sided signed-rank test cannot go below "
                f"{smallest_p(count):.3g}: {' and '.join(levels)} {'are' if len(levels) > 1 else 'is'} out "
                "of reach."
            )


def ranks(rows: Sequence[Row]) -> Table:
    """Build the table of average ranks over tasks, 1 being the best, among the rows that have all tasks.

    If fewer than two rows have all tasks, all rows are ranked over the tasks that they have in common. The
    rows are of one protocol.
    """
    found = suites(rows)
    ranked: dict[str, dict[str, float]] = {}
    notes = ["1 is the best; ties share their mean rank."]
    for name, tasks in found.items():
        scores = {row.label: _scores(row, tasks) for row in rows if _scores(row, tasks)}
        whole = {label: known for label, known in scores.items() if len(known) == len(tasks)}
        taken = whole if len(whole) > 1 else scores
        ranked[name] = average_ranks(taken) if len(taken) > 1 else {}
        count = (
            len(tasks)
            if taken is whole
            else sum(all(task in one for one in taken.values()) for task in tasks)
        )
        notes.append(f"{name}: {len(ranked[name])} rows over {count} of {len(tasks)} tasks.")
    means_of = ranked.values()
    lines = [
        (row.label, *(_number(mean.get(row.label), 2, "not ranked") for mean in means_of)) for row in rows
    ]
    return Table("Average rank", ("method", *found), tuple(lines), tuple(notes))


def seed_intervals(rows: Sequence[Row]) -> Table:
    """Build the table of bootstrap intervals over seeds, for cells with three seeds or more."""
    lines: list[tuple[Entry, ...]] = []
    for row in rows:
        for task, found in row.cells.items():
            if (ends := seed_interval(found.scores)) is not None:
                interval = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
                lines.append(
                    (row.label, task, decimal(len(found.scores), 0), decimal(100 * found.mean), interval)
                )
    header = ("method", "task", "seeds", "mean", "95 % interval")
    few = "of three seeds it is their range, of few too narrow"
    note = f"Percentile bootstrap of the mean, {RESAMPLES:,} resamples; {few}."
    return Table("95 % intervals over seeds (%)", header, tuple(lines), (note,))


def own_rows(rows: Sequence[Row]) -> Table:
    """Build the table of why methods have several rows, and of which tasks are trained differently."""
    lines = tuple((row.label, ", ".join(row.cells), row.why) for row in rows if row.why)
    return Table(
        "What tells rows apart, which are never averaged, and what differs within one",
        ("row", "tasks", "why"),
        lines,
    )


def choices(grids: Sequence[Grid]) -> Table:
    """Build the table of what was tried and chosen on validation images, and of what final runs used."""
    measured = score_words(grids, {grid.task for grid in grids})
    header = (
        *("method", "task", "grid of", "points", "diverged", f"validation {measured} (%)"),
        *("chosen on validation", "final runs"),
    )
    note = (
        "Points of several grids count as one: what their union chooses need not be what one of them chose. "
        "A point with several seeds is judged by its mean."
    )
    return Table("Choices on validation", header, tuple(map(_choice_line, grids)), (note,))


def _choice_line(grid: Grid) -> tuple[Entry, ...]:
    used = "none" if not grid.used else "as chosen" if grid.used == (grid.choice,) else "; ".join(grid.used)
    return (
        grid.label,
        grid.task,
        "pruning" if grid.pruning else "settings",
        decimal(len(grid.points), 0),
        decimal(grid.diverged, 0),
        _number(None if grid.score is None else 100 * grid.score, 1, "all diverged"),
        "nothing" if grid.chosen is None else grid.choice or "the only point",
        used,
    )


def left_out(survey: Survey) -> Table:
    """Build the table of folders that are in no other table, and why."""
    found = [*survey.left_out, *without_score(survey.runs)]
    return Table("Left out", ("folder", "why"), tuple((str(one.folder), one.why) for one in found))


def _catalogued(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a task of a group that has a mean."""
    return [row for row in rows if any(total.found for total in means(row).values())]


def _cell(row: Row, task: str) -> Entry:
    if task not in row.cells:
        return Missing()
    found = row.cells[task]
    ends = (100 * found.interval[0], 100 * found.interval[1]) if found.interval else None
    return decimal(100 * found.mean, 1, 100 * found.std if len(found.scores) > 1 else None, ends=ends)


def _number(value: float | None, digits: int, missing: str) -> Entry:
    return Missing(missing) if value is None else decimal(value, digits)


def _percent(found: Total) -> Entry:
    return Missing(found.missing) if found.value is None else decimal(100 * found.value, 2)


def _count(found: Total | None) -> Entry:
    if found is None:
        return Missing("no full row of the same protocol")
    return (
        Missing(found.missing)
        if found.value is None
        else Number(found.value, f"{found.value:.0f} of {found.of}")
    )


def _seeds(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Return a note on the number of seeds: that of most cells, then the cells that have another number."""
    counts = {
        (row.label, task): len(row.cells[task].scores) for row in rows for task in tasks if task in row.cells
    }
    most = max(counts.values(), key=list(counts.values()).count)
    others = [f"{label} on {task}: {count}" for (label, task), count in counts.items() if count != most]
    spread = " ± sample standard deviation (n - 1)" if max(counts.values()) > 1 else ""
    alone = any(row.cells[task].interval for row in rows for task in tasks if task in row.cells)
    return (
        f"Mean{spread} over {most} seed{'s' * (most > 1)}"
        + (f"; {'; '.join(others)}" if others else "")
        + ("; of a single seed the 95 % interval over the test images, by Wilson" if alone else "")
        + "."
    )


def _scores(row: Row, tasks: Sequence[str]) -> dict[str, float]:
    return {task: row.cells[task].mean for task in tasks if task in row.cells}
