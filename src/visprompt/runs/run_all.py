"""Make several runs, one after the other: each in this process, or as a process group on several devices."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.table import Table

from visprompt.errors import UserError
from visprompt.files import temporary_folder
from visprompt.models.kind import KINDS
from visprompt.models.methods import method_class
from visprompt.models.objective import check_method
from visprompt.models.scores import in_percent
from visprompt.runs import compose, engine, environment, memory, other_lengths, run_folder, signals
from visprompt.runs.job import Job, Trainer
from visprompt.runs.result import Result, check_same_run, read_result
from visprompt.runs.run import Run, check, prepare, run_job
from visprompt.runs.run_folder import AtWork, is_free
from visprompt.runs.trainer import report_together, under_agent, without_wandb
from visprompt.runs.trainer_checks import check_callbacks, check_login, check_watched
from visprompt.text import Terminal
from visprompt.tuning import pruning_chain

log = logging.getLogger(__name__)
console = Terminal()
_POLL = 2.0  # seconds between two checks of runs that other processes are working on


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job.

    Attributes:
        name: Task and method: "dtd/vpt_deep".
        result: The result, or None if the run failed.
        reason: Why the run failed or diverged; otherwise "".
        folder: The folder of the result, or None if the run failed.
    """

    name: str
    result: Result | None
    reason: str = ""
    folder: Path | None = None


def train(cfg: DictConfig) -> float:
    """Train every task of a command line.

    Under a W&B agent one command is one W&B run: a single task logs to it while it trains, and several tasks
    are reported to it at the end.

    Args:
        cfg: The config that `@hydra.main` composed.

    Returns:
        Mean score over the tasks: val/acc if `split=tune`, else test/acc; -inf if one diverged, nan if one
        was not scored.

    Raises:
        UserError: A run failed, or (outside a multirun and an agent's sweep) diverged; the error is raised
            after all other runs. Or a sweeper would choose by the test accuracy.
    """
    check_sweeper(cfg)
    jobs = compose.jobs(cfg)
    check_all(jobs)
    together = under_agent() and len(jobs) > 1
    # ranks do not wait for other processes, because they would have to agree on the order of the jobs
    wait = len(jobs) > 1 and not engine.started_elsewhere()
    outcomes = run_all([without_wandb(job) for job in jobs] if together else jobs, wait)
    if together and _is_first():
        report_together(jobs, [o.result for o in outcomes], [o.folder for o in outcomes])
    bad = [f"{o.name}: {o.reason}" for o in outcomes if o.result is None]
    if not (compose.in_multirun() or under_agent()):  # in a sweep, a diverged run is a point with a low score
        bad += [f"{o.name}: {o.reason}" for o in outcomes if o.result is not None and o.reason]
    if bad:
        several = f" ({len(bad)} of {len(outcomes)} runs failed)" if len(outcomes) > 1 else ""
        raise UserError("; ".join(bad) + several)
    return sum(o.result.score for o in outcomes if o.result) / len(outcomes)


def check_sweeper(cfg: DictConfig) -> None:
    """Refuse a sweeper that would choose by the test accuracy."""
    if cfg.split != "tune" and compose.has_choosing_sweeper():
        raise UserError(
            "this sweeper chooses by the score that a run returns, and no choice may read a test score: give "
            "it split=tune"
        )


def check_all(jobs: Iterable[Job]) -> None:
    """Check the methods, callbacks and loggers of all jobs before the first one runs.

    Raises:
        UserError: A setting of a job is wrong, or a logger would stop to ask for an API key.
    """
    for job in jobs:
        try:
            check(job)
            check_method(job.recipe, method_class(job.method.name))
        except UserError as error:
            raise UserError(f"{job.name}: {error}") from error
        check_callbacks(job)
        check_login(job)


def run_all(jobs: Iterable[Job], wait: bool = True) -> list[Outcome]:
    """Run jobs one after the other; one that fails does not stop the others.

    Args:
        jobs: Composed jobs.
        wait: What to do about a run that another process is working on: True runs the other jobs first and
            then waits for that process to finish or end; False counts the run as failed.

    Returns:
        The outcomes of the jobs, in the same order.
    """
    outcomes: dict[int, Outcome] = {}
    waiting: dict[int, tuple[Job, Path]] = {}
    for number, job in enumerate(jobs):
        try:
            outcomes[number] = _outcome(job)
        except AtWork as error:
            if not wait:
                outcomes[number] = Outcome(job.name, None, str(error))
                continue
            waiting[number] = job, error.folder
            said = f"{job.name}: {error.who} is working on it: waiting until later"
            console.print(said, highlight=False, soft_wrap=True)
    while waiting:
        for number, (job, folder) in list(waiting.items()):
            if not is_free(folder):
                continue
            try:
                outcomes[number] = _outcome(job)
                del waiting[number]
            except AtWork as error:  # a third process, or a later run of a chain of pruning
                waiting[number] = job, error.folder
        if waiting:
            time.sleep(_POLL)
    return [outcomes[number] for number in sorted(outcomes)]


def _outcome(job: Job) -> Outcome:
    """Run one job and return its outcome; free its memory.

    Raises:
        AtWork: Another process is working on the run.
    """
    signals.check()
    name = job.name
    try:
        with signals.consequences():
            result, folder = _run_chain(job)
    except AtWork:
        raise
    except (UserError, engine.RanksFailed) as error:
        return Outcome(name, None, str(error))
    except Exception as error:  # a bug, here or in a library, must not stop the other runs
        log.exception("%s failed", name)
        return Outcome(name, None, f"{type(error).__name__}: {error}")
    finally:
        memory.give_back()
    diverged = result.status == "diverged"
    reason = f"the loss was not finite at step {result.diverged_step}: lower recipe.lr" if diverged else ""
    return Outcome(name, result, reason, folder)


def _run_chain(job: Job) -> tuple[Result, Path]:
    """Run a job, or the chain of runs that a job with pruning means; return the result and its folder."""
    runs: list[tuple[Result, Path]] = []

    def run_one(link: Job) -> Result:
        with memory.explained_for(link):
            runs.append(_run_one(link))
        return runs[-1][0]

    result = pruning_chain.run(job, run_one)
    return result, next(folder for each, folder in runs if each is result)


def _run_one(job: Job) -> tuple[Result, Path]:
    """Run one job in this process or on several devices and show the result; return it and its folder."""
    run = prepare(job)
    run_folder.tidy(run.folder)
    stored = None if job.rerun else read_result(run.folder)
    if stored:
        check_same_run(stored, run.identity, run.folder)
    else:
        check_watched(job, run.datamodule)
    devices = local_devices(job.trainer)
    elsewhere = engine.started_elsewhere()
    if stored is None and not (run.folder / run_folder.RESUME).exists() and _is_first():
        _say_other_lengths(run)
    if not elsewhere:
        engine.check_alone(job.trainer.get("plugins") or (), devices, job.trainer.num_nodes)
    if elsewhere:
        result = run_job(run)  # rank 0 decides for all whether the run is skipped
    elif stored and not job.logger:
        result = stored
    elif devices > 1:
        result = _run_ranks(run, devices)
    else:
        result = run_job(run)
    if _is_first():
        if stored:
            _say_skipped(stored, job)
        show(result, run)
    return result, run.folder


def _run_ranks(run: Run, devices: int) -> Result:
    """Run one job as a process group on several devices of this machine."""
    run.datamodule.prepare_data()  # once, before the ranks start
    with run_folder.locked(run.folder):
        pass  # raises AtWork if another process is working on the run
    try:
        with temporary_folder("job") as folder:  # not in the run's folder, whose lock is held by rank 0
            file = folder / "job.yaml"
            file.write_text(run.job.as_yaml(), encoding="utf-8")
            engine.run_ranks(engine.rank_command(file), devices)
    finally:
        run_folder.tidy(run.folder)  # ranks that did not end in time have been killed
    result = read_result(run.folder)
    if result is None:
        raise engine.RanksFailed(
            f"the ranks left no complete result in {run.folder}: run the same command again"
        )
    return result


def _is_first() -> bool:
    """Return whether this process is rank 0 of a process group, or not in a group at all."""
    return not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0)


def local_devices(trainer: Trainer) -> int:
    """Return the number of devices of this machine that a trainer config asks for."""
    devices = trainer.devices
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    try:
        return int(devices)
    except (TypeError, ValueError):
        raise UserError(
            f"trainer.devices={devices} is not a number: give one, auto, or a list such as [0,1]"
        ) from None


def _say_other_lengths(run: Run) -> None:
    """Say why a run starts from the beginning although one of another length is finished."""
    for epochs, folder in other_lengths.finished(run.folder, run.identity)[-1:]:
        console.print(
            f"the finished run of {epochs} epochs in {folder} is not continued: its learning rate was "
            f"scheduled for {epochs} epochs, so this run of {run.job.recipe.epochs} epochs starts from the "
            "beginning",
            soft_wrap=True,
        )


def _say_skipped(stored: Result, job: Job) -> None:
    commit, now = stored.versions["git_commit"], environment.git_commit()
    by_commit = f" (by commit {commit}; this is {now})" if commit != now else ""
    lacks_leak = (
        job.diagnostics.best_on_test and stored.split == "final" and "leak/best_on_test" not in stored.metrics
    )
    hint = " and adds what diagnostics.best_on_test=true asks for" if lacks_leak else ""
    console.print(f"finished before{by_commit}, not run again: rerun=true runs it anew{hint}")


def show(result: Result, run: Run) -> None:
    """Print a short table of a run's result, and its folder."""
    table = Table(title=f"{result.task}, {result.method['name']}, split={result.split}, seed={result.seed}")
    table.add_column("what")
    table.add_column("figure", overflow="fold")
    shares = KINDS[result.kind].shares
    for name, value in result.metrics.items():
        if name.startswith(("val/", "test/")) and name.partition("/")[2] in shares:
            table.add_row(name, in_percent(value, result.interval if name == result.score_name else None))
    if result.status == "diverged":
        table.add_row("status", f"diverged at step {result.diverged_step}")
    if result.status == "unscored":
        table.add_row("status", "not scored: there are no test images (data.test=none)")
    tuned = result.tuned
    table.add_row(
        "tuned parameters",
        f"{tuned['parameters']:,} ({100 * tuned['share']:.2f} % of the backbone) + head "
        f"{tuned['head_parameters']:,}",
    )
    if "bytes" in tuned:
        table.add_row("tuned state", f"{tuned['bytes'] / 1000:,.1f} kB")
    table.add_row("training time", f"{result.time['train_s']:.1f} s")
    table.add_row(
        "peak memory", f"{result.peak_memory['bytes'] / 2**20:,.0f} MiB ({result.peak_memory['of']})"
    )
    console.print(table)
    console.print(f"folder: {run.folder}", soft_wrap=True)  # on one line, so that it can be copied
