"""Classifiers whose backbones are one set of weights, and layers that serve several methods in one call."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import torch
from timm.layers import LayerNorm, LayerNorm2d, LayerNorm2dFp32, LayerNormFp32
from torch import Tensor, nn

from visprompt.models.backbones.family import Family
from visprompt.models.classifier import Classifier
from visprompt.models.layers import Wrapped

Span = tuple[int, int]  # of images in a batch: start, stop
# exact classes: timm's BatchNormAct2d is a batch norm with an activation behind the bias
_MAPS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, LayerNorm2d, LayerNorm2dFp32)
_BIASED = (nn.Linear, nn.LayerNorm, LayerNorm, LayerNormFp32, *_MAPS)


def shared_copy(backbone: Family) -> Family:
    """Return a backbone of new modules with the same tensors, whose layers a method may wrap."""
    tensors = chain(backbone.parameters(), backbone.buffers())
    return copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})


def own_tuned_tensors(classifier: Classifier) -> None:
    """Give a classifier on a shared copy its own tensors in place of those that its method tunes."""
    names = [name for name in classifier.tuned_tensor_names() if name.startswith("backbone.")]
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = classifier.get_submodule(path)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(module.get_parameter(leaf).detach().clone()))
        else:
            setattr(module, leaf, module.get_buffer(leaf).clone())


def wrapped_layers(backbone: Family) -> dict[str, Wrapped]:
    """Return the layers that a method has wrapped, by their paths in the model."""
    modules = backbone.get_submodule("model").named_modules()
    return {name: module for name, module in modules if isinstance(module, Wrapped)}


class Rebiased(Wrapped):
    """A layer whose tuned bias is added as its difference from the shared one.

    Args:
        base: The layer, with the shared bias.
        bias_delta: The difference, [channels].
    """

    bias_delta: Tensor

    def __init__(self, base: nn.Module, bias_delta: Tensor) -> None:
        super().__init__(base)
        self.register_buffer("bias_delta", bias_delta)

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Add the difference to an output, whose channels are on the last axis, or on axis 1 of maps."""
        return out + (self.bias_delta[:, None, None] if type(self.base) in _MAPS else self.bias_delta)


def rebiased_layers(classifier: Classifier, shared: Family) -> dict[str, Wrapped] | None:
    """Return the layers whose biases a classifier tunes, by path; None if it tunes other weights too."""
    names = [name for name in classifier.tuned_tensor_names() if name.startswith("backbone.")]
    found: dict[str, Wrapped] = {}
    for name in names:
        path, _, leaf = name.removeprefix("backbone.model.").rpartition(".")
        layer = shared.get_submodule(f"model.{path}") if leaf == "bias" else None
        if type(layer) not in _BIASED:
            return None
        delta = classifier.get_parameter(name) - shared.get_parameter(f"model.{path}.bias")
        found[path] = Rebiased(cast(nn.Module, layer), delta.detach())
    return found


@dataclass
class Batch:
    """The wrapped layers of the batch that is running.

    Attributes:
        layers: For each span of images, the layers that its method has wrapped, by path.
    """

    layers: Sequence[tuple[Span, Mapping[str, Wrapped]]] = field(default=())


class PerTaskLayer(Wrapped):
    """A layer of the backbone whose outputs change as the method of each image says.

    Args:
        base: The layer.
        path: Its path in the model.
        batch: What is running.
    """

    def __init__(self, base: nn.Module, path: str, batch: Batch) -> None:
        super().__init__(base)
        self._path, self._batch = path, batch

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the outputs [B, ...], changed for the images whose method has wrapped this layer."""
        layers = [(span, layers.get(self._path)) for span, layers in self._batch.layers]
        if not any(layer for _, layer in layers):
            return out
        parts = [
            layer.after(x[start:stop], out[start:stop]) if layer else out[start:stop]
            for (start, stop), layer in layers
        ]
        return torch.cat(parts)


def make_per_task(backbone: Family, paths: Sequence[str], batch: Batch) -> None:
    """Replace layers of a shared copy by `PerTaskLayer`s."""
    model = backbone.get_submodule("model")
    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, PerTaskLayer):
            model.set_submodule(path, PerTaskLayer(layer, path, batch))
