"""Compile classifiers so that a graph serves every batch size, and every run of a grid."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from visprompt.models.classifier import Classifier

_last_kind: Hashable = None  # of the classifier that was compiled last in this process


def compile_in_place(classifier: Classifier, kind: Hashable) -> None:
    """Compile a classifier when it is called, in place, so that its parameters keep their names.

    Args:
        classifier: The classifier.
        kind: What decides its code: classifiers of equal kinds share their graphs. The graphs of another kind
            are dropped, because PyTorch stops to compile a function after a number of them.
    """
    global _last_kind
    if kind != _last_kind:
        torch.compiler.reset()
        _last_kind = kind
    classifier.compile()


def with_any_batch(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return images [B, ...] so that a compiled classifier serves any number of them with the same graph.

    Args:
        classifier: The classifier, compiled or not.
        images: What it is called with.
    """
    if classifier._compiled_call_impl is not None and len(images) > 1:  # a graph for one image is another one
        torch._dynamo.maybe_mark_dynamic(images, 0)
    return images
