"""Visual prompt tuning. Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2, equations 4 to 8.

Shallow: [x_1, Z_1, E_1] = L_1([x_0, P, E_0]), and the prompt outputs Z flow on through all blocks.
Deep:    [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]): every block has its own prompts, whose outputs are dropped.

Both are one class here: shallow is depth 1 with carry-over. Different from the released code: prompts stand behind the
image tokens instead of behind the class token (attention without positions does not see the order), and tokens whose
outputs nobody reads are not computed (see `visprompt.backbones.vit`).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError, unknown
from visprompt.methods.base import Flow, Geometry, Method


class VPT(Method):
    """Prompt tokens before some or all blocks; everything else but the head stays frozen.

    Args:
        backbone: The backbone whose width, patch size and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        depth: Number of blocks that get prompts of their own; None means all.
        depth_from: "first" or "last": which blocks these are.
        carry_over: Whether the prompt outputs of the last prompted block flow on into the blocks behind it; with
            depth 1 from the first block this is VPT-shallow.
        dropout: Dropout on prompt values, drawn for every image anew.

    Attributes:
        prompts: [depth, num_tokens, width], U(-v, v) with v = sqrt(6 / (3 * patch^2 + width)) (the released code's).

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        depth: int | None = None,
        depth_from: str = "first",
        carry_over: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        depth = self.num_blocks if depth is None else depth
        if num_tokens < 1:
            raise UserError(f"method.num_tokens={num_tokens} is too small: give at least 1, or use method=linear")
        if not 1 <= depth <= self.num_blocks:
            raise UserError(f"method.depth={depth} does not fit: give 1 to {self.num_blocks}, the backbone's blocks")
        if depth_from not in ("first", "last"):
            raise unknown("method.depth_from", depth_from, ("first", "last"))
        if not 0 <= dropout < 1:
            raise UserError(f"method.dropout={dropout} is not a probability: give a number from 0 to below 1")
        self.depth, self.carry_over = depth, carry_over
        self.first_block = 0 if depth_from == "first" else self.num_blocks - depth
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (3 * backbone.patch_size**2 + backbone.width))
        self.prompts = nn.Parameter(torch.empty(depth, num_tokens, backbone.width).uniform_(-bound, bound))

    def token_flow(self) -> tuple[Flow, ...]:
        """Own prompts enter before each prompted block; behind the last of them they are dropped or flow on."""
        flow = [Flow.KEEP] * self.num_blocks
        end = self.first_block + self.depth
        flow[self.first_block : end] = [Flow.ENTER] * self.depth
        if end < self.num_blocks and not self.carry_over:
            flow[end] = Flow.DROP
        return tuple(flow)

    def tokens(self, block: int, batch_size: int) -> Tensor:
        """Prompts of a block, [1, p, width], or [batch_size, p, width] while dropout is active."""
        prompts = self.prompts[block - self.first_block].unsqueeze(0)
        if self.training and self.dropout.p > 0:
            prompts = prompts.expand(batch_size, -1, -1)
        return self.dropout(prompts)
