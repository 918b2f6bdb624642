"""Make the runs of all tasks of a command line."""

from collections.abc import Iterable, Sequence

from omegaconf import DictConfig

from visprompt.errors import UserError
from visprompt.models.methods import method_class
from visprompt.models.objective import check_method
from visprompt.runs import compose, ranks
from visprompt.runs.engine.choose import opened
from visprompt.runs.engine.drive import drive, in_one_step
from visprompt.runs.engine.local import LocalEngine
from visprompt.runs.job import Job
from visprompt.runs.results_store import Results
from visprompt.runs.run import check
from visprompt.runs.trainer import report_together, under_agent, without_wandb
from visprompt.runs.trainer_checks import check_callbacks, check_login
from visprompt.runs.unit import Outcome, is_first


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
            after all other runs. Or a sweeper would choose by the test score.
    """
    check_sweeper(cfg)
    jobs = compose.jobs(cfg)
    check_all(jobs)
    together = under_agent() and len(jobs) > 1
    # ranks do not wait for other processes, because they would have to agree on the order of the jobs
    wait = len(jobs) > 1 and not ranks.started_elsewhere()
    with opened(compose.plain(cfg.engine), jobs, len(jobs), wait) as engine:
        steps = in_one_step(map(without_wandb, jobs) if together else jobs)
        (outcomes,) = drive(engine, [steps], stacks=asks_for_stacks(cfg))
    if together and is_first():
        report_together(jobs, [o.result for o in outcomes], [o.folder for o in outcomes])
    bad = [f"{o.name}: {o.reason}" for o in outcomes if o.result is None]
    if not (compose.in_multirun() or under_agent()):  # in a sweep, a diverged run is a point with a low score
        bad += [f"{o.name}: {o.reason}" for o in outcomes if o.result is not None and o.reason]
    if bad:
        several = f" ({len(bad)} of {len(outcomes)} runs failed)" if len(outcomes) > 1 else ""
        raise UserError("; ".join(bad) + several)
    return sum(o.result.score for o in outcomes if o.result) / len(outcomes)


def check_sweeper(cfg: DictConfig) -> None:
    """Refuse a sweeper that would choose by the test score."""
    if cfg.split != "tune" and compose.has_choosing_sweeper():
        raise UserError(
            "this sweeper chooses by the score that a run returns, and no choice may read a test score: give "
            "it split=tune"
        )


def check_all(jobs: Sequence[Job]) -> None:
    """Check the methods, callbacks, loggers and stores of all jobs before the first one runs.

    Raises:
        UserError: A setting of a job is wrong, a store cannot be used, or a logger would stop to ask for an
            API key.
    """
    for job in jobs:
        try:
            check(job)
            check_method(job.recipe, method_class(job.method.name))
        except UserError as error:
            raise UserError(f"{job.name}: {error}") from error
        check_callbacks(job)
        check_login(job)
    for results in {Results.of(job.paths) for job in jobs}:
        if results:
            results.check()


def asks_for_stacks(cfg: DictConfig) -> bool:
    """Return whether a command trains jobs together that can be; ranks of one run never do."""
    return cfg.engine.stack == "auto" and not ranks.started_elsewhere()


def run_all(jobs: Iterable[Job], wait: bool = True, stacks: bool = False) -> list[Outcome]:
    """Run jobs one after the other in this process; one that fails does not stop the others.

    Args:
        jobs: Composed jobs.
        wait: What to do about a run that another process is working on: True runs the other jobs first and
            then waits for that process to finish or end; False counts the run as failed.
        stacks: Whether jobs that can be are trained together, see `stack`.

    Returns:
        The outcomes of the jobs, in the same order.
    """
    return drive(LocalEngine(wait), [in_one_step(jobs)], stacks)[0]
