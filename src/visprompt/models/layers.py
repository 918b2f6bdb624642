"""Parts that several methods and backbones are built from."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import unknown
from visprompt.models.recipe import HEAD_INITS


class Wrapped(nn.Module):
    """A layer that a method wraps around a layer of the backbone; it must treat each token separately.

    What it adds is a function of the layer's input and output, so that one call of the layer serves a batch
    in which other images have other methods (`visprompt.models.bank`).

    Attributes:
        base: The wrapped layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output as the method changes it."""
        return self.after(x, self.base(x))

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the method's output from the wrapped layer's input and output, the images on axis 0."""
        raise NotImplementedError


class Buffers(nn.Module):
    """A list of buffers: tensors of different shapes that are saved and never tuned."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor.detach())

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, index: int) -> Tensor:
        return self.get_buffer(str(index))


def drop(dropout: nn.Dropout, prompts: Tensor, batch_size: int) -> Tensor:
    """Apply dropout to prompts [1, p, width], drawn anew for each image.

    Returns:
        [batch_size, p, width] while dropout is active, else [1, p, width].
    """
    if dropout.training and dropout.p > 0:
        prompts = prompts.expand(batch_size, -1, -1)
    dropped: Tensor = dropout(prompts)
    return dropped


def per_block(
    shapes: Sequence[tuple[int, ...]], draw: Callable[[Tensor], object]
) -> nn.Parameter | nn.ParameterList:
    """Make parameters of all blocks: one stacked tensor if their shapes are equal, else a list.

    Args:
        shapes: Shape of each block's parameter.
        draw: Fills a tensor in place: the stacked [blocks, *shape], or each [*shape] of the list.

    Returns:
        A parameter or list; `[i]` is block i's part. It is saved as `name` or as `name.0`, `name.1`, ....
    """
    if len(set(shapes)) == 1:
        stacked = torch.empty(len(shapes), *shapes[0])
        draw(stacked)
        return nn.Parameter(stacked)
    parts = [torch.empty(shape) for shape in shapes]
    for part in parts:
        draw(part)
    return nn.ParameterList(parts)


def split_heads(attn: Any, projected: Tensor) -> tuple[Tensor, ...]:
    """Split projected tokens [B, n, parts * width] into parts [B, heads, n, head_dim], as timm does."""
    return projected.unflatten(-1, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def keys_values(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of normed tokens without queries, each [B, heads, n, head_dim]."""
    if type(attn.qkv) is not nn.Linear:
        _, k, v = split_heads(attn, attn.qkv(x))
    else:
        # the joint projection's rows are those of queries, keys and values, attn_dim each
        bias = None if attn.qkv.bias is None else attn.qkv.bias[attn.attn_dim :]
        k, v = split_heads(attn, F.linear(x, attn.qkv.weight[attn.attn_dim :], bias))
    return attn.k_norm(k), v


def init_linear(layer: nn.Linear, how: str) -> nn.Linear:
    """Initialise a head's last layer in place and return it.

    Args:
        layer: The layer.
        how: "zeros"; "normal", as in mmsegmentation: a deviation of 0.01, and a bias of 0; or "vpt", as in
            VPT's released code: Kaiming-normal by fan-out, and a bias of -log(99), a probability of 1 %
            whatever the number of classes.

    Raises:
        UserError: The word is unknown.
    """
    if how not in HEAD_INITS:
        raise unknown("head_init", how, HEAD_INITS)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    if how == "normal":
        nn.init.normal_(layer.weight, std=0.01)
    if how == "vpt":
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        nn.init.constant_(layer.bias, -math.log(99))
    return layer
