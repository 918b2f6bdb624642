"""The two ends of prompt tuning: a linear head, and everything. Jia et al., Visual Prompt Tuning, ECCV 2022, 4.1."""

from typing import ClassVar

from timm.layers import DropPath
from torch import nn

from visprompt.errors import UserError
from visprompt.methods.base import Geometry, Method


class Linear(Method):
    """Tunes the head on frozen features."""


class Full(Method):
    """Tunes every parameter, with stochastic depth on.

    Args:
        backbone: The backbone that is tuned.
        drop_path: Probability that the last block's branches are skipped for an image; it grows linearly from 0 at the
            first block.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    trains_backbone: ClassVar[bool] = True

    def __init__(self, backbone: Geometry, drop_path: float = 0.1) -> None:
        super().__init__(backbone)
        if not 0 <= drop_path < 1:
            raise UserError(f"method.drop_path={drop_path} is not a probability: give a number from 0 to below 1")
        self.drop_path = drop_path

    def attach(self, backbone: nn.Module) -> None:
        """Sets the stochastic depth of every residual branch that has one."""
        blocks = list(backbone.get_submodule("model.blocks").children())
        for i, block in enumerate(blocks):
            rate = self.drop_path * i / max(1, len(blocks) - 1)
            for name, _ in list(block.named_modules()):
                parent, _, child = name.rpartition(".")
                if child.startswith("drop_path"):
                    setattr(block.get_submodule(parent), child, DropPath(rate) if rate else nn.Identity())

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Every parameter."""
        return frozenset(name for name, _ in classifier.named_parameters())
