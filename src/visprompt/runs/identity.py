"""Collect everything that decides a run's numbers, and hash it for the name of the run's folder."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_args

from visprompt.data.datamodule import TaskDataModule
from visprompt.data.segmentation_datamodule import SegmentationDataModule
from visprompt.models.backbones import Backbone
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.methods import hashed_file, option_kinds
from visprompt.runs import matmul
from visprompt.runs.job import DEFAULT_MODULE, Job

# trainer settings that do not change the numbers; every other setting is part of a run's identity
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

_NEUTRAL_CALLBACKS = {"progress_bar", "model_summary", "lr_monitor"}  # in configs/callbacks; they only show


def identity_of(job: Job, backbone: Backbone, datamodule: TaskDataModule) -> dict[str, Any]:
    """Return everything that decides the numbers of a run.

    Two spellings of the same run (`lr=1` and `lr=1.0`) give the same identity.

    Args:
        job: The job.
        backbone: The job's backbone.
        datamodule: The job's data.

    Returns:
        Values for JSON: {"task": "dtd", "data": {...}, "backbone": {...}, "method": {...}, ...}.
    """
    data = {
        name: getattr(datamodule, name) for name in ("source", "fingerprint", "fraction", "preprocessing")
    }
    return {
        "task": datamodule.task,
        "data": data | _kind_record(datamodule) | _augment_record(job, datamodule),
        "backbone": backbone.record(),
        "method": _method_record(dict(job.method), backbone.module.num_blocks),
        "recipe": job.recipe.record(),
        "split": job.split,
        "seed": job.seed,
        "precision": job.precision,
        "trainer": _trainer_record(job),
    }


def _kind_record(datamodule: TaskDataModule) -> dict[str, Any]:
    """Return the kind of the labels, if it is not the usual one, which records of older versions lack."""
    return {} if datamodule.kind == SINGLE_LABEL.name else {"kind": datamodule.kind}


def _augment_record(job: Job, datamodule: TaskDataModule) -> dict[str, Any]:
    """Return the augmentation, if there is one; a module of the user by its class and arguments.

    For images with masks these are the changes that the preprocessing does not record.
    """
    if isinstance(datamodule, SegmentationDataModule):
        return {"scale": datamodule.scale and list(datamodule.scale), "jitter": datamodule.jitter}
    augment = job.data.get("augment", "none")
    return {} if augment == "none" else {"augment": augment}


def full_digest(identity: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()


def digest(identity: Mapping[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of an identity's sha256, which name the run's folder."""
    return full_digest(identity)[:12]


def _trainer_record(job: Job) -> dict[str, Any]:
    """Return the trainer's settings, callbacks and LightningModule, as far as they may change the numbers."""
    module = dict(job.lightning_module)
    callbacks = {
        name: callback
        for name, callback in (job.callbacks or {}).items()
        if name not in _NEUTRAL_CALLBACKS and callback is not None
    }
    record = {name: value for name, value in dict(job.trainer).items() if name not in _NEUTRAL_TRAINER}
    record |= {"callbacks": callbacks} if callbacks else {}
    if job.matmul_precision != "highest" and matmul.may_act_on(job):
        record["matmul_precision"] = job.matmul_precision
    if callbacks and job.trainer.check_val_every_n_epoch != 1:  # early stopping counts validations
        record["check_val_every_n_epoch"] = job.trainer.check_val_every_n_epoch
    return record | ({"lightning_module": module} if module != DEFAULT_MODULE else {})


def _method_record(options: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """Return a method's name and options in one spelling, with a hash in place of a file of weights.

    A whole number for an option of type float becomes a float. If all blocks have prompts, `depth_from` and
    `carry_over` have no effect and are recorded with fixed values.
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
