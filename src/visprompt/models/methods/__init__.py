"""Methods by name: what each tunes is in its own file."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Flow, Geometry, Method, Place
from visprompt.models.digests import file_digest
from visprompt.models.methods.adapters import Adapter, AdapterPlus, AdaptFormer
from visprompt.models.methods.baselines import MLP, Full, Linear, Partial
from visprompt.models.methods.convpass import Convpass
from visprompt.models.methods.cvpt import CVPT
from visprompt.models.methods.da_vpt import DAVPT
from visprompt.models.methods.e2vpt import E2VPT
from visprompt.models.methods.fact import FacT
from visprompt.models.methods.gated import GatedVPT
from visprompt.models.methods.lora import LoRA
from visprompt.models.methods.low_rank import LowRankVPT
from visprompt.models.methods.pae import PAE
from visprompt.models.methods.sa2vp import SA2VP
from visprompt.models.methods.sidetune import SideTune
from visprompt.models.methods.ssf import SSF
from visprompt.models.methods.tcpa import TCPA
from visprompt.models.methods.vapt import VAPT
from visprompt.models.methods.vfpt import VFPT
from visprompt.models.methods.vpt import VPT
from visprompt.models.methods.weights import Bias, LayerNorm, VPTBias

_SHALLOW: dict[str, Any] = {"depth": 1, "carry_over": True, "dropout": 0.0}  # the paper's: no prompt dropout

METHODS: Mapping[str, Callable[..., Method]] = {
    "linear": Linear,
    "full": Full,
    "partial": Partial,
    "mlp": MLP,
    "sidetune": SideTune,
    "bias": Bias,
    "adapter": Adapter,
    "vpt_shallow": partial(VPT, **_SHALLOW),
    "vpt_deep": VPT,
    "vpt_shallow_bias": partial(VPTBias, **_SHALLOW),
    "vpt_deep_bias": VPTBias,
    "e2vpt": E2VPT,
    "vfpt": VFPT,
    "vapt": VAPT,
    "cvpt": CVPT,
    "vpt_low_rank": LowRankVPT,
    "vpt_gated": GatedVPT,
    "da_vpt": DAVPT,
    "sa2vp": SA2VP,
    "pae": PAE,
    "tcpa": TCPA,
    "layernorm": LayerNorm,
    "lora": LoRA,
    "ssf": SSF,
    "adaptformer": AdaptFormer,
    "adapter_plus": AdapterPlus,
    "convpass": Convpass,
    "fact": FacT,
}


LARGEST = 65536
"""Largest absolute value of a number among a method's options, on the command line and in a tuned state."""

# by an option's annotation: the class of its values and the words for messages. A value is of the first kind
# that it is an instance of, so `bool` comes before `int`
_KINDS: Mapping[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a word"),
    Sequence: (Sequence, "a list"),
    NoneType: (NoneType, "null"),
}


def option_kinds(name: str) -> dict[str, Any]:
    """Return the annotation of each option of a method, for example {"num_tokens": int, "dropout": float}.

    Raises:
        UserError: The name is unknown.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", name, METHODS)
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return {parameter.name: parameter.annotation for parameter in parameters if parameter.name != "backbone"}


def recorded_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's name and all its options as records keep them.

    Options that are not given have their defaults; a path to a file of weights becomes the hash of the file.
    """
    parameters = inspect.signature(METHODS[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name != "backbone"}
    return {"name": name} | hashed_file(defaults | dict(options))


def hashed_file(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a method, with the hash of a file of weights in place of its path."""
    if (file := options.get("weights")) and Path(file).expanduser().is_file():
        return options | {"weights": f"sha256:{file_digest(Path(file).expanduser())}"}
    return options


def build_method(name: str, backbone: Geometry, **options: Any) -> Method:
    """Build a method for a backbone.

    Args:
        name: One of `METHODS`.
        backbone: The backbone it is for.
        **options: The method's own options.

    Returns:
        The method, its parameters drawn from torch's global generator.

    Raises:
        UserError: The name or an option is unknown, an option is of the wrong kind, or the backbone lacks a
            site that the method needs.
    """
    check_options(name, options)
    factory, cls = METHODS[name], method_class(name)
    missing: frozenset[str] = getattr(cls, "sites", frozenset()) - backbone.sites
    if missing:
        raise UserError(
            f"method {name} cannot work on this backbone: it needs the site {', '.join(sorted(missing))}, "
            f"and the backbone offers {', '.join(sorted(backbone.sites))}; choose another method or backbone"
        )
    try:
        return factory(backbone, **options)
    except TypeError as error:
        raise UserError(f"method {name} has an option of the wrong kind: correct method.<key>=...") from error


def method_class(name: str) -> type[Method]:
    """Return the class of a method of `METHODS`."""
    factory: Any = METHODS[name]
    cls: Any = factory.func if isinstance(factory, partial) else factory
    return cls


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise unless a method of this name takes these options with values of the right kinds.

    Raises:
        UserError: The name or an option is unknown, or an option is of the wrong kind.
    """
    valid = option_kinds(name)
    for option, value in options.items():
        if option not in valid:
            raise unknown(f"option of method {name}", option, valid or ["(it has no options)"])
        _check_kind(option, value, valid[option])


def _check_kind(option: str, value: Any, annotation: Any) -> None:
    """Refuse a value whose class its annotation does not name.

    Without this check the word "no" would pass for a flag, and count as true because it is not empty.

    Raises:
        UserError: The value is of another kind or too large; the message says what to give.
    """
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    wanted = [get_origin(kind) or kind for kind in kinds]
    given = next((kind for kind, (cls, _) in _KINDS.items() if isinstance(value, cls)), None)
    fits = given in wanted or (given is int and float in wanted)
    if not fits and all(kind in _KINDS for kind in wanted):
        words = " or ".join(_KINDS[kind][1] for kind in wanted)
        value = "null" if value is None else value
        raise UserError(f"method.{option}={value} is of the wrong kind: give {words}")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise UserError(f"method.{option}={value} is out of range: give a number up to {LARGEST}")


__all__ = [
    "LARGEST",
    "METHODS",
    "Flow",
    "Geometry",
    "Method",
    "Place",
    "build_method",
    "check_options",
    "hashed_file",
    "method_class",
    "option_kinds",
    "recorded_options",
]
