"""Visual prompt tuning of frozen vision backbones.

Build a classifier, save what was tuned, load it, merge it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visprompt.models.api import build, load, save
    from visprompt.models.bank import Bank
    from visprompt.models.merge import merge

__all__ = ["Bank", "build", "load", "merge", "save"]
_HOMES = dict.fromkeys(("build", "load", "save"), "models.api") | {
    "merge": "models.merge",
    "Bank": "models.bank",
}


# torch and timm take seconds: entry points say a wrong word before they are loaded
def __getattr__(
    name: str,
) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"visprompt.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
