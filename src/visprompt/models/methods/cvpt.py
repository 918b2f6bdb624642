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

from typing import ClassVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.contract import Geometry, Method, Place
from visprompt.models.layers import drop, split_heads
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

    def attach(self, backbone: Geometry) -> None:
        """Keep every block's attention, whose frozen weights the prompts are read through."""
        self._attentions = plain_attentions(backbone, "cvpt", "it reads its prompts through")

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return CA(x, P_i) of the residual stream x [B, n, width] after the attention of a block."""
        attn, prompts = self._attentions[block], drop(self.dropout, self.prompts[block].unsqueeze(0), len(x))
        # rows of the joint projection: those of the queries come first, then those of the keys and the values
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
