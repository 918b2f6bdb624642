"""A map of prompts over the patches.

Pei et al., SA2VP: Spatially Aligned-and-Adapted Visual Prompt, AAAI 2024.

A second sequence P of as many tokens as the image's (one for each patch, one for the class token) runs
through the same frozen blocks L_i beside the image's sequence X; in every block one of the two reads the
other:

    P_0 = A W + b + positions                                 A [n, r], W [r, d]
    blocks 0, 4, 8, ...:  P_{i+1} = L_i(P_i) [+ g_i * L_i(A_i W_i + b_i), not in block 0] + scale * F_i(P_i,
    X_i)
                          X_{i+1} = L_i(X_i)
    other blocks:         X_{i+1} = L_i(X_i) + scale * F_i(X_i, P_i);    P_{i+1} = L_i(P_i)
    F_i(a, b) = MLP_i(LN_i(a + CA_i(LN1_i(a), LN1_i(b))))            MLP_i: d -> r, GELU, r -> d

LN1_i and the projections of CA_i are the block's own norm and attention, frozen. In CA_i a patch of a attends
to the 3 x 3 patches of b around its own place (fewer at the border), the class token to all tokens of b. A,
A_i, W, W_i, b, b_i, g_i [d], LN_i, MLP_i and the head are tuned. With probabilities of the head on X's class
token and on P's,

    loss = (1 - prompt_weight) * cross-entropy(X) + prompt_weight * cross-entropy(P);   a prediction reads X
    alone.

Taken from the released code's slower form (`vit_tinypara`, the one that its script trains); its faster one
gives the cross attention one head and lets patches at the border attend to zeros. Different from both: the
frozen blocks' own dropout (0.1 there, in training) is off, as everywhere here; the projections are the
attention itself, which holds the same numbers once. Own choice where the released code has no such backbone:
register tokens are as class tokens, more than 12 blocks go on with every fourth, P_0 passes a norm before the
blocks as X_0 does, and other poolings read P as they read X.
"""

from typing import Any, ClassVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, Place, drop, split_heads
from visprompt.models.methods.adapters import check_probability

EVERY = 4  # blocks from one in which the prompts read the image to the next


class SA2VP(Method):
    """A map of prompts that runs beside the image, each reading the other.

    Args:
        backbone: The backbone whose grid, width and number of blocks shape the prompts.
        inner: Width of the stored map and of the small MLPs (r).
        scale: Factor on what one sequence reads of the other.
        prompt_weight: Share of the prompts' cross-entropy in the loss.
        dropout: Dropout on P_0, in the small MLPs and behind the cross attention.

    Attributes:
        maps: [1 + deep, tokens, inner], N(0, 0.02^2), cut at +-2; A, then the A_i.
        lift: [1 + deep, width, inner], Xavier-uniform, and `lift_bias`, N(0, 1e-6^2); W and b.
        gates: [deep, width], N(0, 0.02^2); g. None where there is no block 4.
        norm_weight: [blocks, width], 1, and `norm_bias`, 0; LN_i.
        down: [blocks, inner, width] and `up` [blocks, width, inner], Xavier-uniform; `down_bias`, `up_bias`,
            N(0, 1e-6^2); MLP_i.

    Raises:
        UserError: A number lies outside its range, or (`attach`) the blocks have no plain attention.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"tokens", "branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset({Place.AFTER})
    tokenwise: ClassVar[bool] = False
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
        if inner < 1:
            raise UserError(f"method.inner={inner} is no width: give at least 1")
        if scale <= 0:
            raise UserError(f"method.scale={scale} does not fit: give a number above 0")
        if not 0 <= prompt_weight <= 1:
            raise UserError(f"method.prompt_weight={prompt_weight} is not a share: give a number from 0 to 1")
        check_probability("dropout", dropout)
        if self.num_blocks % EVERY == 1:
            raise UserError(
                f"method sa2vp cannot work on this backbone: of its {self.num_blocks} blocks the last would "
                "have the "
                "prompts read the image, and nothing the prompts; choose a backbone of another depth"
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
        self._backbone: tuple[Any, ...] = ()  # in a tuple, so that its parameters stay the backbone's alone
        self._state: dict[
            str, Tensor
        ] = {}  # of the forward that runs: the prompts, and what the image reads of them

    def attach(self, backbone: Geometry) -> None:
        """Keep the backbone, whose blocks the prompts run through."""
        if any(type(getattr(block, "attn", None)) is not Attention for block in backbone.blocks):
            raise UserError(
                "method sa2vp cannot work on this backbone: image and prompts read each other through "
                "timm's plain "
                f"attention, and these blocks, of class {type(backbone.blocks[0]).__name__}, have another; "
                "choose a plain ViT"
            )
        self._backbone = (backbone,)

    def shift(self, block: int, x: Tensor) -> Tensor:
        """Take the prompts through this block too; the image's tokens [B, n, width] stay as they are."""
        if not block:
            (backbone,) = self._backbone
            first = backbone.model.norm_pre(self._lifted(0) + self._positions())
            self._state = {"prompts": drop(self.dropout, first, len(x))}
        prompts = self._state.pop("prompts").to(x.dtype)
        if block % EVERY:
            self._state["read"] = self.scale * self._read(block, x, prompts)
        if block + 1 < self.num_blocks or self._scores_prompts:
            self._state["prompts"] = self._next(block, x, prompts)
        return x

    def _next(self, block: int, x: Tensor, prompts: Tensor) -> Tensor:
        """P_{i+1} of X_i and P_i."""
        (backbone,) = self._backbone
        out: Tensor = backbone.carry(block, prompts, prompts.shape[1])
        if block % EVERY:
            return out
        if block:
            deep = self._lifted(block // EVERY).to(x.dtype)
            out = out + cast(Tensor, self.gates)[block // EVERY - 1] * backbone.carry(
                block, deep, deep.shape[1]
            )
        return out + self.scale * self._read(block, prompts, x)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return what the image reads of the prompts, [B, n, width].

        X holds all its tokens, or those before the patches.
        """
        read = self._state.pop("read", None)
        return torch.zeros_like(x) if read is None else read[:, : x.shape[1]]

    def losses(self, task_loss: Tensor, head: nn.Module, labels: Tensor, weights: Tensor) -> Tensor:
        """Mix the cross-entropies [B] with those of the head on the prompts."""
        prompts = self._state.pop("prompts", None)
        if prompts is None or not self.prompt_weight:
            return task_loss
        (backbone,) = self._backbone
        rows, _ = backbone.pooled_rows(prompts.shape[1], None)
        dtype = next(backbone.parameters()).dtype
        logits = head(
            backbone.pool(prompts[:, rows].to(dtype), None).to(next(head.parameters()).dtype)
        ).float()
        own = F.cross_entropy(logits.expand(len(labels), -1), labels, reduction="none")
        return (1 - self.prompt_weight) * task_loss + self.prompt_weight * own

    @property
    def _scores_prompts(self) -> bool:
        """Whether the loss of the forward that runs reads the prompts behind the last block."""
        return self.training and torch.is_grad_enabled() and self.prompt_weight > 0

    def _lifted(self, index: int) -> Tensor:
        """Return a map of prompts, [1, n, width]."""
        return F.linear(self.maps[index], self.lift[index], self.lift_bias[index])[None]

    def _positions(self) -> Tensor:
        """Position embeddings of all tokens, [1, n, width]; zero for tokens that have none."""
        (backbone,) = self._backbone
        model = backbone.model
        if model.pos_embed is None:
            return self.maps.new_zeros(())
        missing = (
            self.maps.shape[1] - model.pos_embed.shape[1]
        )  # of class or register tokens without positions
        return F.pad(model.pos_embed, (0, 0, missing, 0))

    def _read(self, index: int, reader: Tensor, source: Tensor) -> Tensor:
        """F_i of the tokens that read and those that are read, [1 or B, n, width] each."""
        (backbone,) = self._backbone
        block = backbone.blocks[index]
        attn, (q_in, kv_in) = block.attn, (block.norm1(reader), block.norm1(source))
        q, _, _ = split_heads(attn, attn.qkv(q_in))
        _, k, v = split_heads(attn, attn.qkv(kv_in))
        batch = max(len(reader), len(source))
        q, k, v = (part.to(v.dtype).expand(batch, -1, -1, -1) for part in (attn.q_norm(q), attn.k_norm(k), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.near, scale=attn.scale)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(q_in).sigmoid()
        # not by the layer itself: whoever records what a block projects means the block's own attention
        out = reader + self.dropout(F.linear(out, attn.proj.weight, attn.proj.bias))
        scale, shift = (parameter[index].to(out.dtype) for parameter in (self.norm_weight, self.norm_bias))
        out = F.layer_norm(out, out.shape[-1:], scale, shift, 1e-6)
        hidden = self.dropout(F.gelu(_linear(out, self.down[index], self.down_bias[index])))
        return self.dropout(_linear(hidden, self.up[index], self.up_bias[index]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b, in the type of x where the backbone is in 16 bits throughout."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _linears(count: int, width: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weights [count, out, width], each by Xavier's rule, and biases [count, out] that are nearly zero."""
    weight = torch.empty(count, out, width)
    for one in weight:
        nn.init.xavier_uniform_(one)
    return nn.Parameter(weight), nn.Parameter(1e-6 * torch.randn(count, out))


def _neighbours(prefix: int, height: int, width: int) -> Tensor:
    """Return which tokens [n] a token [n] reads.

    The patches around its own place, or all before the patches.
    """
    rows, columns = (torch.arange(height * width) // width, torch.arange(height * width) % width)
    close = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    return F.pad(F.pad(close, (prefix, 0)), (0, 0, prefix, 0), value=True)
