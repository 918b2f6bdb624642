"""timm's residual blocks, re-driven so that only what is read is computed and a method can enter.

A block's output is read only for some of its tokens: where the next block drops or replaces the prompts,
their outputs are not read; where the pooling takes the class token, the last block's outputs of all other
tokens are not. Tokens that are not read serve as keys and values only: K = LN(P) W_k + b_k, V = LN(P) W_v +
b_v. Their queries, attention, projection and MLP are left out, with the same logits and gradients. Prompts
that all images share ([1, p, width]) give their keys and values once per step, not once per image.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers import Attention, GluMlp, LayerNorm, Mlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.contract import Method, Place, Wrapped, split_heads

_TOKENWISE_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm)
_TOKENWISE_MLPS = (Mlp, GluMlp, SwiGLU)


def is_proven(
    block: Any, own: type[nn.Module] = Block, attentions: Sequence[type[nn.Module]] = (Attention,)
) -> bool:
    """Return whether `run_block` computes exactly what this block computes.

    Exact classes, not subclasses: a subclass may have changed its forward. Everything outside the attention
    must work token by token.

    Args:
        block: Any.
        own: The class it must have.
        attentions: The classes its `attn` may have: those that the family's attention equals.
    """
    kind: type[nn.Module] = type(block)
    return (
        kind is own
        and type(block.attn) in attentions
        and type(_inside(block.norm1)) in _TOKENWISE_NORMS
        and type(_inside(block.norm2)) in _TOKENWISE_NORMS
        and type(block.mlp) in _TOKENWISE_MLPS
        and bool(block.attn.attn_drop.p == 0 or not block.attn.training)
    )


def _inside(module: nn.Module) -> nn.Module:
    return _inside(module.base) if isinstance(module, Wrapped) else module


Rows = tuple[Tensor, Tensor]  # of keys and of values, each [heads, t, head_dim]
Attend = Callable[[Any, Tensor, Sequence[Tensor], Rows | None], Tensor]


def run_block(
    block: Any,
    read: Tensor,
    context: Sequence[Tensor],
    attend: Attend,
    method: Method | None = None,
    index: int = 0,
) -> Tensor:
    """Return outputs of a block x + Attention(LN(x)), then + MLP(LN(x)), for some of its tokens.

    Args:
        block: A block whose class its family has proven.
        read: Tokens whose outputs are read, [B, n, width].
        context: The other tokens of the sequence, in any number of parts [B or 1, m, width]; they give keys
            and values only.
        attend: The family's attention: of the block's `attn`, the normed tokens, the normed context and the
            method's rows.
        method: Asked for rows of keys and values and for branches; None asks nobody.
        index: Of the block, for the method.

    Returns:
        The block's outputs for `read`, [B, n, width]; without a method equal to those of
        `block(cat([read, *context]))[:, :n]`.
    """
    places = method.places if method else frozenset()

    def branch(place: Place, x: Tensor, normed: Tensor | None = None) -> Tensor | float:
        return method.branch(place, index, x, normed) if method and place in places else 0.0

    normed = block.norm1(read)
    rows = method.keys_values(index) if method else None
    attended = attend(block.attn, normed, [block.norm1(part) for part in context], rows)
    read = read + block.drop_path1(_scaled(block, 1, attended)) + branch(Place.ATTENTION, read, normed)
    read = read + branch(Place.BETWEEN, read)
    normed = block.norm2(read)
    out = block.mlp(normed)
    out = out + branch(Place.OUTPUT, out)
    read = read + block.drop_path2(_scaled(block, 2, out)) + branch(Place.MLP, read, normed)
    return read + branch(Place.AFTER, read)


def _scaled(block: Any, which: int, x: Tensor) -> Tensor:
    """Return a branch behind its layer scale.

    A module in a ViT's block, a vector or None in EVA's, nothing in Swin's.
    """
    if hasattr(block, f"ls{which}"):
        return cast(Tensor, getattr(block, f"ls{which}")(x))
    gamma = getattr(block, f"gamma_{which}", None)
    return x if gamma is None else gamma * x


def attend(attn: Attention, read: Tensor, context: Sequence[Tensor], rows: Rows | None) -> Tensor:
    """Return attention of a plain block.

    Of normed tokens [B, n, width] over themselves, the context and the method's rows.
    """
    q, k, v = split_heads(attn, attn.qkv(read))
    keys, values = [attn.k_norm(k)], [v]
    for part in context:
        part_k, part_v = _keys_values(attn, part)
        keys.append(attn.k_norm(part_k))
        values.append(part_v)
    return combine(attn, read, attn.q_norm(q), keys, values, rows)


def combine(
    attn: Any, read: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: Rows | None
) -> Tensor:
    """Return what an attention of timm makes of its queries, keys and values.

    Args:
        attn: Its `scale`, `norm`, `gate`, `proj` and `proj_drop` are used.
        read: The normed tokens that ask, [B, n, width].
        q: Their queries, [B, heads, n, head_dim].
        keys: In any number of parts, each [B or 1, heads, m, head_dim].
        values: Likewise.
        rows: The method's.

    Returns:
        [B, n, width].
    """
    if rows:
        keys, values = [*keys, rows[0][None]], [*values, rows[1][None]]
    dtype, size = values[0].dtype, (len(read), -1, -1, -1)
    all_keys, all_values = (
        torch.cat([p.to(dtype).expand(size) for p in parts], 2) for parts in (keys, values)
    )
    out = F.scaled_dot_product_attention(q, all_keys, all_values, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(read).sigmoid()
    return cast(Tensor, attn.proj_drop(attn.proj(out)))


def _keys_values(attn: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """Return keys and values of normed tokens that ask nothing, each [B, heads, n, head_dim]."""
    if type(attn.qkv) is not nn.Linear:
        return split_heads(attn, attn.qkv(x))[1:]
    # rows [width:] of the joint projection are those of the keys and the values
    bias = None if attn.qkv.bias is None else attn.qkv.bias[attn.attn_dim :]
    return split_heads(attn, F.linear(x, attn.qkv.weight[attn.attn_dim :], bias))
