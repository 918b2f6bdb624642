"""The protocol: a grid with `split=tune`, the choice on val200, then seeds with `split=final`.

Task adaptation's protocol (Zhai et al., 2019) as both papers use it: hyper-parameters are chosen by training
on train800 and scoring val200 after the last epoch; the chosen ones are retrained on train800val200, and test
is read once for each seed. No choice reads a test score. Every step is a run with a folder of its own, so the
whole resumes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError, unknown
from visprompt.files import write_atomically
from visprompt.models.methods import METHODS
from visprompt.runs import compose
from visprompt.runs.job import Job, check_effect
from visprompt.runs.result import Cell, cell, choose, markdown_table
from visprompt.runs.run import check, prepare
from visprompt.runs.run_all import Outcome, check_all, run_all
from visprompt.runs.trainer import under_agent
from visprompt.text import Terminal
from visprompt.tuning import pruning_chain

GRID_SEED = 42
RELEASED_SEEDS = (42, 44, 82, 100, 800)
"""Seeds of the final runs in VPT's released code; its published table of settings has the first three."""
console = Terminal()
RunAll = Callable[[Iterable[Job]], list[Outcome]]


def tune(cfg: DictConfig) -> float:
    """Run the protocol for every method and task of a command line and writes the table.

    Args:
        cfg: What `@hydra.main` composed: a training config with methods, seeds and table.

    Returns:
        Mean test accuracy over all cells.

    Raises:
        UserError: An empty or unknown choice, a grid that is none, runs that failed (what is finished stays
            finished), or a W&B agent or Hydra's `-m`: what these are told of the final runs, they would
            choose by.
    """
    jobs, seeds = asked(cfg)
    check_all(jobs)
    if "debug" in jobs[0].tags:
        raise UserError(
            "a trainer setting cuts every run short, and src/tune.py makes results, which such runs are "
            "not: leave it out, or debug src/train.py"
        )
    for job in jobs:
        job_points(job)  # says what is wrong with it before anything is trained
        _check_sets(job)
    cells: dict[tuple[str, str], Cell] = {}
    failed: list[str] = []
    for job in jobs:
        scored = tune_one(job, seeds, run_all)
        failed += [f"{o.name}: {o.reason}" for o in scored if o.reason]
        results = [
            o.result for o in scored if o.result is not None and not o.reason and o.result.split == "final"
        ]
        try:
            if len(results) == len(seeds):
                cells[job.method.name, results[0].task] = cell(results)
        except (
            UserError
        ) as error:  # an older one is recorded otherwise; the other cells are good all the same
            failed.append(f"{job.name}: {error}")
    if cells:
        table = _table(cells)
        write_atomically(Path(cfg.table), lambda temporary: temporary.write_text(table, encoding="utf-8"))
        console.print(f"\n{table}\nwritten to {cfg.table}")
    if failed:
        raise UserError("; ".join(failed) + (f" ({len(failed)} runs failed)" if len(failed) > 1 else ""))
    return sum(found.mean for found in cells.values()) / len(cells)


def asked(cfg: DictConfig) -> tuple[list[Job], list[int]]:
    """Return a job for each method and task of a command line, and the seeds of their final runs.

    Raises:
        UserError: As `tune`, before anything is run.
    """
    if compose.in_multirun():
        raise UserError(
            "src/tune.py is one command with one table: give methods=[...], tasks=[...] and seeds=[...] "
            "instead of -m; src/train.py -m split=tune can make the points of its grid beforehand"
        )
    if cfg.rerun:
        raise UserError(
            "rerun=true, which debug=... sets too, would run the whole grid anew at each call: give another "
            "paths.log_dir=... instead, and debug src/train.py"
        )
    if under_agent():
        raise UserError(
            "src/tune.py tries a grid and chooses from it, and so does a W&B sweep: "
            "give its agents src/train.py with split=tune, or run src/tune.py without an agent"
        )
    methods = _methods(cfg)
    seeds = list(RELEASED_SEEDS) if cfg.seeds == "released" else _choices(cfg, "seeds")
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    jobs = [job for method in methods for job in compose.jobs(cfg, [f"method={method}"])]
    if any(job.task == "folder" and job.data.test == "none" for job in jobs):
        raise UserError(
            "src/tune.py makes a table of test accuracies, and data.test=none scores none: take it away"
        )
    return jobs, seeds


def _check_sets(job: Job) -> None:
    """Raise where own images lack those that the grid or the final runs score."""
    for split in ("tune", "final") if job.task == "folder" else ():
        prepare(job.vary({"split": split}))


def _methods(cfg: DictConfig) -> list[str]:
    if cfg.methods == "all":
        return list(METHODS)
    return [cfg.method.name] if cfg.methods is None else _choices(cfg, "methods")


def _choices(cfg: DictConfig, name: str) -> list[Any]:
    """Return a list of the config; an entry that stands twice would be counted twice in the table."""
    given = cfg[name]
    if not OmegaConf.is_list(given) or not given or len({str(entry) for entry in given}) < len(given):
        raise UserError(
            f"{name}={given} is no choice: give a list {name}=[...] of at least one entry, and none twice"
        )
    return list(given)


def tune_one(job: Job, seeds: Sequence[int], run: RunAll) -> list[Outcome]:
    """Return the protocol for one method on one task.

    Args:
        job: A composed job; its `recipe.grid` is what is tried.
        seeds: Seeds of the final runs.
        run: Runs jobs and returns their outcomes, as `run_all` does.

    Returns:
        Outcomes of the final runs; those of the grid's runs that failed, or of the whole grid where it
        diverged.

    Raises:
        UserError: The grid is none, has an unknown key, or tries what the protocol itself sets.
    """
    name = job.name
    points = job_points(job)
    if alone := {
        key: value for key, value in points[0].items() if all(point[key] == value for point in points)
    }:
        console.print(f"{name}: of one value in the grid: {_words(alone)}")
    tried = _run(job, [point | _tuning(job) for point in points], run)
    if failed := [outcome for outcome in tried if outcome.result is None]:
        return failed  # a choice among what happened to succeed would be another protocol
    chosen = choose([outcome.result for outcome in tried], points)
    if chosen is None:
        return tried
    console.print(f"{name}: chosen on validation: {_words(chosen) or 'the only point'}")
    return _run(job, [chosen | {"split": "final", "seed": seed} for seed in seeds], run)


def job_points(job: Job) -> list[dict[str, Any]]:
    """Return all points of a job's grid.

    Raises:
        UserError: As `tune_one`.
    """
    points = grid_points(job.grid)
    for key in points[0].keys() & _tuning(job).keys():
        raise UserError(
            f"recipe.grid.{key} is nothing to try, the protocol itself sets it: take it out of the grid"
        )
    for point in points:
        varied = job.vary(point)
        check(varied)
        check_effect(varied.recipe)
    return points


def _tuning(job: Job) -> dict[str, Any]:
    """Return what the protocol itself sets for the points of a grid.

    Pruning comes when all else is chosen.
    """
    return {"split": "tune", "seed": GRID_SEED} | pruning_chain.unpruned(job)


def _run(job: Job, varied: Sequence[Mapping[str, Any]], run: RunAll) -> list[Outcome]:
    """Run a job with other values; the outcomes' names tell them apart."""
    outcomes = run([job.vary(values) for values in varied])
    pairs = zip(outcomes, varied, strict=True)
    return [replace(outcome, name=f"{outcome.name} {_words(values)}") for outcome, values in pairs]


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def grid_points(grid: Any) -> list[dict[str, Any]]:
    """Return all points of a grid.

    Args:
        grid: Dotted keys, each with a list of values; None or no key is the one point that changes nothing.

    Returns:
        One mapping of key to value for each point.

    Raises:
        UserError: The grid is none, or a list of it is empty or no list.
    """
    grid = {} if grid is None else grid
    if not isinstance(grid, dict):
        raise UserError(f"recipe.grid={grid} is no grid: give dotted keys, each with a list of values")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"recipe.grid.{key}={values} is no choice: give a list of at least one value")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _table(cells: Mapping[tuple[str, str], Cell]) -> str:
    methods = list(dict.fromkeys(method for method, _ in cells))
    tasks = list(dict.fromkeys(task for _, task in cells))
    rows = [[m, *(str(cells[m, t]) if (m, t) in cells else "missing" for t in tasks)] for m in methods]
    return markdown_table(["test accuracy (%), ± sample standard deviation (n - 1)", *tasks], rows)
