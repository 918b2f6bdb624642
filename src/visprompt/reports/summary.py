"""A row in few numbers: means over groups of tasks, wins over full fine-tuning, and cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from visprompt.data.catalog import SUITES
from visprompt.reports.load import FIGURES, groups
from visprompt.reports.published import FLAT, GROUPED, GROUPS
from visprompt.reports.rows import Row
from visprompt.reports.statistical_tests import gap
from visprompt.runs.result import Result

SUMMED = (*GROUPS, FLAT, GROUPED, "fgvc", "demo")
_TASKS: Mapping[str, tuple[str, ...]] = {FLAT: SUITES["vtab_all"]} | {
    name: SUITES[name] for name in (*GROUPS, "fgvc", "demo")
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
        """Return what stands in place of the figure."""
        return f"missing ({self.found} of {self.of})"


def means(row: Row) -> dict[str, Total]:
    """Return mean test accuracies as shares, by the names of `SUMMED`."""
    found = {
        name: _total([row.cells[task].mean for task in tasks if task in row.cells], len(tasks))
        for name, tasks in _TASKS.items()
    }
    known = [value for name in GROUPS if (value := found[name].value) is not None]
    of_groups = fmean(known) if len(known) == len(GROUPS) else None
    return found | {GROUPED: Total(of_groups, found[FLAT].found, found[FLAT].of)}


def _total(values: Sequence[float], of: int) -> Total:
    return Total(fmean(values) if len(values) == of else None, len(values), of)


def wins(row: Row, full: Row) -> dict[str, Total]:
    """Return on how many tasks of each group, and under `FLAT` of VTAB-1k's 19, a row beats `full`.

    Args:
        row: A row.
        full: The row of full fine-tuning under the same protocol, see `full_of`. A tie is not a win.
    """
    found = {}
    for name, tasks in _TASKS.items():
        both = [task for task in tasks if task in row.cells and task in full.cells]
        won = sum(gap(row.cells[task].mean, full.cells[task].mean) > 0 for task in both)
        found[name] = Total(won if len(both) == len(tasks) else None, len(both), len(tasks))
    return found


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
        total: What all tasks need, the backbone counted once, as a multiple of the backbone; None where the
            backbone's size is not known. Full fine-tuning keeps a whole backbone for every task and shares
            none.
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


def cost(row: Row, sizes: Mapping[str, int]) -> Cost:
    """Return what a row costs, given `backbone_sizes`, which linear probing alone does not tell."""
    results: list[Result] = list(row.runs["result"])
    known = [name for name in FIGURES if row.runs[name].notna().all()]
    by_task = pd.DataFrame([own[known].apply(fmean) for own in groups(row.runs, ["task"])])
    tuned, size = by_task["parameters"], sizes.get(results[0].backbone["sha256"])
    kept = sum(tuned) + sum(by_task["head_parameters"])
    return Cost(
        tasks=len(tuned),
        tuned=fmean(tuned),
        least=min(tuned),
        most=max(tuned),
        share=fmean(by_task["share"]),
        head=fmean(by_task["head_parameters"]),
        total=(row.method != "full") + kept / size if size else None,
        bytes=fmean(by_task["bytes"]),
        seconds=fmean(by_task["train_s"]),
        devices=tuple(sorted({device_of(result) for result in results})),
        memory=max(result.peak_memory["bytes"] for result in results),
        memory_of=tuple(sorted({result.peak_memory["of"] for result in results})),
        macs=fmean(by_task["macs"]) if "macs" in known else None,
    )


def backbone_sizes(rows: Iterable[Row]) -> dict[str, int]:
    """Return backbones' parameters by the hash of their weights, from the shares that runs recorded."""
    results = [result for row in rows for result in row.runs["result"] if result.tuned["share"] > 0]
    return {
        result.backbone["sha256"]: round(result.tuned["parameters"] / result.tuned["share"])
        for result in results
    }


def device_of(result: Result) -> str:
    """Return a device in words: how many of what, and the threads where it is the CPU."""
    machine = result.machine
    count = f"{machine['devices']} x " if machine["devices"] > 1 else ""
    threads = machine.get("threads") if machine["device"] == "cpu" else None
    return f"{count}{machine['device']}" + (f" ({threads} thread{'s' * (threads > 1)})" if threads else "")
