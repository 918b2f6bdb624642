"""Which family drives a model of timm."""

from torch import nn

from visprompt.errors import UserError
from visprompt.models.backbones.convnet import ConvNeXt, ResNet
from visprompt.models.backbones.eva import EVA
from visprompt.models.backbones.family import Family
from visprompt.models.backbones.swin import Swin
from visprompt.models.backbones.vit import ViT

FAMILIES: tuple[type[Family], ...] = (ViT, EVA, Swin, ConvNeXt, ResNet)


def family(model: nn.Module, exact: bool = True) -> Family:
    """Wrap a model of timm into the family that drives it, in evaluation mode.

    Args:
        model: The model; its head is taken off.
        exact: False carries the prompt tokens through every block, for comparison.

    Returns:
        The family's module.

    Raises:
        UserError: No family drives its class.
    """
    for cls in FAMILIES:
        if type(model) is cls.model_class:  # a subclass may compute something else
            # eval first: in training mode, dropout in its attention keeps blocks off the exact path
            return cls(model.eval(), exact).eval()
    known = ", ".join(cls.model_class.__name__ for cls in FAMILIES)
    raise UserError(
        f"backbone class {type(model).__name__} is driven by no family: choose a model of one of {known}"
    )
