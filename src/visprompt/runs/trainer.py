"""Build the trainer, callbacks and loggers of a job."""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger

from visprompt.runs import signals
from visprompt.runs.checkpoint import SafetensorsIO
from visprompt.runs.instantiate import PLUGINS, instantiate
from visprompt.runs.job import Job
from visprompt.runs.quiet import silence_libraries
from visprompt.runs.result import Result, read_result
from visprompt.runs.trainer_checks import check_trainer

log = logging.getLogger(__name__)


def build_trainer(job: Job, *callbacks: L.Callback) -> L.Trainer:
    """Build the trainer of a job, with the job's callbacks and the given ones."""
    silence_libraries()
    removed = (job.callbacks or {}).get("progress_bar", "") is None  # by callbacks.progress_bar=null
    bar = job.trainer.enable_progress_bar and not removed
    configured = [
        instantiate(f"callbacks.{name}", config, L.Callback) for name, config in _named(job.callbacks)
    ]
    configured = [callback for callback in configured if bar or not isinstance(callback, ProgressBar)]
    plugins = [
        SafetensorsIO(beside=True),
        *(instantiate("trainer.plugins", config, PLUGINS) for config in job.trainer.get("plugins") or []),
    ]
    settings = {name: value for name, value in job.trainer if name != "plugins"}
    if job.compile:  # Lightning validates without it and tests in it, which would be a graph each
        settings.setdefault("inference_mode", False)
    trainer = instantiate(
        "trainer",
        settings,
        L.Trainer,
        callbacks=[*configured, LastStep(job.recipe.max_steps or sys.maxsize), *callbacks],
        enable_progress_bar=bar,
        plugins=plugins,
        precision=job.precision,
        max_epochs=job.recipe.epochs,
        limit_val_batches=settings.get("limit_val_batches", 1.0),  # the data module turns validation off
        use_distributed_sampler=False,  # the data module's sampler divides the images over the ranks
        num_sanity_val_steps=0,  # they would draw random numbers before the first epoch
        logger=False,
        enable_model_summary=False,
        sync_batchnorm=settings["accelerator"] != "cpu" and torch.cuda.is_available(),
        default_root_dir=job.paths.log_dir,
    )
    # Lightning's SIGTERM handler broadcasts, which hangs if the ranks are not at the same step
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = signals.handle
    check_trainer(trainer, job)
    return trainer


def _named(group: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the names and configs of a group, without those that are None."""
    return [(str(name), config) for name, config in (group or {}).items() if config is not None]


class LastStep(L.Callback):
    """Ends training after a number of optimiser steps.

    Not Lightning's `max_steps`, with which a run that is resumed begins one epoch too early.
    """

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End the epoch and the training if this was the last step."""
        if trainer.global_step >= self._max_steps:
            trainer.should_stop = True


class TunedWandbLogger(WandbLogger):
    """Lightning's W&B logger, with dotted names for settings, and the tuned state uploaded as an artifact.

    Args:
        artifact: Whether the tuned state of a finished run is uploaded, if W&B is online.
        options: Arguments of Lightning's logger and of `wandb.init`.
    """

    def __init__(self, *, artifact: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous")  # deprecated in W&B, but Lightning always passes it
        self._uploads = artifact

    def log_hyperparams(self, params: Any) -> None:
        """Log nested settings under the names of the command line (`method.num_tokens`), as sweeps do."""
        fields = dict(_flat(params))
        if under_agent():  # W&B locks the fields that the sweep has set, and would warn about each
            fields = {name: value for name, value in fields.items() if name not in self.experiment.config}
        super().log_hyperparams(fields)

    def log_state(self, folder: Path) -> None:
        """Upload a finished run's tuned state, result and config, which together `src/eval.py` can read.

        Args:
            folder: The run's folder; without a tuned state in it nothing is uploaded.
        """
        files = [folder / name for name in ("tuned.safetensors", "result.json", "config.yaml")]
        if not self._uploads or self.experiment.offline or self.experiment.disabled or not files[0].is_file():
            return
        if read_result(folder) is None:
            log.warning(
                "%s is not uploaded to W&B: its result and its tuned state do not belong together", folder
            )
            return
        import wandb  # imported late: few runs need it, and it takes a second

        name = re.sub(r"[^a-zA-Z0-9_.-]", "_", "-".join(folder.parts[-3:]))
        artifact = wandb.Artifact(name[-128:], type="tuned-state")  # a name has at most 128 characters
        for file in files:
            artifact.add_file(str(file))
        try:
            self.experiment.log_artifact(artifact)
        except wandb.Error as error:  # not a reason to fail the run: its folder holds the state
            log.warning("the tuned state of %s could not be uploaded to W&B: %s", folder, error)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted name: {"a": {"b": [1]}} gives ("a.b", [1])."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def under_agent() -> bool:
    """Return whether a W&B agent started this command, so that it must log to the one run of that agent."""
    return "WANDB_RUN_ID" in os.environ


def without_wandb(job: Job) -> Job:
    """Return a copy of a job without its W&B loggers."""
    return job.vary(
        {"logger": {name: config for name, config in _named(job.logger) if not _is_wandb(config)}}
    )


def _is_wandb(logger: Mapping[str, Any]) -> bool:
    return str(logger["_target_"]).endswith("WandbLogger")


def build_loggers(job: Job, folder: Path, attempt: int, tuned: Mapping[str, Any]) -> list[Logger]:
    """Build the loggers of a job and log the job's settings and counts of tuned parameters.

    Args:
        job: The job.
        folder: The run's folder, logs/<task>/<method>/<hash>.
        attempt: Number of the attempt; every attempt is a separate W&B run.
        tuned: Counts of tuned parameters.
    """
    task = folder.parents[1].name
    run_id = {"id": folder.name + (f"-r{attempt}" if attempt else "")}
    loggers = []
    for name, config in _named(job.logger):
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if _is_wandb(config):
            extra |= {} if under_agent() else run_id  # an agent gives its id in the environment
            # job_type is not in the config, because the protocol changes the split of a composed job
            extra |= {
                "resume": "allow",
                "name": f"{task}/{job.method.name}/{folder.name}",
                "job_type": job.split,
            }
        logger = instantiate(f"logger.{name}", config, Logger, **extra)
        logger.log_hyperparams(_settings(job, task, tuned))
        loggers.append(logger)
    return loggers


def _settings(job: Job, task: str, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is logged of a job: its settings, its task and counts of tuned parameters.

    `num_tokens` and `depth`, against which papers plot accuracy, are also top-level fields; as numbers, even
    if `method.depth` is null, which means all blocks.
    """
    axes = {name: tuned[name] for name in ("num_tokens", "depth") if name in tuned}
    return job.content() | axes | {"task": task, "tuned": dict(tuned)}


def report_together(
    jobs: Sequence[Job], results: Sequence[Result | None], folders: Sequence[Path | None]
) -> None:
    """Log the results of all jobs of a command as one W&B run.

    Each figure is logged as `<task>/<figure>`, and the mean over the tasks as `<figure>`. If a job failed or
    diverged, the W&B run ends as failed, and no means are logged: a mean over the other tasks would be
    mistaken for one over all.

    Args:
        jobs: Composed jobs, one for each task.
        results: The jobs' results; None for a job that failed.
        folders: The jobs' folders; None for a job that failed. Their tuned states are uploaded.
    """
    finished = [result for result in results if result is not None and result.status == "finished"]
    metrics = {
        f"{result.task}/{name}": value for result in finished for name, value in result.metrics.items()
    }
    complete = len(finished) == len(jobs)
    metrics |= _means([result.metrics for result in finished]) if complete else {}
    fields = _common(jobs, results) | {"tasks": [str(job.task) for job in jobs]}
    for logger_name, config in _named(jobs[0].logger):
        if _is_wandb(config):
            options = {"save_dir": str(jobs[0].paths.log_dir), "resume": "allow", "job_type": jobs[0].split}
            options |= {"name": f"{len(jobs)} tasks/{jobs[0].method.name}"}
            logger = instantiate(f"logger.{logger_name}", config, Logger, **options)
            logger.log_hyperparams(fields)
            logger.log_metrics(metrics)
            for folder in filter(None, folders):
                if isinstance(logger, TunedWandbLogger):
                    logger.log_state(folder)
            close(logger, "success" if complete else "failed")


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of the figures that all tasks have, except for numbers of images."""
    shared = [
        name for name in metrics[0] if all(name in each for each in metrics) and not name.endswith("/count")
    ]
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in shared}


def _common(jobs: Sequence[Job], results: Sequence[Result | None]) -> dict[str, Any]:
    """Return the settings that all jobs share, by dotted name; recipes usually differ between tasks."""
    first, *others = (
        dict(_flat(_settings(job, str(job.task), result.tuned if result else {})))
        for job, result in zip(jobs, results, strict=True)
    )
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def close(logger: Logger, status: str, folder: Path | None = None) -> None:
    """Close a logger, so that the next run of this process gets a new one.

    Args:
        logger: A logger from `build_loggers`.
        status: "success" or "failed".
        folder: The run's folder; if the run was a success, its tuned state is uploaded to W&B.
    """
    if isinstance(logger, TunedWandbLogger) and folder is not None and status == "success":
        logger.log_state(folder)
    logger.finalize(status)
    if isinstance(logger, WandbLogger):
        if signals.is_terminated():
            logger.experiment.mark_preempting()  # so that a sweep gives the run to another agent
        logger.experiment.finish(exit_code=int(status == "failed"))
