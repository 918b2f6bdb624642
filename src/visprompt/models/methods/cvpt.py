"""Cross visual prompt tuning. Huang et al., CVPT: Cross Visual Prompt Tuning, ICCV 2025.

Between the attention and the MLP of block i: x <- x + CA(x, P_i), where the queries come from the image
tokens x, keys and values from the prompts P_i. Prompts never enter the sequence, so a token's cost is linear
in their number. CA's projections are copies of that block's attention and stay frozen ("weight sharing");
only the prompts and the head are tuned. There is no norm before CA and nothing that starts at zero: it does
not start equal to the backbone.

Different from the released code: the copies are the attention itself, which holds the same numbers once; a
block's query and key norm apply where there are any; the frozen backbone's stochastic depth (0.1 there) is
off.
"""

from typing import ClassVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, Place, drop, split_heads
from visprompt.models.methods.adapters import check_probability


class CVPT(Method):
    """Image tokens read a block's prompts through a copy of its attention.

    Args:
        backbone: The backbone whose width and number of blocks shape the prompts.
        num_tokens: Prompt tokens of a block (p).
        dropout: Dropout on prompt values, drawn for every image anew.

    Attributes:
        prompts: [blocks, num_tokens, width], U(-v, v) with v = sqrt(6 / ((blocks + num_tokens) * width)) (the
            released code's: Xavier's rule on the tensor of all blocks).

    Raises:
        UserError: A number lies outside its range.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset({Place.BETWEEN})

    def __init__(self, backbone: Geometry, num_tokens: int = 10, dropout: float = 0.1) -> None:
        super().__init__(backbone)
        if num_tokens < 1:
            raise UserError(
                f"method.num_tokens={num_tokens} is too small: give at least 1, or use method=linear"
            )
        check_probability("dropout", dropout)
        self.dropout = nn.Dropout(dropout)
        self.prompts = nn.Parameter(torch.empty(self.num_blocks, num_tokens, backbone.width))
        nn.init.xavier_uniform_(self.prompts)
        self._attentions: tuple[
            Attention, ...
        ] = ()  # in a tuple, so that their parameters stay the backbone's alone

    def attach(self, backbone: Geometry) -> None:
        """Keep every block's attention, whose frozen weights the prompts are read through."""
        attentions = [getattr(block, "attn", None) for block in backbone.blocks]
        if any(type(attention) is not Attention for attention in attentions):
            raise UserError(
                "method cvpt cannot work on this backbone: it reads its prompts through timm's plain "
                "attention, and "
                f"these blocks, of class {type(backbone.blocks[0]).__name__}, have another; choose a plain "
                "ViT"
            )
        self._attentions = tuple(cast(list[Attention], attentions))

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """CA(x, P_i) of the stream x [B, n, width] behind the attention of a block."""
        attn, prompts = self._attentions[block], drop(self.dropout, self.prompts[block].unsqueeze(0), len(x))
        # rows of the joint projection: first the queries', then those of the keys and the values
        sizes = [attn.attn_dim, 2 * attn.attn_dim]
        q_weight, kv_weight = attn.qkv.weight.split(sizes)
        q_bias, kv_bias = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(sizes)
        (q,) = split_heads(attn, F.linear(x, q_weight, q_bias))
        k, v = split_heads(attn, F.linear(prompts, kv_weight, kv_bias))
        k, v = (part.to(v.dtype).expand(len(x), -1, -1, -1) for part in (attn.k_norm(k), v))
        out = F.scaled_dot_product_attention(attn.q_norm(q), k, v, scale=attn.scale)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(x).sigmoid()
        return cast(Tensor, attn.proj(out))
