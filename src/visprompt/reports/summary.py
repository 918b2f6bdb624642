"""A row in few numbers: means of groups, wins over full fine-tuning, cost, and the paper's figures beside them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from visprompt.data.catalog import SUITES
from visprompt.reports.collect import Row, Run
from visprompt.reports.published import GROUPS, Published, published
from visprompt.reports.settings import NEUTRAL, UNRECORDED, family, is_protocol, scope, text
from visprompt.reports.statistical_tests import gap
from visprompt.runs.result import Result

FLAT = "vtab, mean of 19 tasks"
GROUPED = "vtab, mean of 3 groups"
SUMMED = (*GROUPS, FLAT, GROUPED, "fgvc", "demo")
_TASKS: Mapping[str, tuple[str, ...]] = {FLAT: SUITES["vtab_all"]} | {
    name: SUITES[name] for name in (*GROUPS, "fgvc", "demo")
}


_THE_PAPERS: Mapping[str, tuple[str, ...]] = {  # what a row must not contradict to stand beside a paper's figures
    "data.fraction": ("1.0",),
    "backbone.image_size": ("null", "224"),
    "backbone.pretrained": ("true",),
    "backbone.kwargs": ("{}",),
    "trainer": (NEUTRAL,),
}


@dataclass(frozen=True)
class Total:
    """A mean or a count over a group of tasks, which is missing while one of its tasks is.

    Attributes:
        value: The figure; None where tasks are missing.
        found: Number of tasks that are there.
        of: Number of tasks of the group.
    """

    value: float | None
    found: int
    of: int

    @property
    def missing(self) -> str:
        """What stands in place of the figure."""
        return f"missing ({self.found} of {self.of})"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a row costs. Where tasks or seeds differ, the mean over the tasks of the means over their seeds.

    Attributes:
        tasks: Number of tasks.
        tuned: Tuned parameters of a task without the head.
        least: Of the task with the fewest.
        most: Of the task with the most.
        share: Tuned parameters over the backbone's.
        head: Parameters of a head.
        total: What all tasks need, the backbone counted once, as a multiple of the backbone; None where the backbone's
            size is not known.
        bytes: Size of a task's file.
        seconds: Of training a task.
        devices: What was trained on.
        memory: Peak of all runs, bytes.
        memory_of: What was measured.
        macs: Pairs of a multiplication and an addition for one image; None where it was not recorded.
    """

    tasks: int
    tuned: float
    least: float
    most: float
    share: float
    head: float
    total: float | None
    bytes: float
    seconds: float
    devices: tuple[str, ...]
    memory: int
    memory_of: tuple[str, ...]
    macs: float | None


def means(row: Row) -> dict[str, Total]:
    """Mean test accuracies, as shares.

    Args:
        row: A row.

    Returns:
        The means `SUMMED`: of each group, of VTAB-1k's 19 tasks, of its three group means, of FGVC and of the demo.
    """
    found = {
        name: _mean([row.cells[task].mean for task in tasks if task in row.cells], len(tasks))
        for name, tasks in _TASKS.items()
    }
    groups = [found[name].value for name in GROUPS]
    known = [value for value in groups if value is not None]
    of_groups = fmean(known) if len(known) == len(groups) else None
    return found | {GROUPED: Total(of_groups, found[FLAT].found, found[FLAT].of)}


def _mean(values: Sequence[float], of: int) -> Total:
    return Total(fmean(values) if len(values) == of else None, len(values), of)


def wins(row: Row, full: Row) -> dict[str, Total]:
    """Number of tasks whose mean is above that of full fine-tuning; a tie is no win.

    Args:
        row: A row.
        full: The row of full fine-tuning under the same protocol, see `full_of`.

    Returns:
        The count for each group, and under `FLAT` for VTAB-1k's 19 tasks.
    """
    found = {}
    for name, tasks in _TASKS.items():
        both = [task for task in tasks if task in row.cells and task in full.cells]
        won = sum(gap(row.cells[task].mean, full.cells[task].mean) > 0 for task in both)
        found[name] = Total(won if len(both) == len(tasks) else None, len(both), len(tasks))
    return found


def full_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row of full fine-tuning that a row may be held against; None where there is none."""
    alike = (other for other in rows if other.method == "full" and same_protocol(row, other))
    return max(alike, key=lambda other: len(other.cells.keys() & row.cells.keys()), default=None)


def same_protocol(one: Row, other: Row) -> bool:
    """Whether two rows have the same backbone, data, preprocessing and precision, so that their methods compare."""
    shared = {f"({family(task)})" for task in one.cells} & {f"({family(task)})" for task in other.cells}
    keys = {key for key in one.told.keys() | other.told.keys() if _is_shared(key, shared)}
    alike = all(one.told.get(key, UNRECORDED) == other.told.get(key, UNRECORDED) for key in keys)
    images, others = _images(one), _images(other)
    return alike and all(images[task] == others[task] for task in images.keys() & others.keys())


def _is_shared(key: str, families: Collection[str]) -> bool:
    """Whether a setting is of the protocol of all tasks, or of those of some families, not of one task only."""
    name, _, bracket = key.partition(" ")
    return is_protocol(name) and scope(name, "") != "task" and (not bracket or bracket in families)


def _images(row: Row) -> dict[str, str | None]:
    return {run.task: run.settings.get("data.fingerprint") for run in row.runs}


def published_of(row: Row, paper: str | None = None) -> Published | None:
    """The figures of a paper for a row's method and backbone; None where the row is another thing of the same name.

    Args:
        row: A row. One of a fraction of the data, of another image size or pooling, of a backbone that was changed or
            has random weights, or of a trainer that was not left as it is, has none.
        paper: See `published`.
    """
    if any(row.told.get(key, UNRECORDED) not in (*values, UNRECORDED) for key, values in _THE_PAPERS.items()):
        return None
    first, *others = (published(row.method, row.backbone, paper, run.result.method) for run in row.runs)
    if first is None or any(other != first for other in others):
        return None
    pooled, norm = (row.told.get(f"backbone.{name}", UNRECORDED) for name in ("global_pool", "final_norm"))
    same = pooled in (*map(text, first.global_pools), UNRECORDED) and norm in (first.final_norm, UNRECORDED)
    return first if same else None


def published_means(found: Published) -> dict[str, float]:
    """The paper's means by the names of `SUMMED`, in per cent, as far as they are known."""
    own = {FLAT: found.flat_mean, GROUPED: found.mean_of_groups}
    return dict(found.means) | {name: value for name, value in own.items() if value is not None}


def worked_out(found: Published) -> tuple[str, ...]:
    """The means of `published_means` that the paper does not print: they follow from its other figures."""
    unprinted = {
        FLAT: found.flat_mean if found.printed_flat_mean is None else None,
        GROUPED: found.mean_of_groups if found.printed_mean is None else None,
    }
    return tuple(name for name, value in unprinted.items() if value is not None)


def backbone_sizes(rows: Iterable[Row]) -> dict[str, int]:
    """Parameters of backbones without their heads by the hash of their weights, from the shares that runs recorded."""
    runs = (run for row in rows for run in row.runs)
    return {
        run.result.backbone["sha256"]: round(run.result.tuned["parameters"] / run.result.tuned["share"])
        for run in runs
        if run.result.tuned["share"] > 0
    }


def cost(row: Row, sizes: Mapping[str, int]) -> Cost:
    """What a row costs.

    Args:
        row: A row.
        sizes: See `backbone_sizes`; linear probing alone does not tell its backbone's size.

    Returns:
        The cost. Full fine-tuning keeps a whole backbone for every task and shares none: its total counts no other.
    """
    results = [run.result for run in row.runs]
    tuned = _by_task(row.runs, lambda result: result.tuned["parameters"])
    head = _by_task(row.runs, lambda result: result.tuned["head_parameters"])
    size = sizes.get(results[0].backbone["sha256"])
    shared = 0 if row.method == "full" else 1
    kept = sum(tuned.values()) + sum(head.values())
    known = all("macs" in result.tuned for result in results)
    return Cost(
        tasks=len(tuned),
        tuned=fmean(tuned.values()),
        least=min(tuned.values()),
        most=max(tuned.values()),
        share=fmean(_by_task(row.runs, lambda result: result.tuned["share"]).values()),
        head=fmean(head.values()),
        total=shared + kept / size if size else None,
        bytes=fmean(_by_task(row.runs, lambda result: result.tuned["bytes"]).values()),
        seconds=fmean(_by_task(row.runs, lambda result: result.time["train_s"]).values()),
        devices=tuple(sorted({device_of(run) for run in row.runs})),
        memory=max(result.peak_memory["bytes"] for result in results),
        memory_of=tuple(sorted({result.peak_memory["of"] for result in results})),
        macs=fmean(_by_task(row.runs, lambda result: result.tuned["macs"]).values()) if known else None,
    )


def _by_task(runs: Iterable[Run], figure: Callable[[Result], float]) -> dict[str, float]:
    """A figure by task, its mean over the seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run.result.task, []).append(figure(run.result))
    return {task: fmean(values) for task, values in found.items()}


def device_of(run: Run) -> str:
    """A device in words: how many of what, and the threads where it is the CPU."""
    machine = run.result.machine
    count = f"{machine['devices']} x " if machine["devices"] > 1 else ""
    threads = machine.get("threads") if machine["device"] == "cpu" else None
    return f"{count}{machine['device']}" + (f" ({threads} thread{'s' * (threads > 1)})" if threads else "")
