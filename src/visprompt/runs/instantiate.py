"""The one place that makes objects of classes that a config names (`_target_`), each of the kind that belongs there.

Configs come from this project, from configs/local and from the user's command line; what a run's folder says
never gets here (see `visprompt.runs.recorded`). A function, a method or a class of another kind is refused
all the same: nothing is called to find out what it is.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

import hydra.utils
import lightning.pytorch as L
from hydra.errors import InstantiationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf

from visprompt.errors import UserError, reason, unknown

PLUGINS = (ClusterEnvironment, CheckpointIO, LayerSync, Precision)
"""What `trainer.plugins` may hold."""
# what may be an argument of another object: a strategy's cluster environment, the progress bar's theme
_ARGUMENTS = (*PLUGINS, Accelerator, L.Callback, Logger, Profiler, Strategy, RichProgressBarTheme, timedelta)
# what to do about refusals of Lightning's that no trainer.<key> mends, by words of theirs
_WAYS_OUT = {
    "No supported gpu backend found": "without a GPU take trainer=cpu, or trainer=ddp_sim for two processes",
}
_Kind = TypeVar("_Kind")


def instantiate(where: str, config: Any, kind: type[_Kind] | tuple[type[_Kind], ...], **given: Any) -> _Kind:
    """Make an object of the class that a config names.

    Args:
        where: The config's key, for messages: "callbacks.stop".
        config: A mapping with `_target_` and arguments.
        kind: The class, or classes, of which it must be one or a subclass.
        **given: Further arguments, which win over the config's.

    Returns:
        The object.

    Raises:
        UserError: The class cannot be imported or is not of this kind, or it refuses its arguments; one
            sentence.
    """
    plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise UserError(f"{where} names no class: give {where}._target_=..., a subclass of {_names(kinds)}")
    _check(where, plain["_target_"], kinds)
    for key, target in _nested(where, plain):
        _check(key, target, _ARGUMENTS)
    try:
        made: Any = hydra.utils.instantiate(plain, _convert_="all", **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = error.__cause__ or error
        if isinstance(cause, TypeError) and (
            found := re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        ):
            known = {*map(str, plain), *_arguments(plain["_target_"])} - {found[1], "_target_", *given}
            raise unknown("key", f"{where}.{found[1]}", [f"{where}.{key}" for key in known]) from error
        said = reason(cause) or "one of its settings is of a wrong kind"
        way_out = next(
            (text for words, text in _WAYS_OUT.items() if words in said), f"correct {where}.<key>=..."
        )
        raise UserError(f"{where} cannot be built: {said.rstrip('.!')}; {way_out}") from error
    if not isinstance(made, kinds):
        raise UserError(f"{where} makes no object of {_names(kinds)}: leave _partial_ and the like out of it")
    return made


def _nested(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the targets among a config's arguments at any depth, with their keys."""
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
        key = f"{where}.{name}" if isinstance(value, dict) else f"{where}[{name}]"
        if isinstance(entry, dict) and "_target_" in entry:
            yield key, entry["_target_"]
        if isinstance(entry, dict | list):
            yield from _nested(key, entry)


def _check(where: str, target: Any, kinds: tuple[type, ...]) -> None:
    """Refuse a target that is not a class of one of some kinds.

    Its module is imported, and nothing is called.
    """
    found = _find(where, target)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise UserError(
            f"{where}._target_={target} is not a class that belongs there: give a subclass of {_names(kinds)}"
        )


def _find(where: str, target: Any) -> Any:
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{where}._target_={target} is not the dotted name of a class: give module.Class")
    found: Any = _import(where, target, parts[0])
    for end, part in enumerate(parts[1:], 2):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            found = _import(where, target, ".".join(parts[:end]))
        elif isinstance(found, ModuleType | type) and hasattr(found, part):
            found = getattr(found, part)
        else:
            raise UserError(f"{where}._target_={target} does not exist: correct it")
    return found


def _import(where: str, target: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}._target_={target} does not exist: there is no module {error.name}, correct it"
        ) from error
    except Exception as error:  # a user's own module may raise of every kind
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}._target_={target} cannot be imported: {said[:200]}; mend that module"
        ) from error


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _arguments(target: str) -> set[str]:
    """Return the names of a class's arguments, as far as it lists them."""
    parameters = inspect.signature(hydra.utils.get_class(target)).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
