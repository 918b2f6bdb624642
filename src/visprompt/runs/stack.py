"""Train the jobs of a grid that differ in learning rate, weight decay or seed together, as one stack.

`groups` finds such jobs, and `train` trains those of a group that are neither finished nor begun, with
`models.stacked`. Each has its own folder with the files of a single run, so that all else reads them as
before; their `result.json` says under `machine` that they were stacked. A stack writes no resume state: the
folders are locked while it trains, all results are written at its end, each as a whole, and after a kill the
same command trains those that are missing again.

Stacked runs are equal to single ones up to rounding, and means over seeds are never taken over both: of the
final runs of a group, all are stacked or none.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from visprompt.errors import UserError
from visprompt.models.feature_cache import has_own_memory
from visprompt.models.kind import KINDS
from visprompt.runs import matmul, run_folder, run_lock, signals
from visprompt.runs.identity import digest
from visprompt.runs.job import DEFAULT_MODULE, Job
from visprompt.runs.result import Result, check_same_run, is_stacked, read_result
from visprompt.runs.results_store import Results
from visprompt.runs.run import Run, prepare
from visprompt.runs.run_lock import AtWork
from visprompt.runs.stack_training import PRECISIONS, Point, Stack
from visprompt.runs.trainer import build_trainer

log = logging.getLogger(__name__)
_METHODS = frozenset({"linear", "mlp", "partial"})
_VARIED = ("lr", "weight_decay")  # settings of a recipe that differ within a group
# values of settings of the trainer with which a job may be trained in a stack
_TRAINER = {
    "devices": (1, "1"),
    "strategy": ("auto",),
    **dict.fromkeys(("num_nodes", "accumulate_grad_batches", "check_val_every_n_epoch"), (1,)),
}
# settings that a stack follows, or that change nothing in it
_FOLLOWED = frozenset({"_target_", "accelerator", "deterministic", "benchmark", "enable_progress_bar"}) | {
    *("gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps", "inference_mode")
}


def groups(jobs: Sequence[Job]) -> list[list[int]]:
    """Group jobs that may be trained as one stack.

    Args:
        jobs: Composed jobs.

    Returns:
        The places of the jobs of each group; a job that runs singly is a group of one. Groups are in the
        order of their first jobs.
    """
    found: dict[str, list[int]] = {}
    for place, job in enumerate(jobs):
        found.setdefault(_shape(job) if _may_stack(job) else f"{place}", []).append(place)
    return list(found.values())


def _shape(job: Job) -> str:
    """Return as one text all that is the same for the jobs of a stack."""
    content = job.content()
    recipe = {name: value for name, value in content.pop("recipe").items() if name not in _VARIED}
    if job.backbone.pretrained:  # random weights differ from seed to seed
        del content["seed"]
    return json.dumps([content, recipe, job.recipe.uses_sgd], sort_keys=True, default=str)


def _may_stack(job: Job) -> bool:
    """Return whether a job's settings allow that it is trained in a stack."""
    trainer = dict(job.trainer)
    callbacks = {name for name, callback in (job.callbacks or {}).items() if callback is not None}
    return (
        job.method.name in _METHODS
        and job.precision in PRECISIONS
        and not (
            job.recipe.mixes or job.recipe.fused or job.compile or job.logger or job.diagnostics.best_on_test
        )
        and not job.recipe.max_steps
        and job.recipe.schedule != "poly"  # by which rates decay to different shares
        and job.data.get("augment", "none") == "none"
        and dict(job.lightning_module) == DEFAULT_MODULE
        and "debug" not in job.tags
        and callbacks <= {"progress_bar"}
        and all(trainer.get(name, allowed[0]) in allowed for name, allowed in _TRAINER.items())
        and trainer.keys() <= _FOLLOWED | _TRAINER.keys()
    )


class StackFailed(UserError):
    """Final runs could not be trained in a stack although other seeds were; they may not be single runs."""


def goes_on(job: Job) -> bool:
    """Return whether a job is a final run that is trained in a stack because other seeds were.

    With `rerun=true` it is a single run: so stacked seeds can be made again singly, one after the other.

    Raises:
        StackFailed: Other seeds were, and the job's settings do not allow it.
    """
    if job.split != "final" or job.rerun or job.method.name not in _METHODS or "debug" in job.tags:
        return False
    run = prepare(job)
    stacked = _stacked_seeds(run)
    if not stacked or _may_stack(job):
        return bool(stacked)
    if run.folder.name in stacked or read_result(run.folder):
        return False  # it is finished: it is shown, and reports to the loggers of this command
    raise StackFailed(
        f"other seeds of {job.name} were trained together, and this command has settings with which that "
        "is not possible (docs/runs.md lists them: loggers other than csv, for example): leave them out, "
        "or run each seed singly with src/train.py and rerun=true"
    )


def _stacked_seeds(run: Run) -> set[str]:
    """Return the names of the folders of runs that differ from a run in the seed and were stacked."""
    here = [path.parent for path in run.folder.parent.glob("*/result.json")]
    found = [(folder.name, read_result(folder, hashed=False)) for folder in here]
    if results := Results.of(run.job.paths):
        found += results.of_group(run.folder.parent)
    return {
        name
        for name, result in found
        if result and is_stacked(result) and digest({**run.identity, "seed": result.seed}) == name
    }


def train(jobs: Sequence[Job]) -> dict[int, tuple[Run, Result]]:
    """Train the jobs of a group as a stack, as far as that can be; the others are left to single runs.

    Args:
        jobs: Jobs that `groups` put together.

    Returns:
        The runs that were trained, with their results, by their places among the jobs.

    Raises:
        AtWork: Another process is working on one of the final runs: whether the others must be stacked is
            known when it has ended.
        StackFailed: Final runs were not trained, and other seeds have been trained in a stack.
    """
    runs: list[Run] = []
    trained: dict[int, tuple[Run, Result]] = {}
    why = "no room in memory, or another device"
    try:
        with signals.consequences(), ExitStack() as locks, matmul.matmul_precision(jobs[0]):
            runs = _prepared(jobs)
            stack = _open(runs, locks)
            trained = {} if stack is None else stack.train()
    except AtWork:
        raise
    except UserError as error:
        why = str(error)  # if there are single runs, they say what is wrong
    except Exception as error:  # no room, or a bug
        why = f"{type(error).__name__}: {error}"
        log.warning("%s: no stack of its points, they run one after the other (%s)", jobs[0].name, why)
    if runs and not trained and jobs[0].split == "final":
        _check_none_stacked(runs, why)
    return trained


def _check_none_stacked(runs: Sequence[Run], why: str) -> None:
    """Refuse single runs next to seeds that were trained in a stack."""
    if any(run.job.rerun or not read_result(run.folder) for run in runs) and _stacked_seeds(runs[0]):
        raise StackFailed(
            f"seeds of {runs[0].job.name} were trained in a stack, which now fails for the others ({why}): "
            "run the same command again, or each seed singly with src/train.py and rerun=true"
        )


def _open(runs: Sequence[Run], locks: ExitStack) -> Stack | None:
    """Lock the folders of the runs to train; return None if none is trained in a stack."""
    places = _to_train(runs)
    data = runs[0].datamodule
    if not places or data.augments or KINDS[data.kind].dense:
        return None
    device = build_trainer(runs[0].job).strategy.root_device
    if device.type not in ("cpu", "cuda"):  # dropout of other devices has a generator of another kind
        return None
    final, points, single = runs[0].job.split == "final", [], False
    for place in places:
        run = runs[place]
        try:
            hold = locks.enter_context(run_lock.locked(run.folder, run.remote))
        except AtWork:
            if final:
                raise
            continue
        attempt = run_folder.next_attempt(run.folder, hold.stored, run.job.rerun)
        if attempt is not None:
            points.append(Point(place, run, attempt, hold))
        elif hold.stored:  # another process has just finished it
            single = single or not is_stacked(hold.stored)
    if (single and final) or len(points) < (1 if final else 2):
        return None
    stack = Stack(points, device)
    # a block of a transformer fills a CPU, where a stack of them is slower than single runs
    return stack if stack.has_frozen_part and (stack.only_head or has_own_memory(device)) else None


def _prepared(jobs: Sequence[Job]) -> list[Run]:
    """Return the run of each job; those of a seed differ in the recipe only, and one of them is prepared."""
    first: dict[int, Run] = {}
    runs = []
    for job in jobs:
        run = first.get(job.seed) or first.setdefault(job.seed, prepare(job))
        identity = {**run.identity, "recipe": job.recipe.record()}
        runs.append(replace(run, job=job, identity=identity, folder=run.folder.with_name(digest(identity))))
    return runs


def _to_train(runs: Sequence[Run]) -> list[int]:
    """Return the places of the runs to train in a stack: those that are neither finished nor begun singly.

    Of final runs, all are stacked or none: if one is finished, the others are what it is.
    """
    places = {run.folder: place for place, run in reversed([*enumerate(runs)])}  # the first of equal runs
    rerun, final = runs[0].job.rerun, runs[0].job.split == "final"
    stored = {} if rerun else _stored({folder: runs[place] for folder, place in places.items()})
    begun = {folder for folder in places if (folder / run_folder.RESUME / run_folder.STATE).is_file()}
    goes_on = final and (any(map(is_stacked, stored.values())) or _stacked_seeds(runs[0]))
    if final and not goes_on and (stored or begun):
        return []
    left_out = {*stored} if goes_on else {*stored, *begun}
    found = sorted(place for folder, place in places.items() if folder not in left_out)
    return found if len(found) > 1 or goes_on else []


def _stored(runs: Mapping[Path, Run]) -> dict[Path, Result]:
    """Return the results of finished runs by folder."""
    found = {}
    for folder, run in runs.items():
        run_lock.tidy(folder, run.remote)
        if result := read_result(folder):
            check_same_run(result, run.identity, folder)
            found[folder] = result
    return found
