"""Visual adaptive prompt tuning. Le et al., Revisit Visual Prompt Tuning, ICLR 2026.

The first block has plain prompts. Before block i = 2..L the prompts are computed from the image's patch
tokens X, so they differ from image to image:

    G   = W_i vec(k_i * map(LN_i(X))) + b_i     k_i: a 2x2 kernel for all channels; W_i: positions -> p
    P_i = G + U ReLU(D G)                       U, D: a bottleneck without biases that all blocks share

W_i and b_i start at zero, so these prompts do too. LN_i is a tuned norm, one for each block.

Different from the released code: the convolution and W_i are both linear over positions and the same in every
channel, so they are multiplied into one [p, positions] matrix that is applied once; dropping a channel of the
map (its Dropout2d) commutes with that. Its three dropout rates are one option here, with the same default.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Flow, Geometry
from visprompt.models.methods.checks import check_least
from visprompt.models.methods.vpt import VPT

_KERNEL = 2


class VAPT(VPT):
    """Prompts that are functions of the image.

    Args:
        backbone: The backbone whose width, grid and number of blocks (L) shape the parameters.
        num_tokens: Prompt tokens of a block (p).
        bottleneck: Hidden width of the shared bottleneck (r).
        dropout: Dropout on the values of the first block's prompts, on whole channels of the map, and in the
            bottleneck.

    Attributes:
        prompts: [1, num_tokens, width] of the first block, drawn as VPT's.
        norm_weight: [L - 1, width], one at first, and `norm_bias`, [L - 1, width], zero at first.
        conv: [L - 1, 2, 2], N(0, 1).
        mix_weight: [L - 1, num_tokens, positions] and `mix_bias`, [L - 1, num_tokens], zero at first; there
            are (height - 1) * (width - 1) positions for a grid of [height, width].
        down: [width, bottleneck] and `up`, [bottleneck, width], U(-v, v) with v = 1 / sqrt(inputs).

    Raises:
        UserError: A number lies outside its range, or the grid is smaller than the kernel.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "stream"})
    reads_image: ClassVar[bool] = True
    fixed_size = True  # the shape of `mix_weight` depends on the grid of patches

    def __init__(
        self, backbone: Geometry, num_tokens: int = 10, bottleneck: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(backbone, num_tokens=num_tokens, depth=1, dropout=dropout)
        if self.num_blocks < 2:
            raise UserError(
                "method vapt cannot work on this backbone: it computes prompts from the second block on, and "
                "there is only one; choose a backbone with more blocks"
            )
        check_least(1, bottleneck=bottleneck)
        if min(backbone.grids[0]) < _KERNEL:
            raise UserError(
                f"method vapt needs a grid of at least 2x2 patches, and this backbone has "
                f"{backbone.grids[0]}: choose larger images or smaller patches"
            )
        self._num_prefix, width, adaptive = backbone.num_prefix, backbone.width, self.num_blocks - 1
        self._mixed = tuple(side - _KERNEL + 1 for side in backbone.grids[0])  # sides after the convolution
        self.norm_weight = nn.Parameter(torch.ones(adaptive, width))
        self.norm_bias = nn.Parameter(torch.zeros(adaptive, width))
        self.conv = nn.Parameter(torch.randn(adaptive, _KERNEL, _KERNEL))
        self.mix_weight = nn.Parameter(torch.zeros(adaptive, num_tokens, math.prod(self._mixed)))
        self.mix_bias = nn.Parameter(torch.zeros(adaptive, num_tokens))
        self.frozen_mixers: Tensor | None
        self.register_buffer("frozen_mixers", None, persistent=False)
        self.down = nn.Parameter(torch.empty(width, bottleneck).uniform_(-(width**-0.5), width**-0.5))
        self.up = nn.Parameter(torch.empty(bottleneck, width).uniform_(-(bottleneck**-0.5), bottleneck**-0.5))

    def token_flow(self) -> tuple[Flow, ...]:
        """Return `ENTER` for every block."""
        return (Flow.ENTER,) * self.num_blocks

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return a block's prompts: plain ones for the first, then [B, p, width] from the image tokens x."""
        if block == 0:
            return super().tokens(block, x, last)
        i, width = block - 1, x.shape[-1]
        normed = F.layer_norm(x[:, self._num_prefix :], (width,), self.norm_weight[i], self.norm_bias[i])
        mixer = self._mixer(i) if self.frozen_mixers is None else self.frozen_mixers[i]
        mixed = mixer.to(normed.dtype) @ normed
        if self.training:
            mixed = mixed * self.dropout(mixed.new_ones(x.shape[0], 1, width))
        mixed = mixed + self.mix_bias[i][:, None]
        return mixed + self.dropout(F.relu(mixed @ self.down)) @ self.up

    def freeze(self) -> None:
        """Multiply convolution and W_i once."""
        self.frozen_mixers = torch.stack([self._mixer(i).detach() for i in range(len(self.conv))])

    def _mixer(self, i: int) -> Tensor:
        """Return convolution and W_i as one matrix [p, patches].

        The transposed convolution of the rows of W_i is W_i times the matrix of the convolution.
        """
        weights = self.mix_weight[i].unflatten(1, (1, *self._mixed))
        return F.conv_transpose2d(weights, self.conv[i][None, None]).flatten(1)
