"""Visual prompt tuning of frozen vision backbones.

Build a classifier, tune it, save what was tuned, load it, merge it, serve many on one backbone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprompt.models.api import build, load, save
    from visprompt.models.bank import Bank
    from visprompt.models.fit import fit
    from visprompt.models.merge import merge
    from visprompt.models.recipe import Recipe

__all__ = ["Bank", "Recipe", "build", "fit", "load", "merge", "save"]
_HOMES = {
    **dict.fromkeys(("build", "load", "save"), "models.api"),
    "Bank": "models.bank",
    "Recipe": "models.recipe",
    "fit": "models.fit",
    "merge": "models.merge",
}


# torch and timm take seconds: entry points say a wrong word before they are loaded
def __getattr__(
    name: str,
) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"visprompt.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
