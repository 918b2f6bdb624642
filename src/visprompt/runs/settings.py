"""Check the type and range of every setting when a command line is composed, before anything is built.

Recipes and methods check their options themselves (`models.recipe.Recipe`, `methods.check_options`), because
they are also used without a config. A word from a fixed list (an interpolation, a data source) is checked in
the module that has the list.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from visprompt.errors import (
    MAPPING,
    NULL,
    PATH,
    SWITCH,
    TEXT,
    WORDS,
    Allowed,
    UserError,
    is_finite,
    list_of,
    number,
    one_of,
    shown,
    unknown,
    whole,
)

PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names of precisions, and the full names."""

_MOST = 2**32 - 1
_SIDE = whole(1, 2**14)  # an image's width or height in pixels
_PATHS = PATH | list_of(PATH, "a list of paths")
_TARGET = Allowed("a mapping with _target_", lambda value: isinstance(value, dict) and "_target_" in value)
_PRECISE = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
_MATMUL = one_of("highest", "high", "medium")
_PRECISION = Allowed(f"one of {', '.join(_PRECISE)}", one_of(*_PRECISE, *PRECISIONS, 64, 32, 16).fits)

_FACTORS = Allowed(
    "two factors such as [0.5,2.0], the smaller one first",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(map(is_finite, value))
        and 0 < value[0] <= value[1] <= 100
    ),
)

_ALLOWED: dict[str, Allowed] = {
    "seed": whole(0, _MOST),
    "seeds": list_of(whole(0, _MOST), f"a list of whole numbers from 0 to {_MOST}")
    | Allowed("the word released", lambda value: value == "released"),
    "precision": _PRECISION,
    "matmul_precision": _MATMUL,
    **dict.fromkeys(
        (
            "average",
            "compile",
            "dry_run",
            "rerun",
            "overwrite",
            "diagnostics.best_on_test",
            "verify",
            "download",
            "multi_scale",
        ),
        SWITCH,
    ),
    **dict.fromkeys(("include_preprocessing", "private"), SWITCH),
    "to": TEXT,
    **dict.fromkeys(("quantize", "license", "push"), TEXT | NULL),
    "resume_every_n_epochs": whole(1, _MOST) | NULL,
    "split": TEXT,
    "tags": WORDS,
    "engine.name": TEXT,
    # YAML reads the word off as false
    "engine.stack": Allowed("auto or off", one_of("auto", "off", False).fits),
    "methods": WORDS | Allowed("the word all", lambda value: value == "all") | NULL,
    "tasks": TEXT | WORDS | NULL,
    **dict.fromkeys(
        ("preprocessing.interpolation", "preprocessing.resampling", "preprocessing.normalisation"), TEXT
    ),
    **dict.fromkeys(("paths.root_dir", "paths.data_dir", "paths.log_dir", "output", "images"), PATH),
    "table": PATH | NULL,
    "paths.results": TEXT | NULL,
    "plan": one_of("json") | NULL,
    "points": list_of(whole(0, _MOST), f"a list of whole numbers from 0 to {_MOST}") | NULL,
    **dict.fromkeys(("engine.runs_per_gpu", "engine.cpus_per_run"), whole(1, 2**16)),
    "engine.max_concurrent": whole(1, 2**16) | NULL,
    "engine.retries": whole(0, 2**16),
    "engine.address": TEXT | NULL,
    "engine.gpus_per_run": number(
        "0, a share of a GPU such as 0.25, or a whole number of GPUs",
        lambda value: 0 <= value <= 1 or (value > 1 and value == int(value)),
    )
    | NULL,
    "states": _PATHS,
    **dict.fromkeys(("host", "dtype"), TEXT),
    "port": whole(0, 65535),
    "budget": whole(1, 2**50) | NULL,
    "watch_seconds": number("a number above 0", lambda value: value > 0),
    **{
        f"limits.{name}": whole(1, 2**40)
        for name in ("image_bytes", "image_pixels", "images", "batch", "queue")
    },
    **{f"limits.{name}": whole(1, 2**50) for name in ("request_bytes", "held_bytes")},
    **{
        f"limits.{name}": number("a number above 0", lambda value: value > 0)
        for name in ("seconds", "drain_seconds")
    },
    "limits.batch_wait_ms": number("a number of 0 or more", lambda value: value >= 0),
    **dict.fromkeys(("data_dir", "root", "weights", "recipe.table"), PATH | NULL),
    **dict.fromkeys(("run", "runs", "state"), _PATHS),
    "inspect": _PATHS | NULL,
    "top": whole(1, _MOST) | NULL,
    "store_dir": PATH,
    **dict.fromkeys(("source", "revision", "device"), TEXT),
    **dict.fromkeys(("against", "paper"), TEXT | NULL),
    "formats": TEXT | WORDS,
    "batch_size": whole(1, _MOST),
    "image_size": _SIDE,
    "lightning_module": _TARGET,
    "backbone.name": TEXT,
    "backbone.weights": PATH | NULL,
    **dict.fromkeys(("backbone.pretrained", "backbone.exact"), SWITCH),
    "backbone.image_size": _SIDE | NULL,
    "backbone.global_pool": TEXT | NULL,
    "backbone.final_norm": TEXT,
    "backbone.kwargs": MAPPING,
    "data.num_workers": whole(0, 1024),
    **{f"data.{name}": SWITCH for name in ("pin_memory", "download", "crop", "skip_bad", "jitter")},
    **{
        f"data.{name}": TEXT
        for name in ("interpolation", "resampling", "normalisation", "source", "final", "revision")
    },
    **{f"data.{name}": PATH for name in ("data_dir", "store_dir")},
    **{f"data.{name}": PATH | NULL for name in ("root", "csv")},
    **{f"data.{name}": TEXT | NULL for name in ("name", "subset", "image", "label")},
    **{f"data.{name}": TEXT for name in ("dataset", "kind")},
    "data.augment": TEXT | _TARGET,
    "data.csv_columns": MAPPING | NULL,
    "data.white_level": whole(1, _MOST) | NULL,
    **dict.fromkeys(("data.max_pixels", "max_pixels"), whole(1, 2**40)),
    "data.test": TEXT,
    **{f"logger.wandb.{name}": TEXT | NULL for name in ("project", "group", "name", "entity")},
    "logger.wandb.tags": WORDS | NULL,
    **dict.fromkeys(
        ("logger.wandb.offline", "logger.wandb.artifact", "callbacks.progress_bar.leave"), SWITCH
    ),
    **{f"logger.tensorboard.{name}": TEXT | NULL for name in ("name", "version")},
    "data.split_names": MAPPING | Allowed("none", lambda value: value == "none") | NULL,
    "data.fraction": number("a number above 0, 1 at most", lambda value: 0 < value <= 1),
    "data.flip": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "data.short_side": _SIDE | NULL,
    "data.scale": _FACTORS | NULL,
    "data.classes": PATH | WORDS | NULL,
    "data.ignore": whole(0, 255) | NULL,
}
# Three programs differ, and are recognised by one of their keys: eval.py (`weights`) may leave out the
# precisions, which are then the run's; prepare.py (`verify`) needs a data_dir; predict.py (`max_pixels`) has
# a default for its output.
_IN_ONE_PROGRAM = (
    ("weights", "precision", _PRECISION | NULL),
    ("weights", "matmul_precision", _MATMUL | NULL),
    ("verify", "data_dir", PATH),
    ("max_pixels", "output", PATH | NULL),
)
_GROUPS = (
    "data",
    "backbone",
    "method",
    "recipe",
    "trainer",
    "paths",
    "preprocessing",
    "diagnostics",
    "engine",
    "limits",
    "engine",
)

# settings of Lightning's trainer that this project sets itself, with what to give instead
_SET_BY_PROJECT = {
    "max_epochs": "give recipe.epochs=...",
    "max_steps": "give recipe.max_steps=...",
    "precision": "give precision=...",
    "logger": "choose logger=csv, tensorboard or wandb",
    "callbacks": "give +callbacks.NAME={_target_: ...}",
    "default_root_dir": "give paths.log_dir=...",
    "enable_checkpointing": "give resume_every_n_epochs=...",
    "enable_model_summary": "the table after each run has the number of parameters",
    "num_sanity_val_steps": "it would draw random numbers before the first epoch",
    "use_distributed_sampler": "the data module divides the images over the devices",
    "sync_batchnorm": "it is on if GPUs train batch norm",
    "limit_predict_batches": "src/predict.py reads all images",
    "enable_autolog_hparams": "choose logger=csv, tensorboard or wandb",
    "model_registry": "only logger=wandb uploads anything",
    "barebones": "take debug=profiler to measure time",
}
_BATCHES = whole(1, _MOST) | number(
    "a share above 0, 1.0 at most", lambda value: type(value) is float and 0 < value <= 1
)
_UNITS = frozenset({"weeks", "days", "hours", "minutes", "seconds"})
_DURATION = Allowed(
    "days, hours, minutes and seconds as 00:02:00:00, or a mapping such as {hours: 2}",
    lambda value: (
        re.fullmatch(r"\d+(:\d\d){3}", value) is not None
        if isinstance(value, str)
        else isinstance(value, dict) and value.keys() <= _UNITS and all(map(is_finite, value.values()))
    ),
)
# settings that cut training or scoring short, so that a run is for debugging and not a result; each with the
# values that cut nothing
_SHORTENING: dict[str, tuple[Allowed, tuple[Any, ...]]] = {
    "fast_dev_run": (SWITCH | whole(1, _MOST), (False,)),
    **{f"limit_{name}_batches": (_BATCHES | NULL, (None, 1.0)) for name in ("train", "val", "test")},
    "overfit_batches": (_BATCHES | one_of(0, 0.0), (0, 0.0)),
    "max_steps": (whole(1, _MOST) | Allowed("-1", lambda value: value == -1), (-1,)),
    "max_time": (_DURATION | NULL, (None,)),
}
_TRAINER: dict[str, Allowed] = {
    **{name: allowed for name, (allowed, _) in _SHORTENING.items()},
    "_target_": TEXT,
    "accelerator": TEXT,
    "strategy": TEXT | _TARGET,
    "devices": Allowed(
        "a number of devices, auto, or a list such as [0,1]",
        (whole(1, 2**16) | one_of(-1, "auto", "-1") | list_of(whole(0, 2**16), "")).fits,
    ),
    "num_nodes": whole(1, 2**16),
    **dict.fromkeys(("accumulate_grad_batches", "log_every_n_steps"), whole(1, _MOST)),
    "check_val_every_n_epoch": whole(1, _MOST),
    **dict.fromkeys(("enable_progress_bar", "inference_mode", "detect_anomaly"), SWITCH),
    "deterministic": SWITCH | one_of("warn"),
    "benchmark": SWITCH | NULL,
    "gradient_clip_val": number("a number above 0", lambda value: value > 0) | NULL,
    "gradient_clip_algorithm": one_of("norm", "value") | NULL,
    "profiler": one_of("simple", "advanced", "pytorch") | _TARGET | NULL,
    "plugins": list_of(_TARGET, "a list of mappings with _target_") | NULL,
    "val_check_interval": _BATCHES | NULL,
    **dict.fromkeys(("min_epochs", "min_steps"), whole(1, _MOST) | NULL),
    "reload_dataloaders_every_n_epochs": whole(0, _MOST),
}


def check(content: Mapping[str, Any]) -> None:
    """Check every setting that this project knows; a data module checks its further options itself.

    Args:
        content: The config of any entry point, or of a job, in plain containers.

    Raises:
        UserError: A value has the wrong type or is out of range, or the trainer has an unknown key.
    """
    for group in _GROUPS:
        if group in content and not isinstance(content[group], Mapping | BaseModel):
            raise UserError(f"{group}={shown(content[group])} does not fit: {group} is a group of settings")
    for group in ("callbacks", "logger"):
        _check(content, group, MAPPING | NULL)
        for name in content.get(group) or ():
            _check(content, f"{group}.{name}", _TARGET | Allowed("null to remove it", NULL.fits))
    in_program = {key: allowed for program, key, allowed in _IN_ONE_PROGRAM if program in content}
    for key, allowed in (_ALLOWED | in_program).items():
        _check(content, key, allowed)
    for name in map(str, content.get("trainer") or ()):
        if name not in _TRAINER:
            raise no_trainer_key(name)
        _check(content, f"trainer.{name}", _TRAINER[name])


def debugs(trainer: Mapping[str, Any]) -> bool:
    """Return whether trainer settings cut a run short, so that it is for debugging and not a result."""
    return any(
        name in trainer and trainer[name] not in harmless for name, (_, harmless) in _SHORTENING.items()
    )


def no_trainer_key(name: str) -> UserError:
    """Build the error for a trainer key that the composed config lacks, or that only this project may set."""
    if name in _SET_BY_PROJECT:
        return UserError(f"trainer.{name} is set by this project: {_SET_BY_PROJECT[name]}")
    if name in _TRAINER:
        return UserError(
            f"trainer.{name} is not in the chosen trainer's config: give +trainer.{name}=... to add it"
        )
    return unknown("key", f"trainer.{name}", [f"trainer.{known}" for known in (*_TRAINER, *_SET_BY_PROJECT)])


def _check(content: Mapping[str, Any], key: str, allowed: Allowed) -> None:
    """Check the value of a dotted key, if the config has that key."""
    *parents, name = key.split(".")
    holder: Any = content
    for parent in parents:
        holder = holder.get(parent) if isinstance(holder, Mapping) else None
    if isinstance(holder, Mapping) and name in holder and not allowed.fits(holder[name]):
        raise allowed.error(key, holder[name])
