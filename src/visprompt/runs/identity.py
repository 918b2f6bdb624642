"""What decides a run's numbers, and the hash of it that names the run's folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from visprompt.data.datamodule import TaskDataModule
from visprompt.models.backbones import Backbone
from visprompt.models.methods import option_kinds
from visprompt.models.optim import Recipe
from visprompt.runs.settings import PRECISIONS

# trainer settings that leave the numbers as they are; any other one is part of a run's identity
_NEUTRAL_TRAINER = {
    *("_target_", "accelerator", "devices", "num_nodes", "strategy", "plugins", "sync_batchnorm"),
    *("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps", "deterministic", "benchmark"),
    *("enable_progress_bar", "profiler", "inference_mode"),
}


def identity_of(cfg: DictConfig, recipe: Recipe, backbone: Backbone, datamodule: TaskDataModule) -> dict[str, Any]:
    """Everything that decides the numbers of a run, the same however the job writes it.

    Args:
        cfg: A composed job.
        recipe: Its recipe.
        backbone: Its backbone.
        datamodule: Its data.

    Returns:
        Values by what they are of, for JSON.
    """
    return {
        "task": datamodule.task,
        "data": {name: getattr(datamodule, name) for name in ("source", "fingerprint", "fraction", "preprocessing")},
        "backbone": backbone.record(),
        "method": _method_record(cfg.method, backbone.module.num_blocks),
        "recipe": asdict(recipe),
        "split": cfg.split,
        "seed": cfg.seed,
        "precision": PRECISIONS.get(str(cfg.precision), str(cfg.precision)),
        "trainer": _trainer_record(cfg),
    }


def full_digest(identity: Mapping[str, Any]) -> str:
    """The sha256 (hex) of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()


def digest(identity: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of an identity's sha256, which name the run's folder."""
    return full_digest(identity)[:12]


def _trainer_record(cfg: DictConfig) -> dict[str, Any]:
    """What of the trainer may change the numbers: its settings but for neutral ones, and callbacks of the user's."""
    settings: Any = OmegaConf.to_container(cfg.trainer)
    callbacks: Any = OmegaConf.to_container(cfg.callbacks or OmegaConf.create())
    own = {name: callback for name, callback in callbacks.items() if name != "progress_bar" and callback is not None}
    return {k: v for k, v in settings.items() if k not in _NEUTRAL_TRAINER} | ({"callbacks": own} if own else {})


def _method_record(method: DictConfig, num_blocks: int) -> dict[str, Any]:
    """A method's name and options, a number where one is meant; its content's hash in place of a file of weights.

    Where all blocks have prompts, the first ones are the last ones, and there is no block to carry them to.
    """
    given: Any = OmegaConf.to_container(method)
    options: dict[str, Any] = given
    for option, kind in option_kinds(method.name).items():
        if type(options.get(option)) is int and float in (get_args(kind) or (kind,)) and int not in get_args(kind):
            options[option] = float(options[option])
    if options.get("depth", 0) in (None, num_blocks) and num_blocks > 1:
        options |= {k: v for k, v in {"depth_from": "first", "carry_over": False}.items() if k in options}
    if (file := options.get("weights")) and Path(file).expanduser().is_file():
        options["weights"] = f"sha256:{hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()}"
    return options
