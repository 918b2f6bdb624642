"""Trainer, callbacks and loggers from a composed job."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger

from visprompt.runs import quiet, signals  # noqa: F401  # quiet works by being imported
from visprompt.runs.checkpoint import SafetensorsIO
from visprompt.runs.instantiate import PLUGINS, instantiate
from visprompt.runs.job import Job
from visprompt.runs.result import Result, read_result
from visprompt.runs.trainer_checks import check_trainer

log = logging.getLogger(__name__)


def build_trainer(job: Job, *callbacks: L.Callback) -> L.Trainer:
    """Return the trainer of a job, with the job's callbacks and those given."""
    without = (job.callbacks or {}).get("progress_bar", "") is None
    bar = job.trainer.enable_progress_bar and not without
    configured = [instantiate(f"callbacks.{name}", one, L.Callback) for name, one in _named(job.callbacks)]
    configured = [callback for callback in configured if bar or not isinstance(callback, ProgressBar)]
    given = job.trainer.get("plugins") or []
    plugins = [SafetensorsIO(), *(instantiate("trainer.plugins", plugin, PLUGINS) for plugin in given)]
    settings = {name: value for name, value in job.trainer if name != "plugins"}
    trainer = instantiate(
        "trainer",
        settings,
        L.Trainer,
        callbacks=[*configured, *callbacks],
        enable_progress_bar=bar,
        plugins=plugins,
        precision=job.precision,
        max_epochs=job.recipe.epochs,
        limit_val_batches=settings.get("limit_val_batches", 1.0) if job.split == "tune" else 0,
        use_distributed_sampler=False,  # the data module deals the rows itself, none twice
        num_sanity_val_steps=0,  # would draw from generators before the first epoch
        logger=False,
        enable_model_summary=False,
        sync_batchnorm=settings["accelerator"] != "cpu" and torch.cuda.is_available(),
        default_root_dir=job.paths.log_dir,
    )
    # Lightning's own broadcasts from within the handler, which hangs where the ranks are not at the same step
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = signals.handle
    check_trainer(trainer, job)
    return trainer


def _named(group: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the configs of a group by name, without those that were removed by null."""
    return [(str(name), config) for name, config in (group or {}).items() if config is not None]


class TunedWandbLogger(WandbLogger):
    """W&B's logger, with a config of one level and the tuned state as an artifact.

    Args:
        artifact: Whether the tuned state of a finished run is uploaded, where W&B is online.
        options: Those of Lightning's logger and of `wandb.init`.
    """

    def __init__(self, *, artifact: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous")  # W&B warns of it, and Lightning gives it always
        self._uploads = artifact

    def log_hyperparams(self, params: Any) -> None:
        """Log settings as fields named as on the command line, which is as a sweep names them.

        Method.num_tokens.
        """
        fields = dict(_flat(params))
        if under_agent():  # what the sweep set is locked: W&B would warn of each
            fields = {name: value for name, value in fields.items() if name not in self.experiment.config}
        super().log_hyperparams(fields)

    def log_state(self, folder: Path) -> None:
        """Upload a finished run's tuned state, with the result and config that `src/eval.py` reads beside it.

        Args:
            folder: The run's folder; a run without a tuned state has nothing to upload.
        """
        files = [folder / name for name in ("tuned.safetensors", "result.json", "config.yaml")]
        if not self._uploads or self.experiment.offline or self.experiment.disabled or not files[0].is_file():
            return
        if read_result(folder) is None:
            log.warning(
                "%s is not uploaded to W&B: its result and its tuned state do not belong together", folder
            )
            return
        import wandb  # late: few runs need it, and it takes a second

        name = re.sub(r"[^a-zA-Z0-9_.-]", "_", "-".join(folder.parts[-3:]))
        artifact = wandb.Artifact(name[-128:], type="tuned-state")  # W&B takes no longer name
        for file in files:
            artifact.add_file(str(file))
        try:
            self.experiment.log_artifact(artifact)
        except wandb.Error as error:  # the run is good all the same, and its folder holds the state
            log.warning("W&B took no tuned state of %s: %s", folder, error)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return values of nested settings by dotted name; a list is a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def under_agent() -> bool:
    """Return whether a W&B agent started this command.

    All that it runs then belongs to the one W&B run of the agent's id.
    """
    return "WANDB_RUN_ID" in os.environ


def without_wandb(job: Job) -> Job:
    """Return a copy of a job that logs to all its loggers but W&B."""
    kept = {name: one for name, one in _named(job.logger) if not _is_wandb(one)}
    return job.vary({"logger": kept})


def _is_wandb(logger: Mapping[str, Any]) -> bool:
    return str(logger["_target_"]).endswith("WandbLogger")


def build_loggers(job: Job, folder: Path, attempt: int, tuned: Mapping[str, Any]) -> list[Logger]:
    """Return the config's loggers, with the run's config and tuned share as searchable fields.

    Args:
        job: The job.
        folder: The run's folder, logs/<task>/<method>/<hash>.
        attempt: Number of the attempt; every one is a W&B run of its own.
        tuned: Counts of tuned parameters.
    """
    task = folder.parents[1].name
    run_id = {"id": folder.name + (f"-r{attempt}" if attempt else "")}
    loggers = []
    for name, config in _named(job.logger):
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if _is_wandb(config):
            extra |= {} if under_agent() else run_id  # the agent's id stands
            # the protocol changes the split of a composed job
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
    """Return what a logger gets of a job.

    Its config, its task, what is tuned, and what papers plot accuracy against.
    """
    settings = job.content()
    # as numbers, where the config says null for all blocks
    axes = {name: tuned[name] for name in ("num_tokens", "depth") if name in tuned}
    return settings | axes | {"task": task, "tuned": dict(tuned)}


def report_together(
    jobs: Sequence[Job], results: Sequence[Result | None], folders: Sequence[Path | None]
) -> None:
    """Log what the jobs of one command came to as one W&B run.

    Every figure as <task>/<figure>, and their means.

    Where a job failed or diverged, the run ends as failed and has no means: those of the others would pass
    for them.

    Args:
        jobs: Composed jobs, one for each task.
        results: Their results; None where a job failed.
        folders: Where these lie, with the tuned states that go to W&B.
    """
    finished = [result for result in results if result is not None and result.status == "finished"]
    metrics = {
        f"{result.task}/{name}": value for result in finished for name, value in result.metrics.items()
    }
    whole = len(finished) == len(jobs)
    metrics |= _means([result.metrics for result in finished]) if whole else {}
    fields = _common(jobs, results) | {"tasks": [str(job.task) for job in jobs]}
    for logger_name, config in _named(jobs[0].logger):
        if _is_wandb(config):
            place = {"save_dir": str(jobs[0].paths.log_dir), "resume": "allow", "job_type": jobs[0].split}
            place |= {"name": f"{len(jobs)} tasks/{jobs[0].method.name}"}
            logger = instantiate(f"logger.{logger_name}", config, Logger, **place)
            logger.log_hyperparams(fields)
            logger.log_metrics(metrics)
            for folder in filter(None, folders):
                if isinstance(logger, TunedWandbLogger):
                    logger.log_state(folder)
            close(logger, "success" if whole else "failed")


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means of the figures that all tasks have; a number of images has none."""
    names = [
        name for name in metrics[0] if all(name in one for one in metrics) and not name.endswith("/count")
    ]
    return {name: sum(one[name] for one in metrics) / len(metrics) for name in names}


def _common(jobs: Sequence[Job], results: Sequence[Result | None]) -> dict[str, Any]:
    """Return the fields in which all jobs agree.

    Where each task has a recipe of its own, its values are none.
    """
    known = [
        dict(_flat(_settings(job, str(job.task), result.tuned if result else {})))
        for job, result in zip(jobs, results, strict=True)
    ]
    return {name: value for name, value in known[0].items() if all(one.get(name) == value for one in known)}


def close(logger: Logger, status: str, folder: Path | None = None) -> None:
    """End a logger, so that the next run of this process gets one of its own.

    Args:
        logger: One of `build_loggers`.
        status: "success" or "failed".
        folder: The folder of a run whose tuned state goes to W&B with it, if it was a success.
    """
    if isinstance(logger, TunedWandbLogger) and folder is not None and status == "success":
        logger.log_state(folder)
    logger.finalize(status)
    if isinstance(logger, WandbLogger):
        if signals.is_terminated():
            logger.experiment.mark_preempting()  # a sweep gives the run to another agent
        logger.experiment.finish(exit_code=int(status == "failed"))
