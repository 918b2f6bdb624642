"""A row summarised: means over groups of tasks, wins over full fine-tuning, and cost."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from visprompt.data.catalog import SUITES
from visprompt.models.kind import KINDS
from visprompt.reports.choices import Grid
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
    """A mean or a count over a group of tasks; it is missing if one of the tasks is.

    Attributes:
        value: The mean or count; None if tasks are missing.
        found: Number of tasks that are not missing.
        of: Number of tasks of the group.
    """

    value: float | None
    found: int
    of: int

    @property
    def missing(self) -> str:
        """Return the text to show instead of a missing value."""
        return f"missing ({self.found} of {self.of})"


def score_words(parts: Iterable[Row | Grid], tasks: Collection[str]) -> str:
    """Return the score of some tasks in words, such as "accuracy"; "score" if they have different scores."""
    kinds = {
        result.kind
        for part in parts
        for task, result in zip(part.runs["task"], part.runs["result"], strict=True)
        if task in tasks
    }
    return KINDS[kinds.pop()].words if len(kinds) == 1 else "score"


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
        full: The row of full fine-tuning under the same protocol, see `rows.full_of`. A tie is not a win.
    """
    found = {}
    for name, tasks in _TASKS.items():
        both = [task for task in tasks if task in row.cells and task in full.cells]
        won = sum(gap(row.cells[task].mean, full.cells[task].mean) > 0 for task in both)
        found[name] = Total(won if len(both) == len(tasks) else None, len(both), len(tasks))
    return found


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a row costs. Values that differ are averaged over the seeds of a task, then over tasks.

    Attributes:
        tasks: Number of tasks.
        tuned: Tuned parameters of a task without the head.
        least: Tuned parameters of the task with the fewest.
        most: Tuned parameters of the task with the most.
        share: Tuned parameters divided by the backbone's parameters.
        head: Parameters of a head.
        total: Parameters of all tasks and of one backbone that they share, as a multiple of the backbone;
            None if the backbone's size is unknown. Full fine-tuning shares no backbone: each task has one.
        bytes: Size of a task's file.
        seconds: Training time of a task.
        devices: The devices that were trained on.
        memory: Peak memory of all runs in bytes.
        memory_of: What was measured as memory.
        macs: Multiply-accumulate operations for one image; None if they were not recorded.
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
    """Return what a row costs, given the `backbone_sizes` of all rows."""
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
    """Return the backbones' numbers of parameters by the hash of their weights.

    They are computed from the shares that runs recorded, so a backbone with linear probing only (a share of
    0) is missing.
    """
    results = [result for row in rows for result in row.runs["result"] if result.tuned["share"] > 0]
    return {
        result.backbone["sha256"]: round(result.tuned["parameters"] / result.tuned["share"])
        for result in results
    }


def device_of(result: Result) -> str:
    """Return a run's devices in words, such as "2 x NVIDIA A100" or "cpu (8 threads)"."""
    machine = result.machine
    count = f"{machine['devices']} x " if machine["devices"] > 1 else ""
    threads = machine.get("threads") if machine["device"] == "cpu" else None
    return f"{count}{machine['device']}" + (f" ({threads} thread{'s' * (threads > 1)})" if threads else "")
