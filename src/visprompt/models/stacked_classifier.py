"""Classifiers whose tuned tensors are stacked along a first dimension, and the dropout of each.

Heads are computed layer by layer, with the products and reductions that PyTorch takes for a single head: on a
CPU their numbers are those of single heads to the bit (measured; not where a product has fewer than 400
multiplications, or where batch norm has a width that is not a multiple of eight). Tuned blocks of the
backbone go through `torch.func.vmap`, and are equal to single ones up to rounding.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from visprompt.models.classifier import Classifier
from visprompt.models.seeds import epoch_seed


class StackedClassifier:
    """K classifiers that differ in their tuned tensors only.

    Args:
        classifier: One of them. Its frozen layers are used for all, its tuned tensors are not changed.
        states: The tuned tensors of each, by name in the classifier's `state_dict`.

    Attributes:
        parameters: The tuned parameters by name, [K, ...].
        buffers: The buffers of tuned modules by name, [K, ...], such as batch statistics.
        dropout: The probabilities of the head's dropout layers, in the order of the forward.
    """

    def __init__(self, classifier: Classifier, states: Sequence[Mapping[str, Tensor]]) -> None:
        self.classifier, self.count = classifier, len(states)
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        names = [name for name, _ in classifier.tuned_parameters()]
        self.parameters = {name: stacked[name].requires_grad_() for name in names}
        self.buffers = {name: tensor for name, tensor in stacked.items() if name not in names}
        self._only_head = all(name.startswith("head.") for name in stacked)
        hidden = getattr(classifier.head, "hidden", nn.Sequential())
        self._layers = [(f"head.hidden.{name}", layer) for name, layer in hidden.named_children()]
        self.dropout = [layer.p for _, layer in self._layers if isinstance(layer, nn.Dropout) and layer.p]
        # PyTorch has no batched form of the attention that it takes on a CPU
        on_cpu = next(iter(self.parameters.values())).device.type == "cpu"
        self._attention = (lambda: sdpa_kernel(SDPBackend.MATH)) if on_cpu else nullcontext

    def train(self, mode: bool = True) -> None:
        """Set training mode; a frozen backbone stays in evaluation mode."""
        # the walk over all modules of a backbone takes as long as a few steps of a head
        (self.classifier.head if self._only_head else self.classifier).train(mode)

    def __call__(self, outputs: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Return logits [K, B, C].

        Args:
            outputs: Frozen outputs, [K, B, ...]; a first dimension of 1 is expanded.
            masks: In training, the factors of each dropout layer with p > 0, [K, B, width].
        """
        outputs = outputs.expand(self.count, *outputs.shape[1:])
        if self._only_head:
            return self._head(outputs, [*masks])
        batched = vmap(lambda own, x: functional_call(self.classifier, own, (x,)))
        with self._attention():
            out: Tensor = batched(self.parameters | self.buffers, outputs)
        return out

    def _head(self, x: Tensor, masks: list[Tensor]) -> Tensor:
        for name, layer in self._layers:
            if isinstance(layer, nn.Linear):
                x = self._linear(name, x)
            elif isinstance(layer, nn.BatchNorm1d):
                x = self._normed(name, layer, x)
            elif not isinstance(layer, nn.Dropout):
                x = layer(x)
            elif layer.training and layer.p:
                x = x * masks.pop(0)
        return self._linear("head", x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        out: Tensor = _Linear.apply(x, weight, bias)
        return out

    def _normed(self, name: str, layer: nn.BatchNorm1d, x: Tensor) -> Tensor:
        """Normalise x [K, B, d] as one batch of K * d channels; as `MLPHead`, not by a batch of one image."""
        training = layer.training and x.shape[1] > 1
        if training:
            self.buffers[f"{name}.num_batches_tracked"] += 1
        mean, variance, weight, bias = (
            (self.buffers | self.parameters)[f"{name}.{own}"].view(-1)
            for own in ("running_mean", "running_var", "weight", "bias")
        )
        channels = x.transpose(0, 1).flatten(1)
        out = F.batch_norm(channels, mean, variance, weight, bias, training, layer.momentum or 0.0, layer.eps)
        return out.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)

    def finite(self) -> Tensor:
        """Return for each point whether all its parameters are finite, bool [K]."""
        each = [tensor.detach().isfinite().flatten(1).all(1) for tensor in self.parameters.values()]
        return torch.stack(each).all(0)

    def state(self, point: int) -> dict[str, Tensor]:
        """Return the tuned tensors of a point by name."""
        tensors = self.parameters | self.buffers
        return {name: tensor[point].detach() for name, tensor in tensors.items()}


class _Linear(torch.autograd.Function):
    """A linear layer of K points, with the gradients that PyTorch computes for one layer.

    Those of PyTorch's batched product are computed transposed, which takes twice the time and differs in the
    last bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return x @ weight^T + bias, [K, B, C], of x [K, B, d], weight [K, C, d] and bias [K, C]."""
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradients of x, weight and bias."""
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        return of_x, torch.bmm(gradient.transpose(1, 2), x), gradient.sum(1)


def step_bytes(classifier: Classifier, outputs: Tensor) -> int:
    """Return the bytes that a training step of one classifier takes.

    Args:
        classifier: The classifier in training mode; its batch statistics are changed.
        outputs: Frozen outputs of a batch, [B, ...].
    """
    parameters = {tensor.data_ptr() for tensor in classifier.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        classifier(outputs)
    # parameters, gradients, two moments, and what an update computes
    tuned = 6 * sum(tensor.nbytes for _, tensor in classifier.tuned_parameters())
    return sum(saved.values()) + tuned + outputs.nbytes


class DropoutStreams:
    """The dropout that single runs draw: torch's generator is seeded by (seed, epoch) at each epoch's start.

    Args:
        seeds: The seed of each of S streams.
        device: The device of the training.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds, self._device = seeds, device
        self._generator = torch.default_generator
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index or 0]
        self._states: list[Tensor] = []

    def restart(self, epoch: int) -> None:
        """Begin an epoch."""
        self._states = []
        for seed in self._seeds:
            self._generator.manual_seed(epoch_seed(seed, epoch, 0))
            self._states.append(self._generator.get_state())

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype, rates: Sequence[float]) -> list[Tensor]:
        """Return the factors of a step for each rate, [S, *shape]: 0, or 1 / (1 - rate)."""
        ones = torch.ones(shape, dtype=dtype, device=self._device)
        masks = []
        for place, state in enumerate(self._states):
            self._generator.set_state(state)
            masks.append([F.dropout(ones, rate, training=True) for rate in rates])
            self._states[place] = self._generator.get_state()
        return [torch.stack(of_seeds) for of_seeds in zip(*masks, strict=True)]
