"""Gated prompt tuning.

Yoo et al., Improving Visual Prompt Tuning for Self-supervised Vision Transformers, ICML 2023.

Prompts enter before the first block. Between blocks, the prompt outputs of a block are mixed with the prompts
that entered it, and every attention has a temperature:

    P_{i+1} = g_i * Z_i + (1 - g_i) * P_i,  g_i = sigmoid(gamma_i),  Z_i: the prompt outputs of block i
    attention weights of block i: softmax(q k^T / (sqrt(d_h) * t_i))

g = 1 is VPT-shallow; g = 0 is VPT-deep with one set of prompts for all blocks.

As in the released code there are L - 1 gates, gamma starts low (so g is nearly 0), and temperatures start at
1 and are clamped to 0.01 to 10. Different from it: the clamp is applied in the forward and not written to the
parameter, with a straight-through gradient; the last block's prompt outputs are computed only if the pooling
reads them (`pool=image_prompt`, the released code's pooling, except that it normalises after the mean and
this code before it).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.contract import Flow, Geometry
from visprompt.models.layers import Wrapped
from visprompt.models.methods.vpt import VPT

_COLDEST, _HOTTEST = 0.01, 10.0


class GatedVPT(VPT):
    """VPT-shallow with a gate between blocks and a temperature in every attention.

    Args:
        backbone: The backbone whose width, patch size and number of blocks (L) shape the parameters.
        num_tokens: Prompt tokens (p).
        gate_init: Initial value of every gamma; -5 is g = 0.7 %.
        temperature: Whether the attentions' temperatures are tuned.
        dropout: Dropout on prompt values where they enter, drawn for every image anew.
        pool: Which outputs of the last block are pooled, one of `POOLS`; None for the backbone's pooling.

    Attributes:
        prompts: [1, num_tokens, width], drawn as VPT's.
        gates: [L - 1], the gammas.
        temperatures: [L], one at first; None unless `temperature` is true.

    Raises:
        UserError: A number lies outside its range, or (`attach`) an attention has no query norm to wrap.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "stream"})

    def __init__(
        self,
        backbone: Geometry,
        num_tokens: int = 10,
        gate_init: float = -5.0,
        temperature: bool = True,
        dropout: float = 0.1,
        pool: str | None = None,
    ) -> None:
        super().__init__(
            backbone, num_tokens=num_tokens, depth=1, carry_over=True, dropout=dropout, pool=pool
        )
        if self.num_blocks < 2:
            raise UserError(
                "method vpt_gated cannot work on this backbone: its gates are between blocks, and there is "
                "only one; choose a backbone with more blocks"
            )
        if not -20 <= gate_init <= 20:
            raise UserError(
                f"method.gate_init={gate_init} leaves a gate that cannot move: give a number from -20 to 20"
            )
        self.gates = nn.Parameter(torch.full((self.num_blocks - 1,), float(gate_init)))
        self.temperatures = nn.Parameter(torch.ones(self.num_blocks)) if temperature else None

    def attach(self, backbone: Geometry) -> None:
        """Wrap every attention's query norm so that its output is divided by the temperature."""
        if self.temperatures is None:
            return
        for i, block in enumerate(backbone.blocks):
            attention = getattr(block, "attn", block)  # timm's parallel blocks are their own attention
            if not hasattr(attention, "q_norm"):
                raise UserError(
                    f"method vpt_gated has no place for a temperature in a {type(block).__name__}: "
                    "give method.temperature=false or another backbone"
                )
            attention.q_norm = _Tempered(attention.get_submodule("q_norm"), self, i)

    def token_flow(self) -> tuple[Flow, ...]:
        """Return `ENTER` for the first block and `MIX` for all others."""
        return (Flow.ENTER, *(Flow.MIX,) * (self.num_blocks - 1))

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return a block's prompts [B, p, width]; those of the first are [1, p, width] without dropout."""
        if last is None:
            return super().tokens(block, x)
        (entered, left), gate = last, self.gates[block - 1].sigmoid()
        return gate * left + (1 - gate) * entered

    def temperature(self, block: int) -> Tensor:
        """Return a block's temperature, clamped to its range with a straight-through gradient."""
        assert self.temperatures is not None
        free = self.temperatures[block]
        return free + (free.clamp(_COLDEST, _HOTTEST) - free).detach()


class _Tempered(Wrapped):
    """An attention's query norm whose output [B, heads, n, head_dim] is divided by a temperature."""

    def __init__(self, base: nn.Module, method: GatedVPT, block: int) -> None:
        super().__init__(base)
        self._method = (method,)  # in a tuple, so that torch does not register its parameters here too
        self._block = block

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        return out / self._method[0].temperature(self._block).to(out.dtype)
