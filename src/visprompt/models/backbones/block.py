"""The forward of timm's residual blocks, rewritten so that a method can enter and unread outputs are skipped.

Often only some outputs of a block are read: if the next block drops or replaces the prompts, their outputs
are not read; if the pooling takes the class token, no other output of the last block is. Tokens whose outputs
are not read only give keys and values, K = LN(P) W_k + b_k and V = LN(P) W_v + b_v. Their queries, attention,
projection and MLP are not computed; logits and gradients stay the same. For prompts that all images share
([1, p, width]) keys and values are computed once per step, not once per image.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers import Attention, GluMlp, LayerNorm, Mlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.contract import Method, Place
from visprompt.models.layers import Wrapped, keys_values, split_heads

_TOKENWISE_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm)
_TOKENWISE_MLPS = (Mlp, GluMlp, SwiGLU)


def is_proven(
    block: Any, block_class: type[nn.Module] = Block, attentions: Sequence[type[nn.Module]] = (Attention,)
) -> bool:
    """Return whether `run_block` computes exactly what this block computes.

    Classes must match exactly: a subclass may have another forward. Everything outside the attention must
    work token by token.

    Args:
        block: Any block.
        block_class: The class it must have.
        attentions: Classes that its `attn` may have: those whose forward the family's attention reproduces.
    """
    actual: type[nn.Module] = type(block)
    return (
        actual is block_class
        and type(block.attn) in attentions
        and type(_unwrapped(block.norm1)) in _TOKENWISE_NORMS
        and type(_unwrapped(block.norm2)) in _TOKENWISE_NORMS
        and type(block.mlp) in _TOKENWISE_MLPS
        and bool(block.attn.attn_drop.p == 0 or not block.attn.training)
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    return _unwrapped(module.base) if isinstance(module, Wrapped) else module


Rows = tuple[Tensor, Tensor]  # of keys and of values, each [heads, t, head_dim] or [B, heads, t, head_dim]
Attend = Callable[[Any, Tensor, Sequence[Tensor], Rows | None, Tensor | None], Tensor]


def run_block(
    block: Any,
    read: Tensor,
    context: Sequence[Tensor],
    attend: Attend,
    rows: Rows | None = None,
    mask: Tensor | None = None,
    method: Method | None = None,
    index: int = 0,
) -> Tensor:
    """Return the outputs of a block x + Attention(LN(x)), then + MLP(LN(x)), for some of its tokens.

    Args:
        block: A block of a proven class.
        read: Tokens whose outputs are read, [B, n, width].
        context: The other tokens of the sequence, in any number of parts [B or 1, m, width]; they give keys
            and values only.
        attend: The family's attention: (attn, normed read, normed context, rows, mask) -> [B, n, width].
        rows: The method's keys and values.
        mask: Which keys an image has, bool [B, keys] in the order read, context, rows; None for all.
        method: Gives branches; None for a block without any.
        index: Index of the block, for the method.

    Returns:
        The block's outputs for `read`, [B, n, width]; without rows, mask and method equal to those of
        `block(cat([read, *context]))[:, :n]`.
    """
    places = method.places if method else frozenset()

    def branch(place: Place, x: Tensor, normed: Tensor | None = None) -> Tensor | float:
        return method.branch(place, index, x, normed) if method and place in places else 0.0

    normed = block.norm1(read)
    attended = attend(block.attn, normed, [block.norm1(part) for part in context], rows, mask)
    read = read + block.drop_path1(_scaled(block, 1, attended)) + branch(Place.ATTENTION, read, normed)
    read = read + branch(Place.BETWEEN, read)
    normed = block.norm2(read)
    out = block.mlp(normed)
    out = out + branch(Place.OUTPUT, out)
    read = read + block.drop_path2(_scaled(block, 2, out)) + branch(Place.MLP, read, normed)
    return read + branch(Place.AFTER, read)


def _scaled(block: Any, which: int, x: Tensor) -> Tensor:
    """Apply a layer scale: `ls1` in ViT, a vector `gamma_1` or None in EVA; Swin does not have one."""
    if hasattr(block, f"ls{which}"):
        return cast(Tensor, getattr(block, f"ls{which}")(x))
    gamma = getattr(block, f"gamma_{which}", None)
    return x if gamma is None else gamma * x


def attend(
    attn: Attention, read: Tensor, context: Sequence[Tensor], rows: Rows | None, mask: Tensor | None = None
) -> Tensor:
    """Return the attention of a plain ViT block.

    Args:
        attn: The block's attention.
        read: Normed tokens that give queries, keys and values, [B, n, width].
        context: Normed tokens that give keys and values only, [B or 1, m, width].
        rows: The method's keys and values, each [heads, t, head_dim] or [B, heads, t, head_dim].
        mask: Which keys an image has, bool [B, keys]; None for all.

    Returns:
        [B, n, width].
    """
    q, k, v = split_heads(attn, attn.qkv(read))
    keys, values = [attn.k_norm(k)], [v]
    for part in context:
        part_k, part_v = keys_values(attn, part)
        keys.append(part_k)
        values.append(part_v)
    return combine(attn, read, attn.q_norm(q), keys, values, rows, mask)


def combine(
    attn: Any,
    read: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Rows | None,
    mask: Tensor | None,
) -> Tensor:
    """Return the output of a timm attention from its queries, keys and values.

    Args:
        attn: The attention; its `scale`, `norm`, `gate`, `proj` and `proj_drop` are used.
        read: The normed tokens of the queries, [B, n, width].
        q: Queries, [B, heads, n, head_dim].
        keys: Keys in any number of parts, each [B or 1, heads, m, head_dim].
        values: Values in the same parts.
        rows: The method's keys and values, each [heads, t, head_dim] or [B, heads, t, head_dim].
        mask: Which keys an image has, bool [B, keys]; None for all.

    Returns:
        [B, n, width].
    """
    if rows:
        keys, values = [*keys, _for_images(rows[0])], [*values, _for_images(rows[1])]
    dtype, size = values[0].dtype, (read.shape[0], -1, -1, -1)
    all_keys, all_values = (
        _joined([part.to(dtype).expand(size) for part in parts]) for parts in (keys, values)
    )
    shown = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=shown, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(read).sigmoid()
    return cast(Tensor, attn.proj_drop(attn.proj(out)))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return keys or values as one tensor; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _for_images(rows: Tensor) -> Tensor:
    """Return rows that all images share as [1, heads, t, head_dim]."""
    return rows if rows.ndim == 4 else rows[None]
