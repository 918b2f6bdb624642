"""Merge a tuned classifier into a plain timm model with the same logits."""

import copy
from typing import Any

from torch import nn

from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.layers import Wrapped


def merge(classifier: Classifier) -> nn.Module:
    """Build a plain timm model with the logits of a classifier.

    Args:
        classifier: A classifier whose method only changes weights (`Method.can_merge`); it is not changed.

    Returns:
        A timm model that shares no memory with the classifier, in evaluation mode, with the tuned weights and
        the classifier's head.

    Raises:
        UserError: The method computes something that a plain model does not, the head has more than one
            layer, or the task is dense.
    """
    method = classifier.method
    if classifier.kind.dense:
        raise UserError(
            "a segmentation task cannot be merged, because a timm model has no head for each pixel: keep the "
            "tuned state with the backbone, or export it with to=onnx or to=torch"
        )
    if not getattr(method, "can_merge", False):
        raise UserError(
            f"{type(method).__name__} tunes more than weights of the backbone, so it cannot be merged: keep "
            "the tuned state with the backbone"
        )
    if type(classifier.head) is not nn.Linear:
        raise UserError(
            f"a head of class {type(classifier.head).__name__} cannot be merged, because a timm model's head "
            "has one layer: keep the tuned state with the backbone"
        )
    # wrappers refer to their method, which need not be copied
    model: Any = copy.deepcopy(classifier.backbone.get_submodule("model"), {id(method): method})
    _unwrap(model)
    model.reset_classifier(classifier.num_classes)
    fresh = model.get_classifier()
    (name,) = (name for name, module in model.named_modules() if module is fresh)
    model.set_submodule(name, copy.deepcopy(classifier.head))
    merged: nn.Module = model.requires_grad_(True).eval()
    return merged


def _unwrap(model: nn.Module) -> None:
    """Replace every wrapped layer by a plain one, inner wrappers first."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Wrapped)]
    for name, module in reversed(wrapped):
        if not hasattr(module, "merged"):
            raise UserError(
                f"{name} is wrapped in a {type(module).__name__}, which cannot be merged into plain weights: "
                "keep the tuned state with the backbone"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.merged())
