"""Make the runs of a unit of work in this process, or each as a process group on several devices.

A unit is what an engine (`runs.engine`) gives to one of its workers: one job, or several to train together.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from visprompt.errors import UserError, in_one_line
from visprompt.files import temporary_folder
from visprompt.models.kind import KINDS
from visprompt.models.scores import in_percent
from visprompt.runs import environment, memory, other_lengths, ranks, run_folder, run_lock, signals, stack
from visprompt.runs.devices import local_devices
from visprompt.runs.job import Job
from visprompt.runs.result import Result, check_same_run, read_result
from visprompt.runs.run import Run, prepare, run_job
from visprompt.runs.run_lock import AtWork
from visprompt.runs.trainer_checks import check_watched
from visprompt.text import Terminal
from visprompt.tuning import pruning_chain

log = logging.getLogger(__name__)
console = Terminal()
Unit = tuple[Job, ...]


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

    def record(self) -> dict[str, Any]:
        """Return the outcome as values for JSON; `Outcome.of(record)` builds it again."""
        result = self.result and self.result.model_dump(by_alias=True)
        folder = self.folder and str(self.folder)
        return {"name": self.name, "result": result, "reason": self.reason, "folder": folder}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Outcome":
        """Return the outcome whose `record` was sent by another process."""
        result, folder = record["result"], record["folder"]
        return cls(
            record["name"],
            result and Result.model_validate(result),
            record["reason"],
            folder and Path(folder),
        )


def run_unit(jobs: Unit) -> list[Outcome]:
    """Make the runs of a unit; one that fails does not stop the others.

    Args:
        jobs: The unit's jobs.

    Returns:
        The outcomes of the jobs, in the same order.

    Raises:
        AtWork: Another process is working on one of the runs, and the others are finished; the unit may be
            given again later.
    """
    try:
        with memory.explained_for(jobs[0]):
            together = len(jobs) > 1 or stack.goes_on(jobs[0])
    except Exception as error:  # whatever it is, this job failed, and the others go on
        return [_failed(jobs[0].name, error)]
    outcomes = _trained_together(jobs) if together else {}
    at_work: AtWork | None = None
    for place, job in enumerate(jobs):
        if place in outcomes:
            continue
        try:
            outcomes[place] = _outcome(job)
        except AtWork as error:
            at_work = error
    if at_work:
        raise at_work
    return [outcomes[place] for place in range(len(jobs))]


def _trained_together(jobs: Unit) -> dict[int, Outcome]:
    """Train the jobs of a unit as a stack, as far as that can be; return their outcomes by place."""
    signals.check()
    try:
        trained = stack.train(jobs)
    except stack.StackFailed as error:
        return {place: Outcome(job.name, None, str(error)) for place, job in enumerate(jobs)}
    finally:
        memory.give_back()
    for run, result in trained.values():
        show(result, run)
    return {place: _ended(jobs[place].name, result, run.folder) for place, (run, result) in trained.items()}


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
    except Exception as error:
        return _failed(name, error)
    finally:
        memory.give_back()
    return _ended(name, result, folder)


class DeviceLost(UserError):
    """A GPU failed under a run: after such an error CUDA does nothing more in this process."""


def _failed(name: str, error: Exception) -> Outcome:
    """Return the outcome of a job that failed, where the error is handled.

    Raises:
        DeviceLost: The error ends the use of the GPU in this process, so that all other runs would fail.
    """
    if isinstance(error, UserError | ranks.RanksFailed):
        return Outcome(name, None, str(error))
    if "CUDA error" in str(error):  # missing memory is a UserError by now
        log.exception("%s failed", name)
        raise DeviceLost(
            f"{name}: the GPU failed ({in_one_line(error)}): run the same command again, and look at "
            "nvidia-smi and the system's log if it fails again"
        ) from error
    log.exception("%s failed", name)  # a bug, here or in a library, must not stop the other runs
    return Outcome(name, None, f"{type(error).__name__}: {error}")


def _ended(name: str, result: Result, folder: Path) -> Outcome:
    """Return the outcome of a job with a result."""
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
    elsewhere = ranks.started_elsewhere()
    if not elsewhere or is_first():  # another rank would hold the folder when rank 0 begins
        run_lock.tidy(run.folder, run.remote)
    stored = None if job.rerun else read_result(run.folder)
    if stored:
        check_same_run(stored, run.identity, run.folder)
    else:
        check_watched(job, run.datamodule)
    devices = local_devices(job.trainer)
    if stored is None and not (run.folder / run_folder.RESUME).exists() and is_first():
        _say_other_lengths(run)
    if not elsewhere:
        ranks.check_alone(job.trainer.get("plugins") or (), devices, job.trainer.num_nodes)
    if elsewhere:
        result = run_job(run)  # rank 0 decides for all whether the run is skipped
    elif stored and not job.logger:
        result = stored
    elif devices > 1:
        result = _run_ranks(run, devices)
    else:
        result = run_job(run)
    if is_first():
        if stored:
            _say_skipped(stored, job)
        show(result, run)
    return result, run.folder


def _run_ranks(run: Run, devices: int) -> Result:
    """Run one job as a process group on several devices of this machine."""
    run.datamodule.prepare_data()  # once, before the ranks start
    with run_lock.locked(run.folder, run.remote):
        pass  # raises AtWork if another process is working on the run
    try:
        with temporary_folder("job") as folder:  # not in the run's folder, whose lock is held by rank 0
            file = folder / "job.yaml"
            file.write_text(run.job.as_yaml(), encoding="utf-8")
            ranks.run_ranks(ranks.rank_command(file), devices)
    except ranks.RanksFailed:
        with run_lock.locked(run.folder, run.remote):
            raise  # AtWork if rank 0 ended because another process has taken the run
    finally:
        run_lock.tidy(run.folder, run.remote)  # ranks that did not end in time have been killed
    result = read_result(run.folder)
    if result is None:
        raise ranks.RanksFailed(
            f"the ranks left no complete result in {run.folder}: run the same command again"
        )
    return result


def is_first() -> bool:
    """Return whether this process is rank 0 of a process group, or not in a group at all."""
    return not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0)


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
