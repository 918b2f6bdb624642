"""Low-rank updates of the attention's projections. Hu et al., LoRA, ICLR 2022, section 4.1, equation 3.

W x + (alpha / r) B A x for each of the matrices W_q, W_k, W_v of every block, A [r, d] and B [d, r]; B starts
at zero, so the start is the backbone. After training W + (alpha / r) B A takes W's place and nothing more is
computed.

Different from the paper, which updates W_q and W_v of language models: all three by default, `targets=qv`
gives the paper's choice. Different from layers that add B A to W in every step: the update is applied to the
activations, so no gradient of the size of W is ever computed. Each of the three has an A of its own, as in
the released code.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, Wrapped, per_block
from visprompt.models.methods.adapters import check_probability, check_rank, draw_linear


class _Updates(Protocol):
    """A method that updates linear layers: `update` is linear in x where nothing is dropped."""

    training: bool

    def update(self, x: Tensor, *where: int) -> Tensor: ...

    def train(self, mode: bool = True) -> object: ...


class Updated(Wrapped):
    """A linear layer plus a method's update: base(x) + update(x).

    Args:
        base: The layer, which stays as it is.
        method: Whose `update(x, *where)` is added; it keeps the parameters.
        where: Which of its updates.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, method: _Updates, *where: int) -> None:
        super().__init__(base)
        self._method = (method,)  # in a tuple, so that its parameters are not registered here too
        self._where = where

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [..., in] -> [..., out]."""
        out: Tensor = self.base(x)
        return out + self._method[0].update(x, *self._where)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer that computes the same."""
        layer, (method,) = copy.deepcopy(self.base), self._method
        training = method.training
        method.train(False)  # no dropout
        layer.weight += method.update(torch.eye(layer.in_features).to(layer.weight), *self._where).T
        method.train(training)
        return layer


class LoRA(Method):
    """Low-rank updates of queries, keys and values in every block; mergeable.

    Args:
        backbone: The backbone whose width and number of blocks shape the updates.
        rank: Of an update (r).
        alpha: The update is scaled by alpha / rank; None means rank, so by 1.
        targets: Which matrices: letters of "qkv".
        dropout: Dropout on what the update reads.

    Attributes:
        a: [blocks, targets, rank, width], as PyTorch draws a linear layer: U(-1, 1) / sqrt(width).
        b: [blocks, targets, width, rank], zero at first. Both are lists over the blocks where their widths
            differ.

    Raises:
        UserError: A number lies outside its range, or a target is none.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"modules"})
    can_merge: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Geometry,
        rank: int = 8,
        alpha: float | None = None,
        targets: str = "qkv",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(backbone)
        check_rank(rank, min(backbone.widths))
        check_probability("dropout", dropout)
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise UserError(
                f"method.alpha={alpha} cannot scale what is tuned: give a number above 0, or null for rank"
            )
        if not targets or set(targets) - set("qkv") or len(set(targets)) < len(targets):
            raise UserError(
                f"method.targets={targets!r} names no matrices: give letters of qkv, such as qv, each once"
            )
        self.rank, self.targets = rank, targets
        self.scale = 1.0 if alpha is None else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.a = per_block(
            [(len(targets), rank, width) for width in backbone.widths], lambda a: draw_linear(a, -1)
        )
        self.b = per_block([(len(targets), width, rank) for width in backbone.widths], nn.init.zeros_)

    def attach(self, backbone: Geometry) -> None:
        """Wrap the joint projection of every attention.

        Raises:
            UserError: There is none, or it gives queries, keys and values of another width than the tokens'.
        """
        for i, block in enumerate(find_linears(backbone, ["attn.qkv"], "lora")):
            layer: nn.Linear = block.get_submodule("attn.qkv")  # type: ignore[assignment]  # found as one
            width = layer.in_features
            if layer.out_features != 3 * width:
                raise UserError(
                    f"method lora cannot work on this backbone: its {type(block).__name__} has no linear "
                    f"layer attn.qkv from {width} to {3 * width}; choose a backbone of plain timm blocks"
                )
            block.set_submodule("attn.qkv", Updated(layer, self, i))

    def update(self, x: Tensor, *where: int) -> Tensor:
        """Update [..., 3 * width] of a block's joint queries, keys and values, from normed tokens x [..., width]."""
        (block,) = where
        low = self.scale * F.linear(
            self.dropout(x), self.a[block].flatten(0, 1)
        )  # of all targets in one product
        parts = {
            target: F.linear(part, self.b[block][i])
            for i, (target, part) in enumerate(zip(self.targets, low.split(self.rank, dim=-1), strict=True))
        }
        nothing = torch.zeros_like(parts[self.targets[0]]) if len(parts) < 3 else None
        return torch.cat([parts.get(name, nothing) for name in "qkv"], dim=-1)  # type: ignore[misc]  # None only if unused


def find_linears(backbone: Geometry, paths: Sequence[str], method: str) -> list[nn.Module]:
    """Return the blocks of a backbone, each of which has plain linear layers at some paths.

    Args:
        backbone: Any.
        paths: Of the layers in a block, such as "attn.qkv".
        method: For the message.

    Returns:
        The blocks in their order.

    Raises:
        UserError: A block lacks such a layer.
    """
    blocks = backbone.blocks
    for block, path in itertools.product(blocks, paths):
        try:
            layer: nn.Module | None = block.get_submodule(path)
        except AttributeError:
            layer = None
        if type(layer) is not nn.Linear:
            raise UserError(
                f"method {method} cannot work on this backbone: its {type(block).__name__} has no linear "
                f"layer {path}; choose a backbone that has it, such as a plain ViT"
            )
    return blocks
