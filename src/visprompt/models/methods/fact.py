"""Factor-tuning.

Jie and Deng, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, AAAI 2023, 3.2.

The weight matrices of all blocks are stacked into one tensor of [width, width] slices: four for the
attention's q, k, v and output projection, and hidden / width for each of the MLP's two layers. The update of
a slice is factored, with U [d, r] and V [r, d] shared by all slices and blocks:

    tt: s * U Sigma V, with one Sigma [r, r] per slice (tensor train, equation 6)
    tk: the same, with Sigma = sum_p mix_p core_p of r shared matrices core_p [r, r] (Tucker, equation 7)

V starts at zero, so the tuned model starts equal to the backbone. Different from the released code: one
implementation serves every width and every hidden width that is a multiple of it; the slices of tk's two MLP
layers are not interleaved (they are learned, so only their order differs). As in that code the update is
applied to the activations, so the gradient of a full matrix is never computed.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry, Method
from visprompt.models.methods.checks import check_probability, check_rank, check_scale
from visprompt.models.methods.lora import Updated, find_linears

_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class FacT(Method):
    """Low-rank updates of every linear layer, from factors that all blocks share; mergeable.

    Args:
        backbone: The backbone whose width and number of blocks shape the factors. `sigma` and `mix` also
            depend on the MLP's hidden width and are drawn in `attach`.
        rank: Rank of every factor (r).
        form: "tt", tensor train, or "tk", Tucker.
        scale: Factor on the update (s); the released code chooses 0.01 to 100 per task.
        dropout: Dropout before V.

    Attributes:
        u: [width, rank], as PyTorch draws a linear layer: U(-1, 1) / sqrt(width).
        v: [rank, width], zero at first.
        sigma: Only tt: [blocks, slices, rank, rank], U(-1, 1) / sqrt(inputs). The slices are q, k, v, the
            output projection, the MLP's first layer, its second: 4 + 4 + 4 if the hidden width is 4 * width.
        core: Only tk: [rank, rank, rank], Xavier-uniform.
        mix: Only tk: [blocks, slices, rank], Xavier-uniform.

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
        """Draw `sigma` or `mix`, and wrap the four linear layers of every block.

        Raises:
            UserError: A block has other layers, or the MLP's hidden width is not a multiple of the width.
        """
        blocks = find_linears(backbone, _LAYERS, "fact")
        slices = self._slices(blocks[0])
        self._draw(slices)
        for i, block in enumerate(blocks):
            for path, (first, last) in slices.items():
                layer: nn.Linear = block.get_submodule(path)  # type: ignore[assignment]  # found as one
                block.set_submodule(path, Updated(layer, self, i, first, last))

    def update(self, x: Tensor, *where: int) -> Tensor:
        """Return the update [..., out] of a layer's output.

        Args:
            x: The layer's input [..., in].
            where: Block, first slice of the layer, first slice after it; (2, 0, 3) is the qkv of block 2.
        """
        block, first, last = where
        sigma = self._sigma(block, first, last)
        width = self.u.shape[0]
        if x.shape[-1] == width:  # each slice reads the whole input and gives a part of the output
            middle = torch.einsum("...r,mrs->...ms", x @ self.u, sigma)
            return (self.scale * self.dropout(middle) @ self.v).flatten(-2)
        # each slice reads a part of the input, and the outputs of all slices add up
        middle = torch.einsum("...mr,mrs->...s", x.unflatten(-1, (-1, width)) @ self.u, sigma)
        return self.scale * self.dropout(middle) @ self.v

    def _sigma(self, block: int, first: int, last: int) -> Tensor:
        """Return the middle factors [slices, rank, rank] of a layer."""
        if self.form == "tt":
            return self.sigma[block, first:last]
        return torch.einsum("mp,prs->mrs", self.mix[block, first:last], self.core)

    def _draw(self, slices: dict[str, tuple[int, int]]) -> None:
        """Draw `sigma` (tt) or `mix` (tk)."""
        first, count = slices["mlp.fc2"]
        if self.form == "tk":
            bound = math.sqrt(6 / (self.num_blocks * count + self.rank))
            self.mix = nn.Parameter(_uniform(bound, self.num_blocks, count, self.rank))
            return
        sigma = _uniform(1 / math.sqrt(self.rank), self.num_blocks, count, self.rank, self.rank)
        sigma[:, first:] /= math.sqrt(count - first)  # fc2 has (count - first) * rank inputs
        self.sigma = nn.Parameter(sigma)

    def _slices(self, block: nn.Module) -> dict[str, tuple[int, int]]:
        """Return the first slice of each layer and the first after it, such as {"attn.qkv": (0, 3), ...}."""
        width, first, slices = self.u.shape[0], 0, {}
        for path in _LAYERS:
            layer: nn.Linear = block.get_submodule(path)  # type: ignore[assignment]  # found as one
            shape = (layer.in_features, layer.out_features)
            size = max(shape)
            if min(shape) != width or size % width or (path == "attn.qkv" and size != 3 * width):
                raise UserError(
                    f"method fact cannot work on this backbone: {path} maps {shape[0]} to {shape[1]}, which "
                    f"slices of width {width} do not fill; choose a backbone whose hidden width is a "
                    "multiple of its width"
                )
            slices[path] = (first, first + size // width)
            first += size // width
        return slices


def _uniform(bound: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)
