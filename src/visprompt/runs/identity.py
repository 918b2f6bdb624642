"""What decides a run's numbers, and the hash of it that names the run's folder."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_args

from visprompt.data.datamodule import TaskDataModule
from visprompt.models.backbones import Backbone
from visprompt.models.methods import hashed_file, option_kinds
from visprompt.runs.job import DEFAULT_MODULE, Job

# trainer settings that leave the numbers as they are; any other one is part of a run's identity
_NEUTRAL_TRAINER = {
    *("_target_", "accelerator", "devices", "num_nodes", "strategy", "plugins", "sync_batchnorm"),
    *(
        "accumulate_grad_batches",
        "check_val_every_n_epoch",
        "log_every_n_steps",
        "deterministic",
        "benchmark",
    ),
    *("enable_progress_bar", "profiler", "inference_mode"),
}

_NEUTRAL_CALLBACKS = {"progress_bar", "model_summary", "lr_monitor"}  # of configs/callbacks; they only show


def identity_of(job: Job, backbone: Backbone, datamodule: TaskDataModule) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, the same however the job writes it.

    Args:
        job: The job.
        backbone: Its backbone.
        datamodule: Its data.

    Returns:
        Values by what they are of, for JSON.
    """
    return {
        "task": datamodule.task,
        "data": {
            name: getattr(datamodule, name) for name in ("source", "fingerprint", "fraction", "preprocessing")
        },
        "backbone": backbone.record(),
        "method": _method_record(dict(job.method), backbone.module.num_blocks),
        "recipe": job.recipe.model_dump(),
        "split": job.split,
        "seed": job.seed,
        "precision": job.precision,
        "trainer": _trainer_record(job),
    }


def full_digest(identity: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()


def digest(identity: Mapping[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of an identity's sha256, which name the run's folder."""
    return full_digest(identity)[:12]


def _trainer_record(job: Job) -> dict[str, Any]:
    """Return what of the trainer may change the numbers.

    Settings that are not neutral, and classes of the user's.
    """
    module = dict(job.lightning_module)
    callbacks = (job.callbacks or {}).items()
    own = {
        name: callback
        for name, callback in callbacks
        if name not in _NEUTRAL_CALLBACKS and callback is not None
    }
    record = {name: value for name, value in dict(job.trainer).items() if name not in _NEUTRAL_TRAINER}
    record |= {"callbacks": own} if own else {}
    return record | ({"lightning_module": module} if module != DEFAULT_MODULE else {})


def _method_record(options: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """Return a method's name and options, a number where one is meant.

    Its content's hash in place of a file of weights.

    Where all blocks have prompts, the first ones are the last ones, and there is no block to carry them to.
    """
    for option, kind in option_kinds(options["name"]).items():
        if (
            type(options.get(option)) is int
            and float in (get_args(kind) or (kind,))
            and int not in get_args(kind)
        ):
            options[option] = float(options[option])
    if options.get("depth", 0) in (None, num_blocks) and num_blocks > 1:
        options |= {k: v for k, v in {"depth_from": "first", "carry_over": False}.items() if k in options}
    return hashed_file(options)
