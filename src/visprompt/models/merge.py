"""From a tuned classifier back to a plain timm model with the same logits."""

import copy
from typing import Any

from torch import nn

from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Wrapped


def merge(classifier: Classifier) -> nn.Module:
    """Build the plain model that a classifier is equal to.

    Args:
        classifier: One whose method leaves nothing but other weights behind; it is not changed.

    Returns:
        A timm model of its own memory, in evaluation mode, with the tuned weights and the classifier's head.

    Raises:
        UserError: The method computes something that a plain model does not, or the head is more than one
            layer.
    """
    method = classifier.method
    if not getattr(method, "can_merge", False):
        raise UserError(
            f"what {type(method).__name__} tunes is more than weights of the backbone, so it cannot be "
            "merged: keep the tuned state beside the backbone"
        )
    if type(classifier.head) is not nn.Linear:
        raise UserError(
            f"a head of class {type(classifier.head).__name__} cannot be merged: a timm model has one layer"
        )
    # a wrapper may point to its method: that one is read, not copied
    model: Any = copy.deepcopy(classifier.backbone.get_submodule("model"), {id(method): method})
    _unwrap(model)
    model.reset_classifier(classifier.num_classes)
    fresh = model.get_classifier()
    (name,) = (name for name, module in model.named_modules() if module is fresh)
    model.set_submodule(name, copy.deepcopy(classifier.head))
    merged: nn.Module = model.requires_grad_(True).eval()
    return merged


def _unwrap(model: nn.Module) -> None:
    """Put the plain layer in the place of every wrapped one, the inner ones first."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Wrapped)]
    for name, module in reversed(wrapped):
        if not hasattr(module, "merged"):
            raise UserError(
                f"{name} is wrapped in a {type(module).__name__}, which cannot be merged into plain weights"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.merged())
