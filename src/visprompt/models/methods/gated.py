"""Gated prompt tuning. Yoo et al., Improving Visual Prompt Tuning for Self-supervised Vision Transformers, ICML 2023.

Prompts enter before the first block. Between blocks, what comes out of a block is mixed with what went into
it:
    P_{i+1} = g_i * Z_i + (1 - g_i) * P_i,  g_i = sigmoid(gamma_i),  Z_i: the prompt outputs of block i,
and every attention has a temperature: softmax(q k^T / (sqrt(d_h) * t_i)). g = 1 is VPT-shallow; g = 0 is
VPT-deep with one set of prompts for all blocks.

As in the released code there are L - 1 gates, gamma starts low (the prompts start nearly as g = 0) and the
temperature at 1, kept from 0.01 to 10. Different from it: a temperature outside that range is not written
back but used as the range's end, with the gradient let through, so that a forward changes no parameter; the
last block's prompt outputs are not computed unless the pooling reads them (with `pool: image_prompt`, which
is that code's, but for a norm behind the mean instead of before it).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.contract import Flow, Geometry, Wrapped
from visprompt.models.methods.vpt import VPT

_COLDEST, _HOTTEST = 0.01, 10.0


class GatedVPT(VPT):
    """VPT-shallow with a gate between blocks and a temperature in every attention.

    Args:
        backbone: The backbone whose width, patch size and number of blocks (L) shape the parameters.
        num_tokens: Prompt tokens (p).
        gate_init: What every gamma starts at; -5 is g = 0.7 %.
        temperature: Whether the attentions' temperatures are tuned.
        dropout: Dropout on prompt values where they enter, drawn for every image anew.
        pool: Which outputs of the last block are pooled, one of `base.POOLS`; None for the backbone's own
            pooling.

    Attributes:
        prompts: [1, num_tokens, width], drawn as VPT's.
        gates: [L - 1], the gammas.
        temperatures: [L], from one; only where `temperature` is set.

    Raises:
        UserError: A number lies outside its range, or the backbone has attentions without a place for a
            temperature.
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
            raise UserError("method vpt_gated has its gates between blocks: the backbone has only one block")
        if not -20 <= gate_init <= 20:
            raise UserError(
                f"method.gate_init={gate_init} leaves a gate that cannot move: give a number from -20 to 20"
            )
        self.gates = nn.Parameter(torch.full((self.num_blocks - 1,), float(gate_init)))
        self.temperatures = nn.Parameter(torch.ones(self.num_blocks)) if temperature else None

    def attach(self, backbone: Geometry) -> None:
        """Divide every attention's queries by its temperature."""
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
        """Return prompts enter before the first block and are mixed before every other."""
        return (Flow.ENTER, *(Flow.MIX,) * (self.num_blocks - 1))

    def tokens(self, block: int, x: Tensor, last: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return prompts [B, p, width] of a block; of the first [1, p, width] unless dropout is active."""
        if last is None:
            return super().tokens(block, x)
        (entered, left), gate = last, self.gates[block - 1].sigmoid()
        return gate * left + (1 - gate) * entered

    def temperature(self, block: int) -> Tensor:
        """Return a block's temperature within its range; the gradient passes as if there were none."""
        assert self.temperatures is not None
        free = self.temperatures[block]
        return free + (free.clamp(_COLDEST, _HOTTEST) - free).detach()


class _Tempered(Wrapped):
    """Queries [B, heads, n, head_dim] over a temperature, behind the attention's own query norm."""

    def __init__(self, base: nn.Module, method: GatedVPT, block: int) -> None:
        super().__init__(base)
        self._method, self._block = (
            (method,),
            block,
        )  # in a tuple, so that the parameter stays the method's alone

    def forward(self, q: Tensor) -> Tensor:
        normed: Tensor = self.base(q)
        return normed / self._method[0].temperature(self._block).to(normed.dtype)
