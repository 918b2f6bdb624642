"""The library without Hydra and Lightning: a classifier from a backbone, a method and a number of classes."""

import copy
from typing import Any

from torch import nn

from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.models.backbones.families import family
from visprompt.models.backbones.family import Family
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Wrapped
from visprompt.models.methods import build_method
from visprompt.models.methods.locations import MoreChannels


def build(
    backbone: str | nn.Module, method: str, num_classes: int, *, head_init: str = "vpt", **options: Any
) -> Classifier:
    """Builds a classifier whose method and head are drawn from torch's global generator.

    Args:
        backbone: A timm model, or the name of one (with its pre-trained weights) or of the embedded demo backbone. A
            model is copied, since methods wrap and freeze its layers: it may be given again, but not that of a
            classifier whose method wrapped some.
        method: A name of `visprompt.models.methods.METHODS`.
        num_classes: Width of the head (C).
        head_init: "vpt", the released VPT code's, or "zeros".
        **options: The method's own, such as num_tokens. Where the first values are to be made of training images
            (`init=...`, `whitening=...`), call `visprompt.models.methods.inits.initialise` before training.

    Returns:
        The classifier: `classifier(images) -> logits [B, C]` of normalised images, `tuned_state()`,
        `load_tuned_state(state)`, `summary()`. What images are normalised with is in `classifier.backbone.mean` and
        `.std`. `visprompt.merge(classifier)` makes a plain timm model of it where its method allows.

    Raises:
        UserError: A name or option is unknown, method and backbone do not fit, or another method lives in the model.
    """
    if isinstance(backbone, str):
        module: Family = build_backbone(BackboneSpec(name=backbone)).module
    else:
        _check_plain(backbone)
        model = copy.deepcopy(backbone)
        module = model.eval() if isinstance(model, Family) else family(model)
    return Classifier(module, build_method(method, module, **options), num_classes, head_init)


def _check_plain(model: nn.Module) -> None:
    """Refuses a model with a layer of an earlier method, whose values no state of the new one would hold."""
    for name, module in model.named_modules():
        if isinstance(module, Wrapped | MoreChannels):
            raise UserError(
                f"another method still lives in this model, in {name}: build from a fresh model, or from what "
                "visprompt.merge returns"
            )
