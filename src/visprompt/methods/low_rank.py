"""Low-rank prompts. Wang et al., Attention to the Burstiness in Visual Prompt Tuning!, ICCV 2025 ("BPT-bilinear").

P_i = A_i B_i with A_i [p, r] and B_i [r, d]: two small matrices are learnt, and their product enters as in VPT. That is
r * (p + d) numbers for a block instead of p * d.

Only the plain product is here. The paper's other two variants draw B from a whitening matrix (of the mean over images
of W_q W_k^T X^T of each block, with r of its columns chosen at random) and keep it frozen or tune it: those need the
training images and every block's input before training. A ~ N(0, 0.02^2) and B by Xavier are the released code's.
"""

import math
from typing import ClassVar

from torch import Tensor

from visprompt.errors import UserError
from visprompt.methods.base import Geometry, drop, per_block
from visprompt.methods.vpt import VPT


class LowRankVPT(VPT):
    """VPT whose prompts are a product of two matrices.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        rank: Columns of the left, rows of the right matrix (r).
        depth: Number of blocks that get prompts of their own; None means all.
        depth_from: "first" or "last": which blocks these are.
        carry_over: Whether the prompt outputs of the last prompted block flow on; with depth 1 this is shallow.
        dropout: Dropout on prompt values, drawn for every image anew.

    Attributes:
        left: [depth, num_tokens, rank], N(0, 0.02^2).
        right: [depth, rank, width], U(-v, v) with v = sqrt(6 / (rank + width)); a list where the widths differ.

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        rank: int = 4,
        depth: int | None = None,
        depth_from: str = "first",
        carry_over: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            backbone, num_tokens=num_tokens, depth=depth, depth_from=depth_from, carry_over=carry_over, dropout=dropout
        )
        widths = [backbone.widths[block] for block in self.prompted_blocks]
        largest = min(num_tokens, *widths)
        if not 1 <= rank <= largest:
            raise UserError(
                f"method.rank={rank} does not fit: give 1 to {largest}, the smaller of num_tokens and the width"
            )
        del self.prompts  # they are the product, never stored
        self.left = per_block([(num_tokens, rank)] * self.depth, lambda left: left.normal_(0, 0.02))
        self.right = per_block([(rank, width) for width in widths], _draw_right)

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Prompts of a block, [1, p, width], or [B, p, width] while dropout is active."""
        own = block - self.first_block
        prompts = (self.left[own] @ self.right[own]).unsqueeze(0)
        return drop(self.dropout, prompts, len(x))


def _draw_right(right: Tensor) -> None:
    """Xavier's rule for each matrix [rank, width]."""
    bound = math.sqrt(6 / sum(right.shape[-2:]))
    right.uniform_(-bound, bound)
