"""A map of prompts over the patches.

Pei et al., SA2VP: Spatially Aligned-and-Adapted Visual Prompt, AAAI 2024.

A second sequence P, with as many tokens as the image's sequence X (one for each patch, one for the class
token), runs through the same frozen blocks L_i. In every block, one of the two attends to the other:

    P_0 = A W + b + positions                                        A [n, r], W [r, d]
    blocks 0, 4, 8, ...:  P_{i+1} = L_i(P_i) + D_i + scale * F_i(P_i, X_i);    X_{i+1} = L_i(X_i)
                          D_0 = 0, else D_i = g_i * L_i(A_i W_i + b_i)
    other blocks:         X_{i+1} = L_i(X_i) + scale * F_i(X_i, P_i);          P_{i+1} = L_i(P_i)
    F_i(a, b) = MLP_i(LN_i(a + CA_i(LN1_i(a), LN1_i(b))))            MLP_i: d -> r, GELU, r -> d

LN1_i and the projections of the cross-attention CA_i are the block's frozen norm and attention. In CA_i a
patch of a attends to the 3 x 3 patches of b around its position (fewer at the border), the class token to all
tokens of b. A, A_i, W, W_i, b, b_i, g_i [d], LN_i, MLP_i and the head are tuned. The head classifies both the
features of X and those of P:

    loss = (1 - prompt_weight) * cross-entropy(X) + prompt_weight * cross-entropy(P)

Prediction uses X alone.

Taken from the slower form of the released code (`vit_tinypara`, which its script trains); its faster form has
one head in the cross-attention and lets patches at the border attend to zeros. Different from both: the
dropout of the frozen blocks (0.1 there, in training) is off, as everywhere here; the projections are not
copied from the attention, the attention itself is used. Where the released code supports no such backbone,
this is our choice: register tokens are treated like class tokens; with more than 12 blocks every fourth goes
on reading X; P_0 passes a norm before the blocks if X_0 does; and other poolings read P as they read X.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, Place
from visprompt.models.layers import drop, split_heads
from visprompt.models.methods.checks import (
    check_least,
    check_probability,
    check_scale,
    check_share,
    plain_attentions,
)

EVERY = 4  # in every fourth block the prompts read the image; in the others the image reads the prompts


class SA2VP(Method):
    """A second sequence of prompts, one for each image token; image and prompts attend to each other.

    Args:
        backbone: The backbone whose grid, width and number of blocks shape the prompts.
        inner: Width of the stored map and of the small MLPs (r).
        scale: Factor on what one sequence adds to the other (F_i).
        prompt_weight: Share of the prompts' cross-entropy in the loss.
        dropout: Dropout on P_0, in the small MLPs and after the cross-attention.

    Attributes:
        maps: [1 + deep, tokens, inner], N(0, 0.02^2), truncated at +-2; A, then the A_i of blocks 4, 8, ....
        lift: [1 + deep, width, inner], Xavier-uniform, and `lift_bias`, N(0, 1e-6^2); W and b.
        gates: [deep, width], N(0, 0.02^2); g. None if there is no block 4.
        norm_weight: [blocks, width], 1 at first, and `norm_bias`, 0 at first; LN_i.
        down: [blocks, inner, width] and `up` [blocks, width, inner], Xavier-uniform; `down_bias`, `up_bias`,
            N(0, 1e-6^2); MLP_i.
        near: Which token attends to which in the cross-attention, bool [tokens, tokens].

    Raises:
        UserError: A number lies outside its range, or (`attach`) the blocks have no plain attention.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset({Place.AFTER})
    tokenwise: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = True
    fixed_size: bool = True

    near: Tensor

    def __init__(
        self,
        backbone: Geometry,
        inner: int = 16,
        scale: float = 0.1,
        prompt_weight: float = 0.2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(backbone)
        check_least(1, inner=inner)
        check_scale(scale)
        check_share("prompt_weight", prompt_weight)
        check_probability("dropout", dropout)
        if self.num_blocks % EVERY == 1:
            raise UserError(
                f"method sa2vp cannot work on this backbone: in the last of its {self.num_blocks} blocks the "
                "prompts would read the image, and no block after it would read the prompts; choose a "
                "backbone of another depth"
            )
        self.scale, self.prompt_weight, self.dropout = scale, prompt_weight, nn.Dropout(dropout)
        blocks, width, height = self.num_blocks, backbone.width, backbone.grids[0][0]
        deep = (blocks - 1) // EVERY
        tokens = backbone.num_prefix + height * backbone.grids[0][1]
        self.maps = nn.Parameter(nn.init.trunc_normal_(torch.empty(1 + deep, tokens, inner), std=0.02))
        self.lift, self.lift_bias = _linears(1 + deep, inner, width)
        self.gates = nn.Parameter(0.02 * torch.randn(deep, width)) if deep else None
        self.norm_weight = nn.Parameter(torch.ones(blocks, width))
        self.norm_bias = nn.Parameter(torch.zeros(blocks, width))
        self.down, self.down_bias = _linears(blocks, width, inner)
        self.up, self.up_bias = _linears(blocks, inner, width)
        self.register_buffer("near", _neighbours(backbone.num_prefix, *backbone.grids[0]), persistent=False)
        # in a tuple, so that torch does not register the backbone's parameters as this method's
        self._backbone: tuple[Any, ...] = ()
        # of the current forward: "prompts" P_i, and "read", what the image gets from them in this block
        self._state: dict[str, Tensor] = {}

    def attach(self, backbone: Geometry) -> None:
        """Keep the backbone: the prompts run through its blocks."""
        plain_attentions(backbone, "sa2vp", "image and prompts read each other through")
        self._backbone = (backbone,)

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Run the prompts through this block too; return the image's tokens [B, n, width] unchanged."""
        if not block:
            (backbone,) = self._backbone
            first = backbone.model.norm_pre(self._lifted(0) + self._positions())
            self._state = {"prompts": drop(self.dropout, first, x.shape[0])}
        prompts = self._state.pop("prompts").to(x.dtype)
        if block % EVERY:
            self._state["read"] = self.scale * self._read(block, x, prompts)
        if block + 1 < self.num_blocks or self._scores_prompts:
            self._state["prompts"] = self._next(block, x, prompts)
        return x

    def _next(self, block: int, x: Tensor, prompts: Tensor) -> Tensor:
        """Return P_{i+1} from X_i and P_i."""
        (backbone,) = self._backbone
        out: Tensor = backbone.carry(block, prompts, prompts.shape[1])
        if block % EVERY:
            return out
        if block:
            deep = self._lifted(block // EVERY).to(x.dtype)
            gate = cast(Tensor, self.gates)[block // EVERY - 1]
            out = out + gate * backbone.carry(block, deep, deep.shape[1])
        return out + self.scale * self._read(block, prompts, x)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return scale * F_i(X_i, P_i) [B, n, width] for x: all image tokens, or those before the patches."""
        read = self._state.pop("read", None)
        return torch.zeros_like(x) if read is None else read[:, : x.shape[1]]

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Mix the cross-entropies [B] with those of the head on the prompts."""
        prompts = self._state.pop("prompts", None)
        if prompts is None or not self.prompt_weight:
            return task_loss
        (backbone,) = self._backbone
        rows, _ = backbone.pooled_rows(prompts.shape[1], None)
        # the type of the head, not of autocast, in which frozen weights may be
        features = backbone.pool(prompts[:, rows].to(next(head.parameters()).dtype), None)
        logits = head(features).float()
        prompt_loss = F.cross_entropy(logits.expand(len(labels), -1), labels, reduction="none")
        return (1 - self.prompt_weight) * task_loss + self.prompt_weight * prompt_loss

    @property
    def exact_modules(self) -> Iterable[nn.Module]:
        """The attention that pools, if the backbone has one; the loss pools the prompts with it."""
        (backbone,) = self._backbone
        pooling = getattr(backbone.model, "attn_pool", None)
        return [] if pooling is None else [pooling]

    @property
    def _scores_prompts(self) -> bool:
        """Whether the loss of the current forward reads the prompts after the last block."""
        return self.training and torch.is_grad_enabled() and self.prompt_weight > 0

    def _lifted(self, index: int) -> Tensor:
        """Return a map of prompts A W + b, [1, n, width]."""
        return F.linear(self.maps[index], self.lift[index], self.lift_bias[index])[None]

    def _positions(self) -> Tensor:
        """Return the position embeddings of all tokens, [1, n, width]; zero for tokens without one."""
        (backbone,) = self._backbone
        model = backbone.model
        if model.pos_embed is None:
            return self.maps.new_zeros(())
        missing = self.maps.shape[1] - model.pos_embed.shape[1]  # class or register tokens without positions
        return F.pad(model.pos_embed, (0, 0, missing, 0))

    def _read(self, index: int, reader: Tensor, source: Tensor) -> Tensor:
        """Return F_i(reader, source) of block `index`, where both are [1 or B, n, width]."""
        (backbone,) = self._backbone
        block = backbone.blocks[index]
        attn, (q_in, kv_in) = block.attn, (block.norm1(reader), block.norm1(source))
        q, _, _ = split_heads(attn, attn.qkv(q_in))
        _, k, v = split_heads(attn, attn.qkv(kv_in))
        batch = max(reader.shape[0], source.shape[0])
        q, k, v = (part.to(v.dtype).expand(batch, -1, -1, -1) for part in (attn.q_norm(q), attn.k_norm(k), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.near, scale=attn.scale)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(q_in).sigmoid()
        # F.linear and not attn.proj: hooks on that layer should see the block's attention only
        out = reader + self.dropout(F.linear(out, attn.proj.weight, attn.proj.bias))
        scale, shift = (parameter[index].to(out.dtype) for parameter in (self.norm_weight, self.norm_bias))
        out = F.layer_norm(out, out.shape[-1:], scale, shift, 1e-6)
        hidden = self.dropout(F.gelu(_linear(out, self.down[index], self.down_bias[index])))
        return self.dropout(_linear(hidden, self.up[index], self.up_bias[index]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b in the dtype of x, which is a 16-bit one if the whole backbone is."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _linears(count: int, width: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Draw weights [count, out, width], each by Xavier's rule, and biases [count, out] from N(0, 1e-6^2)."""
    weights = torch.empty(count, out, width)
    for weight in weights:
        nn.init.xavier_uniform_(weight)
    return nn.Parameter(weights), nn.Parameter(1e-6 * torch.randn(count, out))


def _neighbours(prefix: int, height: int, width: int) -> Tensor:
    """Return which token attends to which, bool [n, n]: a patch to the 3 x 3 around it, others to all."""
    rows, columns = (torch.arange(height * width) // width, torch.arange(height * width) % width)
    close = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    return F.pad(F.pad(close, (prefix, 0)), (0, 0, prefix, 0), value=True)
