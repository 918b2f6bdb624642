"""Run the papers' protocol: a grid with `split=tune`, the choice on val200, then seeds with `split=final`.

This is the protocol of VTAB (Zhai et al., 2019) as both papers use it. Every point of the grid is trained on
train800 and scored on val200 after the last epoch. The point with the best score is trained again on
train800val200, once for each seed, and scored on the test set. No choice reads a test score. Every step is a
run with a separate folder, so that the protocol can be resumed.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError, unknown
from visprompt.files import write_atomically
from visprompt.models.kind import KINDS
from visprompt.models.methods import METHODS
from visprompt.runs import compose, ranks
from visprompt.runs.engine.choose import opened
from visprompt.runs.engine.drive import Named, Steps, drive
from visprompt.runs.job import Job, check_effect
from visprompt.runs.result import Cell, Result, cell, choose, markdown_table
from visprompt.runs.run import check, prepare
from visprompt.runs.run_all import asks_for_stacks, check_all
from visprompt.runs.trainer import under_agent
from visprompt.runs.unit import Outcome
from visprompt.text import Terminal
from visprompt.tuning import pruning_chain

GRID_SEED = 42
RELEASED_SEEDS = (42, 44, 82, 100, 800)
"""Seeds of the final runs in VPT's released code; its published table of settings uses the first three."""
console = Terminal()
_T = TypeVar("_T")


def tune(cfg: DictConfig) -> float:
    """Run the protocol for every method and task of a command line and write the table.

    Args:
        cfg: The config that `@hydra.main` composed: a training config with methods, seeds and table.

    Returns:
        Mean test score over all methods and tasks.

    Raises:
        UserError: A list of methods or seeds is empty or has an unknown entry, a grid is malformed, a run
            failed (finished runs stay finished), or the command runs under `-m` or a W&B agent, which could
            choose by the test score.
    """
    jobs, seeds = asked(cfg)
    check_all(jobs)
    total = 0
    for job in jobs:
        points = job_points(job)  # finds errors in the grid before anything is trained
        _check_sets(job)
        total += len(chosen_points(points, cfg.points)) + (0 if cfg.points is not None else len(seeds))
    stacks = asks_for_stacks(cfg)
    # ranks do not wait for other processes, because they would have to agree on the order of the jobs
    wait = not ranks.started_elsewhere()
    with opened(compose.plain(cfg.engine), jobs, total, wait) as engine:
        if cfg.points is not None:
            return _mean_score(drive(engine, [_only_points(job, cfg.points) for job in jobs], stacks))
        scored_by_job = drive(engine, [tune_one(job, seeds) for job in jobs], stacks)
    cells, table, failed = tabulated(jobs, seeds, scored_by_job)
    if cells:
        console.print(f"\n{table}")
    if cells and cfg.table is not None:
        write_atomically(Path(cfg.table), lambda temporary: temporary.write_text(table, encoding="utf-8"))
        console.print(f"written to {cfg.table}")
    if failed:
        raise UserError("; ".join(failed) + (f" ({len(failed)} runs failed)" if len(failed) > 1 else ""))
    return sum(each.mean for each in cells.values()) / len(cells)


def tabulated(
    jobs: Sequence[Job], seeds: Sequence[int], scored_by_job: Sequence[Sequence[Outcome]]
) -> tuple[dict[tuple[str, str], Cell], str, list[str]]:
    """Return the cells of the table by method and task, the table, and the reasons of what is missing.

    Args:
        jobs: The jobs of the protocol.
        seeds: The seeds of their final runs.
        scored_by_job: What `tune_one` returned for each job.
    """
    cells: dict[tuple[str, str], Cell] = {}
    scores: dict[str, str] = {}  # the score of each task in words
    failed: list[str] = []
    for job, scored in zip(jobs, scored_by_job, strict=True):
        failed += [f"{o.name}: {o.reason}" for o in scored if o.reason]
        results = [
            o.result for o in scored if o.result is not None and not o.reason and o.result.split == "final"
        ]
        try:
            if len(results) == len(seeds):
                cells[job.method.name, results[0].task] = cell(results)
                scores[results[0].task] = KINDS[results[0].kind].words
        # an older run recorded its settings otherwise; other cells are not affected
        except UserError as error:
            failed.append(f"{job.name}: {error}")
    return cells, _table(cells, scores) if cells else "", failed


def asked(cfg: DictConfig) -> tuple[list[Job], list[int]]:
    """Return a job for each method and task of a command line, and the seeds of their final runs.

    Raises:
        UserError: As in `tune`, but before anything is run.
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
    if any(job.has_own_images and job.data.test == "none" for job in jobs):
        raise UserError(
            "src/tune.py makes a table of test scores, but data.test=none has no test set: leave it out"
        )
    if "debug" in jobs[0].tags:
        raise UserError(
            "a trainer setting cuts every run short, and src/tune.py makes results, which such runs are "
            "not: leave it out, or debug src/train.py"
        )
    return jobs, seeds


def _check_sets(job: Job) -> None:
    """Check that the user's images have all sets that the grid and the final runs need.

    Raises:
        UserError: A set is missing or empty.
    """
    for split in ("tune", "final") if job.has_own_images else ():
        prepare(job.vary({"split": split}))


def _methods(cfg: DictConfig) -> list[str]:
    if cfg.methods == "all":
        return list(METHODS)
    return [cfg.method.name] if cfg.methods is None else _choices(cfg, "methods")


def _choices(cfg: DictConfig, name: str) -> list[Any]:
    """Return a list in the config; a duplicate entry, which would count twice in the table, is refused."""
    given = cfg[name]
    if not OmegaConf.is_list(given) or not given or len({str(entry) for entry in given}) < len(given):
        raise UserError(
            f"{name}={given} does not fit: give a list {name}=[...] of at least one entry, none of them twice"
        )
    return list(given)


def tune_one(job: Job, seeds: Sequence[int]) -> Steps[list[Outcome]]:
    """Run the protocol for one method on one task.

    Args:
        job: A composed job with the grid to try.
        seeds: Seeds of the final runs.

    Yields:
        The jobs of the grid, then those of the final runs; `drive` sends their outcomes.

    Returns:
        The outcomes of the final runs; if runs of the grid failed, only the outcomes of these; if all runs
        of the grid diverged, their outcomes.

    Raises:
        UserError: The grid is malformed, has an unknown key, or has a key that the protocol itself sets.
    """
    name = job.name
    try:
        pruning_chain.check(job)
    except UserError as error:  # other methods of the command go on
        return [Outcome(name, None, str(error))]
    points = job_points(job)
    fixed = {key: value for key, value in points[0].items() if all(point[key] == value for point in points)}
    if fixed:
        console.print(f"{name}: with a single value in the grid: {_words(fixed)}")
    outcomes = yield _varied(job, [point | _tuning(job) for point in points])
    if failed := [outcome for outcome in outcomes if outcome.result is None]:
        return failed  # choosing among the runs that happened to succeed would be another protocol
    chosen = choose([outcome.result for outcome in outcomes], points)
    if chosen is None:
        return outcomes
    console.print(f"{name}: chosen on validation: {_words(chosen) or 'the only point'}")
    return (yield _varied(job, [chosen | {"split": "final", "seed": seed} for seed in seeds]))


def looked_up(
    job: Job, seeds: Sequence[int], stored: Callable[[Job], Result | None]
) -> tuple[list[list[Job]], list[Outcome]]:
    """Advance the protocol of one method on one task as far as finished runs allow.

    Args:
        job: As in `tune_one`.
        seeds: As in `tune_one`.
        stored: Returns the result of a job, or None if it is not finished.

    Returns:
        The jobs of the grid and, if all of them are finished, those of the final runs; and what `tune_one`
        returns if a run that is not finished counts as failed.

    Raises:
        UserError: The job's runs would be refused.
    """
    steps: list[list[Job]] = []
    sequence = tune_one(job, seeds)
    try:
        named = next(sequence)
    except StopIteration as end:
        raise UserError(end.value[0].reason) from None
    while True:
        steps.append([each for _, each in named])
        try:
            named = sequence.send([Outcome(each.name, stored(each)) for each in steps[-1]])
        except StopIteration as end:
            return steps, end.value


def _only_points(job: Job, numbers: Sequence[int]) -> Steps[list[Outcome]]:
    """Run some points of a job's grid, without choosing and without final runs."""
    chosen = chosen_points(job_points(job), numbers)
    return (yield _varied(job, [point | _tuning(job) for point in chosen]))


def chosen_points(points: Sequence[_T], numbers: Sequence[int] | None) -> list[_T]:
    """Return the points of a grid with some numbers, or all points if the numbers are None.

    Raises:
        UserError: The grid has no point of that number, or there are no numbers.
    """
    if numbers is None:
        return list(points)
    if not numbers or max(numbers) >= len(points):
        raise UserError(
            f"points={list(numbers)} does not fit: give a list of numbers from 0 to {len(points) - 1}, the "
            "points of this grid"
        )
    return [points[number] for number in numbers]


def _mean_score(outcomes_by_job: Sequence[Sequence[Outcome]]) -> float:
    """Return the mean validation score of points; -inf if one diverged, which is no failure in a grid.

    Raises:
        UserError: Runs failed.
    """
    outcomes = [outcome for outcomes in outcomes_by_job for outcome in outcomes]
    if failed := [f"{o.name}: {o.reason}" for o in outcomes if o.result is None]:
        raise UserError("; ".join(failed))
    return sum(o.result.score for o in outcomes if o.result) / len(outcomes)


def job_points(job: Job) -> list[dict[str, Any]]:
    """Return all points of a job's grid.

    Raises:
        UserError: As in `tune_one`.
    """
    points = grid_points(job.grid)
    for key in points[0].keys() & _tuning(job).keys():
        raise UserError(f"recipe.grid.{key} is set by the protocol itself: take it out of the grid")
    for point in points:
        varied = job.vary(point)
        check(varied)
        check_effect(varied.recipe)
    return points


def _tuning(job: Job) -> dict[str, Any]:
    """Return what the protocol itself sets for every point of a grid; pruning is left to the final runs."""
    return {"split": "tune", "seed": GRID_SEED} | pruning_chain.unpruned(job)


def _varied(job: Job, variants: Sequence[Mapping[str, Any]]) -> list[Named]:
    """Return variants of a job, each with its values in its name: "dtd/vpt_deep recipe.lr=0.1"."""
    return [(f"{job.name} {_words(values)}", job.vary(values)) for values in variants]


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def grid_points(grid: Any) -> list[dict[str, Any]]:
    """Return all points of a grid.

    Args:
        grid: Lists of values by dotted key. None or {} gives a single point that changes nothing.

    Returns:
        Values by key for each point: {"a": [1, 2], "b": [3]} gives [{"a": 1, "b": 3}, {"a": 2, "b": 3}].

    Raises:
        UserError: The grid is not a mapping, or a value in it is not a list or is empty.
    """
    grid = {} if grid is None else grid
    if not isinstance(grid, dict):
        raise UserError(f"recipe.grid={grid} is not a grid: give dotted keys, each with a list of values")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"recipe.grid.{key}={values} gives nothing to try: give a list of at least one value"
            )
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _table(cells: Mapping[tuple[str, str], Cell], scores: Mapping[str, str]) -> str:
    """Return the table of scores; tasks say which score they have if they differ in it."""
    methods = list(dict.fromkeys(method for method, _ in cells))
    rows = [[m, *(str(cells[m, t]) if (m, t) in cells else "missing" for t in scores)] for m in methods]
    same = len({*scores.values()}) == 1
    score = next(iter(scores.values())) if same else "score"
    tasks = scores if same else [f"{task} ({words})" for task, words in scores.items()]
    return markdown_table([f"test {score} (%), ± sample standard deviation (n - 1)", *tasks], rows)
