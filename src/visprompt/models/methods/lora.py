"""Low-rank updates of the attention's projections. Hu et al., LoRA, ICLR 2022, section 4.1, equation 3.

W x + (alpha / r) B A x for each of the matrices W_q, W_k, W_v of every block, with A [r, d] and B [d, r]. B
starts at zero, so the tuned model starts equal to the backbone. After training, W + (alpha / r) B A replaces
W, and inference costs nothing extra.

Different from the paper, which updates W_q and W_v of language models: all three are updated by default;
`targets=qv` is the paper's choice. The update is applied to the activations and not added to W in every
step, so a gradient of the size of W is never computed. Each of the three has a separate A, as in the released
code.
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
from visprompt.models.contract import Geometry, Method
from visprompt.models.layers import Wrapped, per_block
from visprompt.models.methods.adapters import draw_linear
from visprompt.models.methods.checks import check_probability, check_rank


class _Updates(Protocol):
    """A method that updates linear layers; without dropout its `update` is linear in x."""

    training: bool

    def update(self, x: Tensor, *where: int) -> Tensor: ...

    def train(self, mode: bool = True) -> object: ...


class Updated(Wrapped):
    """A linear layer plus a method's update: base(x) + update(x).

    Args:
        base: The layer, which stays as it is.
        method: Holds the parameters; its `update(x, *where)` is added.
        where: Which of the method's updates, for example the index of the block.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, method: _Updates, *where: int) -> None:
        super().__init__(base)
        self._method = (method,)  # in a tuple, so that its parameters are not registered here too
        self._where = where

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Add the update of tokens x [..., in] to the layer's output [..., out]."""
        return out + self._method[0].update(x, *self._where)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain linear layer that computes the same."""
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
        rank: Rank of an update (r).
        alpha: The update is scaled by alpha / rank; None means alpha = rank, a scale of 1.
        targets: Matrices that are updated: one or more letters of "qkv".
        dropout: Dropout on the input of the update.

    Attributes:
        a: [blocks, targets, rank, width], as PyTorch draws a linear layer: U(-1, 1) / sqrt(width).
        b: [blocks, targets, width, rank], zero at first.

    If the blocks' widths differ, both are lists over the blocks.

    Raises:
        UserError: A number lies outside its range, or a target is not one of the three letters.
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
                f"method.alpha={alpha} is not a positive finite number: give a number above 0, or null for "
                "rank"
            )
        if not targets or set(targets) - set("qkv") or len(set(targets)) < len(targets):
            raise UserError(
                f"method.targets={targets!r} does not name matrices: give letters of qkv, such as qv, each "
                "once"
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
            UserError: An attention has no joint projection, or one whose queries, keys and values do not have
                the width of the tokens.
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
        """Return the update [..., 3 * width] of a block's queries, keys and values.

        Args:
            x: Normed tokens [..., width].
            where: Index of the block.
        """
        (block,) = where
        # the A of all targets in one product: [..., targets * rank]
        low = self.scale * F.linear(self.dropout(x), self.a[block].flatten(0, 1))
        parts = {
            target: F.linear(part, self.b[block][i])
            for i, (target, part) in enumerate(zip(self.targets, low.split(self.rank, dim=-1), strict=True))
        }
        zeros = torch.zeros_like(parts[self.targets[0]]) if len(parts) < 3 else None
        return torch.cat([parts.get(name, zeros) for name in "qkv"], dim=-1)  # type: ignore[misc]  # None only if unused


def find_linears(backbone: Geometry, paths: Sequence[str], method: str) -> list[nn.Module]:
    """Return the blocks of a backbone; refuse it unless every block has plain linear layers at these paths.

    Args:
        backbone: Any backbone.
        paths: Paths of the layers in a block, such as "attn.qkv".
        method: The method's name, for the message.

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
