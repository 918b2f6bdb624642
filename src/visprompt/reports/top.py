"""List the best runs of each task in the terminal."""

from collections.abc import Sequence

import pandas as pd
from rich.table import Table

from visprompt.reports.load import groups
from visprompt.reports.settings import ADDED_LATER, settings, task_place, words
from visprompt.runs.result import Result
from visprompt.text import Terminal

_SCORED = {"final": "test", "tune": "validation"}
_ALWAYS = ("method.num_tokens", "recipe.lr")
# besides method and recipe
_OTHERS = (
    *("backbone.name", "backbone.sha256", "data.augment", "data.fingerprint", "data.fraction"),
    *("data.preprocessing.size", "data.source", "precision"),
)


def show_top(runs: pd.DataFrame, number: int, console: Terminal) -> None:
    """Print a table for each task and split, so that validation and test scores are never in one list.

    Args:
        runs: The runs, see `load.frame`.
        number: Maximum number of runs in a table.
        console: Where to print.
    """
    scored = runs[runs["status"] == "finished"]
    if scored.empty:
        console.print("no run has a score: those that are there diverged, or had no test images")
    parts = groups(scored, ["task", "split"])
    places = {split: place for place, split in enumerate(_SCORED)}
    for part in sorted(parts, key=lambda p: (task_place(p["task"].iat[0]), places[p["split"].iat[0]])):
        _show(part, number, console)


def _show(runs: pd.DataFrame, number: int, console: Terminal) -> None:
    """Print the best runs of one task and split; of equal scores the run with fewer parameters is first."""
    results: list[Result] = list(runs["result"])
    told = dict(zip(runs.index, _told(results), strict=True))
    order = sorted(
        runs.index, key=lambda i: (-runs["result"][i].score, runs["parameters"][i], str(runs["folder"][i]))
    )[:number]
    task, split, total = results[0].task, results[0].split, len(results)
    count = f"the {number} best of {total} runs" if total > number else f"{total} run{'s' * (total > 1)}"
    table = Table(title=f"{task}, {_SCORED[split]} score of split={split}: {count}")
    table.add_column("", justify="right")
    table.add_column("method")
    table.add_column("settings", overflow="fold")
    table.add_column("seed", justify="right")
    interval = " (95 % interval)" if any(result.interval for result in results) else ""
    table.add_column(f"{results[0].score_name}{interval}")
    table.add_column("tuned + head", justify="right")
    for rank, i in enumerate(order, 1):
        result, tuned = runs["result"][i], runs["result"][i].tuned
        table.add_row(
            str(rank),
            str(result.method["name"]),
            told[i],
            str(result.seed),
            _percent(result),
            f"{tuned['parameters']:,} + {tuned['head_parameters']:,}",
        )
    console.print(table)
    for rank, i in enumerate(order, 1):  # each on one line, so that it can be copied
        console.print(f"{rank}: {runs['folder'][i]}", soft_wrap=True)


def _percent(result: Result) -> str:
    low, high = result.interval or (None, None)
    shown = f"{100 * result.score:.2f} %"
    return shown if low is None or high is None else f"{shown} ({100 * low:.1f} to {100 * high:.1f})"


def _told(results: Sequence[Result]) -> list[str]:
    """Return settings of each run, in words: prompts and rate, and others in which the runs differ."""
    found = [ADDED_LATER | settings(result) for result in results]
    values: dict[str, set[str]] = {}
    for one in found:
        for key, value in one.items():
            values.setdefault(key, set()).add(value)
    told = [key for key in sorted(values) if key.startswith(("method.", "recipe.")) or key in _OTHERS]
    keys = dict.fromkeys((*_ALWAYS, *(key for key in told if len(values[key]) > 1)))
    return [", ".join(words(key, one[key]) for key in keys if key in one) for one in found]
