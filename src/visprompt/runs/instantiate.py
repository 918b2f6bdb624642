"""Build objects from configs with a `_target_`, after checking the class; no other module does this.

Configs come from this project, from configs/local and from the user's command line, never from a run's folder
(see `visprompt.runs.recorded`). A target that is a function, a method or a class that does not belong there
is refused, and nothing is called to find that out.
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
from torch import nn

from visprompt.errors import UserError, reason, unknown

PLUGINS = (ClusterEnvironment, CheckpointIO, LayerSync, Precision)
"""What `trainer.plugins` may hold."""
# classes of objects that may be arguments of another object, such as the theme of a progress bar
_ARGUMENTS = (*PLUGINS, Accelerator, L.Callback, Logger, Profiler, Strategy, RichProgressBarTheme, timedelta)
_AUGMENT = "data.augment"  # the user's transform, a module, which may hold other modules
# what to do about an error of Lightning that no trainer.<key> corrects, by a part of its message
_REMEDIES = {
    "No supported gpu backend found": "without a GPU take trainer=cpu, or trainer=ddp_sim for two processes",
}
_T = TypeVar("_T")


def instantiate(where: str, config: Any, base: type[_T] | tuple[type[_T], ...], **given: Any) -> _T:
    """Build an object of the class that a config names.

    Args:
        where: The config's key, for messages: "callbacks.stop".
        config: A mapping with `_target_` and arguments.
        base: The class, or classes, from which the object's class must be derived.
        **given: Further arguments, which take precedence over the config's.

    Returns:
        The object.

    Raises:
        UserError: The class cannot be imported, is not derived from `base`, or refuses its arguments.
    """
    plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    bases = base if isinstance(base, tuple) else (base,)
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise UserError(f"{where} names no class: give {where}._target_=..., a subclass of {_names(bases)}")
    _check(where, plain["_target_"], bases)
    for key, target in _nested(where, plain):
        _check(key, target, (nn.Module,) if key.startswith(_AUGMENT) else _ARGUMENTS)
    try:
        built: Any = hydra.utils.instantiate(plain, _convert_="all", **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = error.__cause__ or error
        where, failed = _place(where, plain, error)
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        if isinstance(cause, TypeError) and unexpected:
            name = unexpected[1]
            known = {*map(str, failed), *_arguments(failed["_target_"])} - {name, "_target_", *given}
            raise unknown("key", f"{where}.{name}", [f"{where}.{key}" for key in known]) from error
        why = reason(cause) or "one of its settings has a wrong type"
        remedy = next(
            (text for words, text in _REMEDIES.items() if words in why), f"correct {where}.<key>=..."
        )
        raise UserError(f"{where} cannot be built: {why.rstrip('.!')}; {remedy}") from error
    if not isinstance(built, bases):
        raise UserError(
            f"{where} builds no object of {_names(bases)}: leave _partial_ and the like out of it"
        )
    return built


def _place(where: str, config: dict[Any, Any], error: Exception) -> tuple[str, dict[Any, Any]]:
    """Return the key and the config of the object that could not be built, which may be a nested one."""
    named = re.search(r"^full_key: (\w+)$", str(error), re.MULTILINE)
    nested = config.get(named[1]) if named else None
    return (f"{where}.{named[1]}", nested) if named and isinstance(nested, dict) else (where, config)


def _nested(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all `_target_` below a config's top level, with their keys: ("callbacks.bar.theme", "a.B")."""
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
        key = f"{where}.{name}" if isinstance(value, dict) else f"{where}[{name}]"
        if isinstance(entry, dict) and "_target_" in entry:
            yield key, entry["_target_"]
        if isinstance(entry, dict | list):
            yield from _nested(key, entry)


def _check(where: str, target: Any, bases: tuple[type, ...]) -> None:
    """Refuse a target that is not a class derived from `bases`; import its module, but call nothing."""
    named = import_target(where, target)
    if not (isinstance(named, type) and issubclass(named, bases)):
        raise UserError(
            f"{where}._target_={target} is not a class that belongs there: give a subclass of {_names(bases)}"
        )


def import_target(where: str, target: Any) -> Any:
    """Import what a config's `_target_` names.

    Args:
        where: The config, for the message.
        target: The dotted name.

    Raises:
        UserError: There is no such object, or its module cannot be imported.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{where}._target_={target} is not the dotted name of a class: give module.Class")
    named: Any = _import_module(where, target, parts[0])
    for end, part in enumerate(parts[1:], 2):
        if isinstance(named, ModuleType) and not hasattr(named, part):
            named = _import_module(where, target, ".".join(parts[:end]))
        elif isinstance(named, ModuleType | type) and hasattr(named, part):
            named = getattr(named, part)
        else:
            raise UserError(f"{where}._target_={target} does not exist: correct it")
    return named


def _import_module(where: str, target: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{where}._target_={target} does not exist: there is no module {error.name}, correct it"
        ) from error
    except Exception as error:  # a user's module may raise any exception
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}._target_={target} cannot be imported: {why[:200]}; correct that module"
        ) from error


def _names(classes: tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in classes)


def _arguments(target: str) -> set[str]:
    """Return the names of the arguments in a class's signature, without *args and **kwargs."""
    parameters = inspect.signature(hydra.utils.get_class(target)).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
