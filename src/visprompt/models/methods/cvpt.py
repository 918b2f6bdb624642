"""Cross visual prompt tuning. Huang et al., CVPT: Cross Visual Prompt Tuning, ICCV 2025.

Between the attention and the MLP of block i, cross-attention (CA) is added: x <- x + CA(x, P_i), with queries
from the image tokens x, and keys and values from the prompts P_i. Prompts never enter the sequence, so the
cost per token is linear in their number. CA uses the frozen weights of that block's attention ("weight
sharing"); only the prompts and the head are tuned. There is no norm before CA and nothing starts at zero, so
the tuned model does not start equal to the backbone.

Different from the released code: it copies the attention's weights, here the attention itself is used; norms
of queries and keys are applied if the block has them; the frozen backbone's stochastic depth (0.1 there) is
off.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.contract import Geometry, Method, Place
from visprompt.models.layers import drop, keys_values, split_heads
from visprompt.models.methods.checks import check_probability, check_size, plain_attentions


class CVPT(Method):
    """Image tokens attend to a block's prompts through the weights of its attention.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        dropout: Dropout on prompt values, drawn for every image anew.

    Attributes:
        prompts: [blocks, num_tokens, width], U(-v, v) with v = sqrt(6 / ((blocks + num_tokens) * width)):
            Xavier's rule on the tensor of all blocks, as in the released code.

    Raises:
        UserError: A number lies outside its range.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset({Place.BETWEEN})

    def __init__(self, backbone: Geometry, num_tokens: int = 10, dropout: float = 0.1) -> None:
        super().__init__(backbone)
        check_size("num_tokens", num_tokens)
        check_probability("dropout", dropout)
        self.dropout = nn.Dropout(dropout)
        self.prompts = nn.Parameter(torch.empty(self.num_blocks, num_tokens, backbone.width))
        nn.init.xavier_uniform_(self.prompts)
        # in a tuple, so that torch does not register the backbone's parameters as this method's
        self._attentions: tuple[Attention, ...] = ()
        self.frozen_rows: Tensor | None
        self.register_buffer("frozen_rows", None, persistent=False)

    def attach(self, backbone: Geometry) -> None:
        """Keep every block's attention, whose frozen weights the prompts are read through."""
        self._attentions = plain_attentions(backbone, "cvpt", "it reads its prompts through")

    @torch.no_grad()
    def freeze(self) -> None:
        """Project the prompts of every block once."""
        rows = [torch.stack(self._keys_values(block, 1)) for block in range(self.num_blocks)]
        self.frozen_rows = torch.stack(rows)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return CA(x, P_i) of the residual stream x [B, n, width] after the attention of a block."""
        return self._attend(block, x, *self._keys_values(block, x.shape[0]), None)

    @classmethod
    def branches(
        cls,
        methods: Sequence[tuple[Method, int]],
        place: Place,
        block: int,
        x: Tensor,
        normed: Tensor | None,
    ) -> Tensor:
        """Return CA(x, P_i) in one attention, in which the places that prompts do not fill are hidden."""
        first = cast(CVPT, methods[0][0])
        if len(methods) == 1:
            return first.branch(place, block, x, normed)
        rows = [cast(CVPT, method)._keys_values(block, 1) for method, _ in methods]
        counts = [k.shape[2] for k, _ in rows]
        sizes = torch.tensor([size for _, size in methods], device=x.device)
        k, v = (
            torch.cat(
                [F.pad(part, (0, 0, 0, max(counts) - part.shape[2])) for part in parts]
            ).repeat_interleave(sizes, dim=0)
            for parts in zip(*rows, strict=True)
        )
        lengths = torch.tensor(counts, device=x.device).repeat_interleave(sizes)
        present = torch.arange(max(counts), device=x.device) < lengths[:, None]
        return first._attend(block, x, k, v, present[:, None, None])

    def _keys_values(self, block: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a block's prompts, each [1 or B, heads, p, head_dim]."""
        if self.frozen_rows is not None:
            k, v = self.frozen_rows[block]
            return k, v
        prompts = drop(self.dropout, self.prompts[block].unsqueeze(0), batch_size)
        k, v = keys_values(self._attentions[block], prompts)
        return k.to(v.dtype), v

    def _attend(self, block: int, x: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
        """Return what tokens x [B, n, width] read from keys and values through a block's attention."""
        attn = self._attentions[block]
        # the joint projection's first rows are those of the queries
        bias = None if attn.qkv.bias is None else attn.qkv.bias[: attn.attn_dim]
        (q,) = split_heads(attn, F.linear(x, attn.qkv.weight[: attn.attn_dim], bias))
        k, v = (part.expand(x.shape[0], -1, -1, -1) for part in (k, v))
        out = F.scaled_dot_product_attention(attn.q_norm(q), k, v, attn_mask=present, scale=attn.scale)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(x).sigmoid()
        return cast(Tensor, attn.proj(out))
