"""Check before training that a run gets the processes, the precision and the loggers that it asks for."""

import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import lightning.pytorch as L

from visprompt.data.datamodule import TaskDataModule
from visprompt.errors import UserError, in_one_line, unknown
from visprompt.models.kind import KINDS
from visprompt.runs import ranks
from visprompt.runs.job import DEFAULT_MODULE, Job

log = logging.getLogger(__name__)


def check_trainer(trainer: L.Trainer, job: Job) -> None:
    """Check that a trainer has the processes and the precision of its job.

    Args:
        trainer: The trainer.
        job: The job that it was built for.

    Raises:
        UserError: The trainer has another number of processes, or another precision, or cannot clip the
            gradients of a fused optimiser.
    """
    expected, actual = trainer.num_devices * trainer.num_nodes, trainer.world_size
    if ranks.started_elsewhere():
        actual = max(actual, int(os.environ.get("WORLD_SIZE", actual)))
    if actual != expected:
        raise UserError(
            f"trainer.devices={job.trainer.devices} and trainer.num_nodes={trainer.num_nodes} ask for "
            f"{expected} process(es), and {ranks.starter()} started {actual}: start {expected} "
            f"({ranks.remedy(trainer.num_devices, trainer.num_nodes)}), or change trainer.devices"
        )
    precision, device = job.precision, trainer.strategy.root_device.type
    if trainer.precision != precision or (device == "mps" and precision == "64-true"):
        instead = trainer.precision if trainer.precision != precision else "32-true"
        raise UserError(
            f"precision={precision} is not available on device {device}: give precision={instead}"
        )
    if job.recipe.fused and precision.endswith("mixed") and job.trainer.get("gradient_clip_val"):
        raise UserError(
            f"recipe.fused=true cannot clip gradients under precision={precision}: leave out recipe.fused or "
            "trainer.gradient_clip_val"
        )


def check_login(job: Job) -> None:
    """Check that a W&B logger that is online finds an API key, so that it does not stop to ask for one.

    Raises:
        UserError: There is no key, or W&B refuses it.
    """
    for logger in (job.logger or {}).values():
        if logger is None or not str(logger["_target_"]).endswith("WandbLogger"):
            continue
        if logger.get("offline") or logger.get("mode") in ("offline", "disabled"):
            continue
        import wandb  # imported late: few runs need it, and it takes a second

        settings: Any = wandb.setup().settings
        try:
            if settings.mode in ("offline", "disabled", "dryrun") or wandb.login(prompt=False, verify=False):
                continue
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UserError(
                f"W&B's key cannot be used ({in_one_line(error)}): run `wandb login` again"
            ) from error
        raise UserError(
            "logger=wandb finds no W&B API key on this machine: run `wandb login` (or set WANDB_API_KEY), or "
            "log without a network by giving logger.wandb.offline=true"
        )


def check_callbacks(job: Job) -> None:
    """Refuse a callback of Lightning that does not fit the job, before the data are opened.

    Raises:
        UserError: Early stopping watches a test figure, or a validation figure in a run that trains on the
            validation images, or a `LearningRateMonitor` has no logger.
    """
    for name, config in (job.callbacks or {}).items():
        target = "" if config is None else str(config.get("_target_")).rpartition(".")[2]
        watched = _watched(config)
        # VTAB-1k and the demo have no `data.final`: their final runs train on all 1,000 images
        if job.split == "final" and job.data.get("final") != "train" and watched.startswith("val/"):
            instead = "data.final=train" if "final" in job.data else "split=tune"
            raise UserError(
                f"callbacks.{name} watches {watched}, but this run trains on the validation images: "
                f"give {instead}"
            )
        if watched.startswith(("test/", "leak/")):
            raise UserError(
                f"callbacks.{name} watches {watched}, but test images must not choose when a run ends: watch "
                "a figure of val/ or train/"
            )
        if target == "LearningRateMonitor" and not job.logger:
            raise UserError(
                f"callbacks.{name} needs a logger: give logger=tensorboard or logger=wandb; metrics.csv has "
                "the learning rate of each epoch without it"
            )


def check_watched(job: Job, datamodule: TaskDataModule) -> None:
    """Refuse early stopping by a figure that is not logged; a LightningModule of one's own may log others.

    Raises:
        UserError: There are no validation images, or their kind of labels has no such figure.
    """
    kind = KINDS[datamodule.kind]
    figures = [f"val/{figure}" for figure in (*kind.shares, "loss")] + ["train/loss", f"train/{kind.hit}"]
    is_own = dict(job.lightning_module) != DEFAULT_MODULE
    for name, config in (job.callbacks or {}).items():
        watched = _watched(config)
        if watched.startswith("val/") and not datamodule.validates:
            raise UserError(
                f"callbacks.{name} watches {watched}, but {datamodule.task} has no val images: add them, or "
                "leave the callback out"
            )
        if watched and watched not in figures and not is_own:
            raise unknown(f"callbacks.{name}.monitor", watched, figures)


def _watched(config: Mapping[str, Any] | None) -> str:
    """Return the figure that a callback's config makes early stopping watch, or ""."""
    if config is None or str(config.get("_target_")).rpartition(".")[2] != "EarlyStopping":
        return ""
    return str(config.get("monitor", ""))


@lru_cache
def warn_random(method: str) -> None:
    """Warn, once in a process, that a method leaves the backbone's random weights untrained."""
    log.warning(
        "backbone.pretrained=false: the backbone's weights are random, and method=%s does not train them; "
        "method=full does",
        method,
    )
