"""Trainer, callbacks and loggers from a composed job."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError
from visprompt.lit.checkpoint import SafetensorsIO


def build(what: str, config: Any, **given: Any) -> Any:
    """Builds what a config names; a wrong word or a refusal becomes one sentence."""
    try:
        return instantiate(config, _convert_="all", **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{what} cannot be built: {reason}; correct {what}.<key>=...") from error


def build_trainer(cfg: DictConfig, *callbacks: L.Callback) -> L.Trainer:
    """The trainer of a job, with the config's callbacks and those given."""
    configured = [build("callbacks", callback) for callback in (cfg.callbacks or {}).values()]
    plugins = [SafetensorsIO(), *(build("trainer", plugin) for plugin in cfg.trainer.get("plugins") or [])]
    settings = {k: v for k, v in cfg.trainer.items() if k != "plugins"}
    trainer: L.Trainer = build(
        "trainer",
        settings,
        callbacks=[*configured, *callbacks],
        plugins=plugins,
        precision=cfg.precision,
        max_epochs=cfg.recipe.epochs,
        limit_val_batches=settings.get("limit_val_batches", 1.0) if cfg.split == "tune" else 0,
        use_distributed_sampler=False,  # the data module deals the rows itself, none twice
        num_sanity_val_steps=0,  # would draw from generators before the first epoch
        logger=False,
        enable_model_summary=False,
        sync_batchnorm=settings["accelerator"] != "cpu" and torch.cuda.is_available(),
        default_root_dir=cfg.paths.log_dir,
    )
    return trainer


def build_loggers(cfg: DictConfig, folder: Path, attempt: int, tuned: Mapping[str, Any]) -> list[Logger]:
    """The config's loggers, with the run's config and tuned share as searchable fields.

    Args:
        cfg: The composed job.
        folder: The run's folder, logs/<task>/<method>/<hash>.
        attempt: Number of the attempt; every one is a W&B run of its own.
        tuned: Counts of tuned parameters.
    """
    task = folder.parents[1].name
    loggers = []
    for config in (cfg.logger or {}).values():
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if config._target_.endswith("WandbLogger"):
            run_id = folder.name + (f"-r{attempt}" if attempt else "")
            # under a sweep's agent the agent's id stands
            extra |= {"resume": "allow"} if "WANDB_RUN_ID" in os.environ else {"id": run_id, "resume": "allow"}
            # the protocol changes the split of a composed job
            extra |= {"name": f"{task}/{cfg.method.name}/{folder.name}", "job_type": cfg.split}
        logger: Logger = build("logger", config, **extra)
        settings: Any = OmegaConf.to_container(cfg)
        logger.log_hyperparams(settings | {"task": task, "tuned": dict(tuned)})
        loggers.append(logger)
    return loggers


def close(logger: Logger, status: str) -> None:
    """Ends a logger as "success" or "failed", so that the next run of this process gets one of its own."""
    logger.finalize(status)
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=int(status == "failed"))
