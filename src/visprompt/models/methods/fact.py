"""Factor-tuning. Jie and Deng, FacT.

Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023, 3.2.

All matrices of all blocks are seen as one tensor of width x width slices: q, k, v and the output projection
of the attention, and the MLP's two layers as hidden / width slices each. Its update is factored, with U [d,
r] and V [r, d] shared by all slices and blocks:

    tt: s * U Sigma V, Sigma [r, r] for every slice (tensor train, equation 6)
    tk: the same, but each Sigma is a sum of r shared matrices: sum_p mix_p core_p (Tucker, equation 7)

V starts at zero, so the start is the backbone. Different from the released code: the update is written once
for any width and any hidden / width that divides; the slices of tk's two MLP layers are not interleaved (the
values are learned, so only their order differs). As there, it is applied to the activations: no gradient of a
full matrix.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry, Method
from visprompt.models.methods.adapters import check_probability, check_rank, check_scale
from visprompt.models.methods.lora import Updated, find_linears

_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class FacT(Method):
    """Low-rank updates of every linear layer from factors that all blocks share; mergeable.

    Args:
        backbone: The backbone whose width and number of blocks shape the factors; its MLP's hidden width does
            too, so those that depend on it are drawn in `attach`.
        rank: Of every factor (r).
        form: "tt", tensor train, or "tk", Tucker.
        scale: Of the update (s); the released code chooses 0.01 to 100 per task.
        dropout: Dropout before V.

    Attributes:
        u: [width, rank], as PyTorch draws a linear layer: U(-1, 1) / sqrt(width).
        v: [rank, width], zero at first.
        sigma: tt: [blocks, slices, rank, rank], U(-1, 1) / sqrt(inputs); the slices are q, k, v, the output
            projection, those of the MLP's first and those of its second layer: 12 where hidden is 4 * width.
        core: tk: [rank, rank, rank], xavier.
        mix: tk: [blocks, slices, rank], xavier.

    Raises:
        UserError: A number lies outside its range, or the form is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"modules", "stream"})
    can_merge: ClassVar[bool] = True
    sigma: nn.Parameter
    mix: nn.Parameter

    def __init__(
        self, backbone: Geometry, rank: int = 16, form: str = "tt", scale: float = 1.0, dropout: float = 0.1
    ) -> None:
        super().__init__(backbone)
        check_rank(rank, backbone.width)
        check_scale(scale)
        check_probability("dropout", dropout)
        if form not in ("tt", "tk"):
            raise unknown("method.form", form, ("tt", "tk"))
        self.rank, self.form, self.scale = rank, form, scale
        self.dropout = nn.Dropout(dropout)
        self.u = nn.Parameter(_uniform(1 / math.sqrt(backbone.width), backbone.width, rank))
        self.v = nn.Parameter(torch.zeros(rank, backbone.width))
        if form == "tk":
            self.core = nn.Parameter(_uniform(math.sqrt(3) / rank, rank, rank, rank))

    def attach(self, backbone: Geometry) -> None:
        """Draw what depends on the MLP and wraps the four linear layers of every block.

        Raises:
            UserError: A block has other layers, or the MLP's hidden width is no multiple of the width.
        """
        blocks = find_linears(backbone, _LAYERS, "fact")
        slices = self._slices(blocks[0])
        self._draw(slices)
        for i, block in enumerate(blocks):
            for path, (first, last) in slices.items():
                layer: nn.Linear = block.get_submodule(path)  # type: ignore[assignment]  # found as one
                block.set_submodule(path, Updated(layer, self, i, first, last))

    def update(self, x: Tensor, *where: int) -> Tensor:
        """Update [..., out] of a layer from its input x [..., in].

        Args:
            x: The layer's input.
            where: Block, and the layer's first slice and the one behind its last.
        """
        block, first, last = where
        sigma = self._sigma(block, first, last)
        width = self.u.shape[0]
        if x.shape[-1] == width:  # one input, a piece of the output from every slice
            middle = torch.einsum("...r,mrs->...ms", x @ self.u, sigma)
            return (self.scale * self.dropout(middle) @ self.v).flatten(-2)
        middle = torch.einsum("...mr,mrs->...s", x.unflatten(-1, (-1, width)) @ self.u, sigma)
        return self.scale * self.dropout(middle) @ self.v

    def _sigma(self, block: int, first: int, last: int) -> Tensor:
        """Return the middle factors [slices, rank, rank] of a layer."""
        if self.form == "tt":
            return self.sigma[block, first:last]
        return torch.einsum("mp,prs->mrs", self.mix[block, first:last], self.core)

    def _draw(self, slices: dict[str, tuple[int, int]]) -> None:
        """Draw sigma or mix."""
        first, count = slices["mlp.fc2"]
        if self.form == "tk":
            bound = math.sqrt(6 / (self.num_blocks * count + self.rank))
            self.mix = nn.Parameter(_uniform(bound, self.num_blocks, count, self.rank))
            return
        sigma = _uniform(1 / math.sqrt(self.rank), self.num_blocks, count, self.rank, self.rank)
        sigma[:, first:] /= math.sqrt(count - first)  # a linear layer of as many inputs
        self.sigma = nn.Parameter(sigma)

    def _slices(self, block: nn.Module) -> dict[str, tuple[int, int]]:
        """First slice of each layer and the one behind its last."""
        width, first, slices = self.u.shape[0], 0, {}
        for path in _LAYERS:
            layer: nn.Linear = block.get_submodule(path)  # type: ignore[assignment]  # found as one
            shape = (layer.in_features, layer.out_features)
            size = max(shape)
            if min(shape) != width or size % width or (path == "attn.qkv" and size != 3 * width):
                raise UserError(
                    f"method fact cannot work on this backbone: {path} maps {shape[0]} to {shape[1]}, which "
                    "slices of "
                    f"width {width} do not fill; choose a backbone whose hidden width is a multiple of its "
                    "width"
                )
            slices[path] = (first, first + size // width)
            first += size // width
        return slices


def _uniform(bound: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)
