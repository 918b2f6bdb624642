"""Check before anything trains that a run gets what its command asked for.

Processes, precision, a login to W&B.
"""

import logging
import os
from functools import lru_cache
from typing import Any

import lightning.pytorch as L

from visprompt.errors import UserError, in_one_line
from visprompt.runs import engine
from visprompt.runs.job import Job

log = logging.getLogger(__name__)


def check_trainer(trainer: L.Trainer, job: Job) -> None:
    """Compare a trainer with the settings it was built from.

    Args:
        trainer: The trainer.
        job: The job it was built for.

    Raises:
        UserError: It has fewer or more processes, or another precision, than was asked for.
    """
    asked, got = trainer.num_devices * trainer.num_nodes, trainer.world_size
    got = max(got, int(os.environ.get("WORLD_SIZE", got))) if engine.started_elsewhere() else got
    if got != asked:
        raise UserError(
            f"trainer.devices={job.trainer.devices} and trainer.num_nodes={trainer.num_nodes} ask for "
            f"{asked} process(es), and {engine.starter()} started {got}: start as many as are asked for "
            f"({engine.remedy(trainer.num_devices, trainer.num_nodes)}), or change trainer.devices"
        )
    wanted, device = job.precision, trainer.strategy.root_device.type
    if trainer.precision != wanted or (device == "mps" and wanted == "64-true"):
        instead = trainer.precision if trainer.precision != wanted else "32-true"
        raise UserError(f"precision={wanted} cannot be had on device {device}: give precision={instead}")


def check_login(job: Job) -> None:
    """Check that W&B's logger, where a job has one that is online, finds a key without asking for it.

    Raises:
        UserError: There is no key.
    """
    for logger in (job.logger or {}).values():
        if logger is None or not str(logger["_target_"]).endswith("WandbLogger"):
            continue
        if logger.get("offline") or logger.get("mode") in ("offline", "disabled"):
            continue
        import wandb  # late: few runs need it, and it takes a second

        settings: Any = wandb.setup().settings
        try:
            if settings.mode in ("offline", "disabled", "dryrun") or wandb.login(prompt=False, verify=False):
                continue
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UserError(
                f"W&B's key cannot be used ({in_one_line(error)}): run `wandb login` again"
            ) from error
        raise UserError(
            "logger=wandb finds no key of W&B on this machine: run `wandb login` (or set WANDB_API_KEY), or "
            "log without a network by logger.wandb.offline=true"
        )


def check_callbacks(job: Job) -> None:
    """Refuse a callback of Lightning's that would find nothing to read in a run.

    Raises:
        UserError: Early stopping watches validation images where there are none, or a monitor has no logger.
    """
    for name, config in (job.callbacks or {}).items():
        target = "" if config is None else str(config.get("_target_")).rpartition(".")[2]
        monitor = str(config.get("monitor")) if target == "EarlyStopping" else ""
        if monitor.startswith("val/") and job.split != "tune":
            raise UserError(
                f"callbacks.{name} watches {monitor}, and split={job.split} scores no validation images: "
                "give split=tune"
            )
        if target == "LearningRateMonitor" and not job.logger:
            raise UserError(
                f"callbacks.{name} needs a logger: give logger=tensorboard or logger=wandb; metrics.csv has "
                "the learning rate of each epoch without it"
            )


@lru_cache
def warn_random(method: str) -> None:
    """Warn once in a process of a backbone that never learned anything."""
    log.warning(
        "backbone.pretrained=false: the backbone's weights are random, and method=%s leaves them so; "
        "method=full trains them",
        method,
    )
