"""Heads of dense tasks: maps of some blocks -> logits of each pixel. Others have heads of the methods."""

from collections.abc import Mapping

from torch import nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry
from visprompt.models.heads.dense import DenseHead
from visprompt.models.heads.linear import LinearHead
from visprompt.models.heads.setr_pup import SETRPUP
from visprompt.models.methods import Method
from visprompt.models.recipe import HEADS

_CLASSES: Mapping[str, type[DenseHead]] = dict(zip(HEADS, (LinearHead, SETRPUP), strict=True))


def make_dense_head(name: str, backbone: Geometry, method: Method, num_classes: int, init: str) -> DenseHead:
    """Build the head of a dense task.

    Args:
        name: One of `HEADS`.
        backbone: The backbone whose maps it reads.
        method: The method, which must not change pooled features: nothing is pooled here.
        num_classes: Number of classes (C).
        init: Initialisation of the last layers, one of `recipe.HEAD_INITS`.

    Raises:
        UserError: The name or the initialisation is unknown, or the method works on pooled features.
    """
    if name not in _CLASSES:
        raise unknown("recipe.head", name, HEADS)
    kind = type(method)
    pools = method.pool is not None or kind.features is not Method.features
    if pools or kind.make_head is not Method.make_head:
        raise UserError(
            "this method works on the pooled features of an image, and a segmentation head reads those of "
            "every patch: choose another method, such as vpt_deep"
        )
    return _CLASSES[name](backbone, num_classes, init)


def head_name(head: nn.Module) -> str:
    """Return the name of a head, one of `HEADS`; "linear" for the head of a method."""
    return next((name for name, kind in _CLASSES.items() if type(head) is kind), "linear")


__all__ = ["DenseHead", "head_name", "make_dense_head"]
