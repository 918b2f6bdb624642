"""Methods by name: what each tunes is in its own file."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from visprompt.errors import UserError, unknown
from visprompt.methods.base import Flow, Geometry, Method
from visprompt.methods.baselines import Full, Linear
from visprompt.methods.vpt import VPT

METHODS: Mapping[str, Callable[..., Method]] = {
    "linear": Linear,
    "full": Full,
    "vpt_shallow": partial(VPT, depth=1, carry_over=True, dropout=0.0),  # the paper's: no prompt dropout
    "vpt_deep": VPT,
}


def build_method(name: str, backbone: Geometry, **options: Any) -> Method:
    """Builds a method for a backbone.

    Args:
        name: One of `METHODS`.
        backbone: The backbone it is for.
        **options: The method's own options.

    Returns:
        The method, its parameters drawn from torch's global generator.

    Raises:
        UserError: The name or an option is unknown, or the backbone lacks a site that the method needs.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    factory = METHODS[name]
    valid = [p for p in inspect.signature(factory).parameters if p != "backbone"]
    for option in options:
        if option not in valid:
            raise unknown(f"option of method {name}", option, valid or ["(it has none)"])
    cls = factory.func if isinstance(factory, partial) else factory
    missing: frozenset[str] = getattr(cls, "sites", frozenset()) - backbone.sites
    if missing:
        raise UserError(
            f"method {name} cannot work on this backbone: it needs the site {', '.join(sorted(missing))}, "
            f"and the backbone offers {', '.join(sorted(backbone.sites))}"
        )
    try:
        return factory(backbone, **options)
    except TypeError as error:
        raise UserError(f"method {name} has an option of the wrong kind ({error}): correct method.<key>=...") from error


__all__ = ["METHODS", "Flow", "Geometry", "Method", "build_method"]
