"""What each setting may be: its kind and range, checked when a command line is composed, before anything is built.

Recipes and methods check their own options (`optim.Recipe`, `methods.check_options`), because they are also called
without a config. Words from a list (an interpolation, a source) are checked where that list is.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError, unknown


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Attributes:
        words: What to give, for the error: "true or false".
        fits: Whether a value, in plain containers, is of this kind.
    """

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))


def whole(least: int, most: int) -> Kind:
    """Return the kind of whole numbers in a range."""
    return Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def number(words: str, fits: Callable[[float], bool]) -> Kind:
    """Return the kind of finite numbers, whole or not, that fit."""
    return Kind(words, lambda value: is_finite(value) and fits(value))


def is_finite(value: Any) -> bool:
    """Whether a value is a number, not true or false, that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def list_of(kind: Kind, words: str) -> Kind:
    """Return the kind of lists whose entries are all of one kind."""
    return Kind(words, lambda value: isinstance(value, list) and all(map(kind.fits, value)))


def one_of(*choices: Any) -> Kind:
    """Return the kind of a few words or numbers."""
    listed = ", ".join(str(choice) for choice in choices)
    return Kind(f"one of {listed}", lambda value: any(type(value) is type(c) and value == c for c in choices))


PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names of precisions, and what they are short for."""

_MOST = 2**32 - 1
_SIDE = whole(1, 2**14)  # of an image, in pixels
_NULL = Kind("null", lambda value: value is None)
_SWITCH = Kind("true or false", lambda value: type(value) is bool)
_TEXT = Kind("text", lambda value: isinstance(value, str))
_PATH = Kind("a path", lambda value: isinstance(value, str) and value != "" and "\0" not in value)
_PATHS = _PATH | list_of(_PATH, "a list of paths")
_WORDS = list_of(_TEXT, "a list of words")
_MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
_TARGET = Kind("a mapping with _target_", lambda value: isinstance(value, dict) and "_target_" in value)
_PRECISE = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
_PRECISION = Kind(f"one of {', '.join(_PRECISE)}", one_of(*_PRECISE, *PRECISIONS, 64, 32, 16).fits)

_KINDS: dict[str, Kind] = {
    "seed": whole(0, _MOST),
    "seeds": list_of(whole(0, _MOST), f"a list of whole numbers from 0 to {_MOST}")
    | Kind("the word released", lambda value: value == "released"),
    "precision": _PRECISION,
    **dict.fromkeys(
        ("compile", "dry_run", "rerun", "overwrite", "diagnostics.best_on_test", "verify", "download"), _SWITCH
    ),
    "resume_every_n_epochs": whole(1, _MOST),
    "split": _TEXT,
    "tags": _WORDS,
    "methods": _WORDS | _NULL,
    "tasks": _TEXT | _WORDS | _NULL,
    **dict.fromkeys(("preprocessing.interpolation", "preprocessing.resampling", "preprocessing.normalisation"), _TEXT),
    **dict.fromkeys(("paths.root_dir", "paths.data_dir", "paths.log_dir", "table", "output", "state", "images"), _PATH),
    **dict.fromkeys(("data_dir", "root", "weights", "recipe.table"), _PATH | _NULL),
    **dict.fromkeys(("run", "runs"), _PATHS),
    "inspect": _PATHS | _NULL,
    "store_dir": _PATH,
    **dict.fromkeys(("source", "revision", "device"), _TEXT),
    **dict.fromkeys(("against", "paper"), _TEXT | _NULL),
    "formats": _TEXT | _WORDS,
    "batch_size": whole(1, _MOST),
    "image_size": _SIDE,
    "backbone.name": _TEXT,
    "backbone.weights": _PATH | _NULL,
    **dict.fromkeys(("backbone.pretrained", "backbone.exact"), _SWITCH),
    "backbone.image_size": _SIDE | _NULL,
    "backbone.global_pool": _TEXT | _NULL,
    "backbone.final_norm": _TEXT,
    "backbone.kwargs": _MAPPING,
    "data.num_workers": whole(0, 1024),
    **{f"data.{name}": _SWITCH for name in ("pin_memory", "download", "crop", "skip_bad")},
    **{
        f"data.{name}": _TEXT
        for name in ("interpolation", "resampling", "normalisation", "source", "final", "revision")
    },
    **{f"data.{name}": _PATH for name in ("data_dir", "store_dir")},
    **{f"data.{name}": _PATH | _NULL for name in ("root", "csv")},
    "data.name": _TEXT | _NULL,
    "data.csv_columns": _MAPPING | _NULL,
    "data.white_level": whole(1, _MOST) | _NULL,
    **dict.fromkeys(("data.max_pixels", "max_pixels"), whole(1, 2**40)),
    "data.test": _TEXT,
    **{f"logger.wandb.{name}": _TEXT | _NULL for name in ("project", "group", "name", "entity")},
    "logger.wandb.tags": _WORDS | _NULL,
    **dict.fromkeys(("logger.wandb.offline", "logger.wandb.artifact", "callbacks.progress_bar.leave"), _SWITCH),
    **{f"logger.tensorboard.{name}": _TEXT | _NULL for name in ("name", "version")},
    "data.split_names": _MAPPING | Kind("none", lambda value: value == "none") | _NULL,
    "data.fraction": number("a number above 0, 1 at most", lambda value: 0 < value <= 1),
    "data.flip": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "data.short_side": _SIDE | _NULL,
}
# what is otherwise in one program, told by a key of its: eval.py takes the run's precision, prepare.py needs a place
_OF_PROGRAMS = (("run", "precision", _PRECISION | _NULL), ("verify", "data_dir", _PATH))
_GROUPS = ("data", "backbone", "method", "recipe", "trainer", "paths", "preprocessing", "diagnostics")

# settings of Lightning's trainer that this project gives by itself, with what to give instead
_OURS = {
    "max_epochs": "give recipe.epochs=...",
    "precision": "give precision=...",
    "logger": "choose logger=csv, tensorboard or wandb",
    "callbacks": "give +callbacks.NAME={_target_: ...}",
    "default_root_dir": "give paths.log_dir=...",
    "enable_checkpointing": "give resume_every_n_epochs=...",
    "enable_model_summary": "the table behind each run counts the parameters",
    "num_sanity_val_steps": "it would draw random numbers before the first epoch",
    "use_distributed_sampler": "data are dealt to devices by the data module",
    "sync_batchnorm": "it is on where GPUs train batch norm",
    "limit_predict_batches": "src/predict.py reads all images",
    "enable_autolog_hparams": "choose logger=csv, tensorboard or wandb",
    "model_registry": "nothing is uploaded but by logger=wandb",
    "barebones": "take debug=profiler to measure time",
}
_BATCHES = whole(1, _MOST) | number(
    "a share above 0, 1.0 at most", lambda value: type(value) is float and 0 < value <= 1
)
_UNITS = frozenset({"weeks", "days", "hours", "minutes", "seconds"})
_DURATION = Kind(
    "days, hours, minutes and seconds as 00:02:00:00, or a mapping such as {hours: 2}",
    lambda value: (
        re.fullmatch(r"\d+(:\d\d){3}", value) is not None
        if isinstance(value, str)
        else isinstance(value, dict) and value.keys() <= _UNITS and all(map(is_finite, value.values()))
    ),
)
# those that cut training or scoring short, with the values that do not: such runs are for debugging, no results
_CUTS: dict[str, tuple[Kind, tuple[Any, ...]]] = {
    "fast_dev_run": (_SWITCH | whole(1, _MOST), (False,)),
    **{f"limit_{name}_batches": (_BATCHES | _NULL, (None, 1.0)) for name in ("train", "val", "test")},
    "overfit_batches": (_BATCHES | one_of(0, 0.0), (0, 0.0)),
    "max_steps": (whole(1, _MOST) | Kind("-1", lambda value: value == -1), (-1,)),
    "max_time": (_DURATION | _NULL, (None,)),
}
_TRAINER: dict[str, Kind] = {
    **{name: kind for name, (kind, _) in _CUTS.items()},
    "_target_": _TEXT,
    "accelerator": _TEXT,
    "strategy": _TEXT | _TARGET,
    "devices": Kind(
        "a number of devices, auto, or a list such as [0,1]",
        (whole(1, 2**16) | one_of(-1, "auto", "-1") | list_of(whole(0, 2**16), "")).fits,
    ),
    "num_nodes": whole(1, 2**16),
    **dict.fromkeys(("accumulate_grad_batches", "log_every_n_steps"), whole(1, _MOST)),
    "check_val_every_n_epoch": whole(1, _MOST),
    **dict.fromkeys(("enable_progress_bar", "inference_mode", "detect_anomaly"), _SWITCH),
    "deterministic": _SWITCH | one_of("warn"),
    "benchmark": _SWITCH | _NULL,
    "gradient_clip_val": number("a number above 0", lambda value: value > 0) | _NULL,
    "gradient_clip_algorithm": one_of("norm", "value") | _NULL,
    "profiler": one_of("simple", "advanced", "pytorch") | _TARGET | _NULL,
    "plugins": list_of(_TARGET, "a list of mappings with _target_") | _NULL,
    "val_check_interval": _BATCHES | _NULL,
    **dict.fromkeys(("min_epochs", "min_steps"), whole(1, _MOST) | _NULL),
    "reload_dataloaders_every_n_epochs": whole(0, _MOST),
}


def check(cfg: DictConfig) -> None:
    """Check every setting of a composed config that this project knows; a data module's further keys are its own.

    Args:
        cfg: Of any entry point, resolvable.

    Raises:
        UserError: A value is of another kind or out of range, or the trainer has a key that is not for it.
    """
    for group in _GROUPS:
        if group in cfg and not OmegaConf.is_dict(cfg[group]):
            raise UserError(f"{group}={_shown(cfg[group])} does not fit: {group} is a group of settings")
    for group in ("callbacks", "logger"):
        _check(cfg, group, _MAPPING | _NULL)
        for name in cfg.get(group) or ():
            _check(cfg, f"{group}.{name}", _TARGET | Kind("null to remove it", _NULL.fits))
    kinds = _KINDS | {key: kind for program, key, kind in _OF_PROGRAMS if program in map(str, cfg)}
    for key, kind in kinds.items():
        _check(cfg, key, kind)
    _check_trainer(cfg)


def debugs(cfg: DictConfig) -> bool:
    """Whether trainer settings cut a run short, which is then for debugging and no result."""
    trainer = _plain(cfg.trainer)
    return any(name in trainer and trainer[name] not in whole_run for name, (_, whole_run) in _CUTS.items())


def _check_trainer(cfg: DictConfig) -> None:
    for name in map(str, cfg.get("trainer") or ()):
        if name not in _TRAINER:
            raise no_trainer_key(name)
        _check(cfg, f"trainer.{name}", _TRAINER[name])


def no_trainer_key(name: str) -> UserError:
    """Return the error for a key of the trainer that the composed config does not have, or must not have."""
    if name in _OURS:
        return UserError(f"trainer.{name} is set by this project: {_OURS[name]}")
    if name in _TRAINER:
        return UserError(f"trainer.{name} is not in the chosen trainer's config: give +trainer.{name}=... to add it")
    return unknown("key", f"trainer.{name}", [f"trainer.{known}" for known in (*_TRAINER, *_OURS)])


def _check(cfg: DictConfig, key: str, kind: Kind) -> None:
    """Check one value, if it is there."""
    for value in _values(cfg, key):
        if kind.fits(value):
            continue
        quoted = type(value) in (int, float, bool) and kind.fits("text")
        hint = f"; text that reads as a number or a switch is quoted: \"{key}='...'\"" if quoted else ""
        raise UserError(f"{key}={_shown(value)} does not fit: give {kind.words}{hint}")


def _values(cfg: DictConfig, key: str) -> Iterator[Any]:
    """The value of a dotted key in plain containers; nothing where there is no such key."""
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.is_dict(holder) and name in holder:
        yield _plain(holder[name])


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _shown(value: Any) -> str:
    return "null" if value is None else str(_plain(value)).lower() if type(value) is bool else str(_plain(value))
