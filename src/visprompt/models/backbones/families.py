"""The families of backbones, and the choice of the one that drives a timm model."""

from torch import nn

from visprompt.errors import UserError
from visprompt.models.backbones.convnet import ConvNeXt, ResNet
from visprompt.models.backbones.eva import EVA
from visprompt.models.backbones.family import Family
from visprompt.models.backbones.swin import Swin
from visprompt.models.backbones.vit import ViT

FAMILIES: tuple[type[Family], ...] = (ViT, EVA, Swin, ConvNeXt, ResNet)


def family(model: nn.Module, exact: bool = True) -> Family:
    """Wrap a timm model in the family that drives it, in evaluation mode.

    Args:
        model: The model; its head is removed.
        exact: False computes the prompt tokens' outputs in every block, for comparison.

    Returns:
        The family's module.

    Raises:
        UserError: No family supports the model's class.
    """
    for cls in FAMILIES:
        if type(model) is cls.model_class:  # not a subclass, which may compute something else
            # eval() comes first: blocks with attention dropout are not proven in training mode
            return cls(model.eval(), exact).eval()
    known = ", ".join(cls.model_class.__name__ for cls in FAMILIES)
    raise UserError(
        f"backbone class {type(model).__name__} is not supported: choose a model of one of {known}"
    )
