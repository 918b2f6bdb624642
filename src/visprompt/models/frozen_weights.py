"""Keep frozen weights in autocast's type.

Autocast casts the weight of a linear layer or a convolution at every call, and keeps the result for the rest
of a step only if the weight is tuned. A frozen weight is cast here once: the products are the same to the
bit, the casts are saved, and the weights take half the memory.
"""

import torch
from torch import nn

from visprompt.models.classifier import Classifier

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Types of autocast by Lightning's precision."""
TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Types of all weights by Lightning's precision, where they are not float32."""
_CASTING = (nn.Linear, nn.Conv2d)  # subclasses may read their weights elsewhere than in the product


def cast_for(classifier: nn.Module, precision: str) -> None:
    """Cast a classifier's frozen weights if a trainer's precision is mixed; do nothing for anything else.

    Args:
        classifier: A classifier, or an ensemble, whose weights stay as they are.
        precision: Lightning's: "bf16-mixed".
    """
    if precision in MIXED and isinstance(classifier, Classifier):
        cast_frozen(classifier, MIXED[precision])


def cast_frozen(classifier: Classifier, dtype: torch.dtype) -> None:
    """Cast the frozen weights of the backbone's linear layers and convolutions, in place.

    The classifier can then be called under autocast of this type only. Whatever else reads the backbone's
    weights (initial values, merging, export) needs them as they were.

    Args:
        classifier: On a backbone that nobody else uses.
        dtype: Autocast's type.
    """
    exact = {part for module in classifier.method.exact_modules for part in module.modules()}
    for module in classifier.backbone.modules():
        if type(module) not in _CASTING or module in exact:
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
