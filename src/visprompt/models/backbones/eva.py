"""Vision transformers with rotary positions, timm's class Eva.

EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2.

The attention rotates the queries and keys of each patch by angles that encode its position. Class and
register tokens are not rotated, and neither are prompts: their rows of sines are 0 and of cosines 1. So one
table of rotations, [tokens, 2 * head_dim], serves the whole sequence, with prompts after the image tokens as
in every family.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.backbones.block import Rows, combine, is_proven
from visprompt.models.backbones.family import side_of
from visprompt.models.backbones.vit import ViT
from visprompt.models.contract import Method
from visprompt.models.layers import split_heads

_Out = TypeVar("_Out")


class EVA(ViT):
    """A timm `Eva` without its head.

    Args:
        model: Any `Eva`: rotary positions of any kind, absolute ones or both; norms before or after the
            attention and the MLP.
        exact: False computes the prompt tokens' outputs in every block, as the papers' codes do; for
            comparison.

    Raises:
        UserError: The model is of another class, or has no pooling.
    """

    model_class = Eva
    model: Eva  # type: ignore[assignment]  # has all attributes that ViT needs, but no common base class

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        super().__init__(model, exact)
        self._current_rotations: Tensor | None = None  # of the images in the current forward
        blocks: list[Any] = self.blocks
        for block in blocks:
            if getattr(block.attn, "q_bias", None) is not None:
                # makes timm call the joint projection instead of reading its weight: a method may wrap it
                block.attn.qkv_bias_separate = True

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether the block is of the class with norms before the attention and the MLP."""
        return is_proven(block, EvaBlock, (EvaAttention, AttentionRope))

    def forward(self, images: Tensor, method: Method) -> Tensor:
        """Return pooled features [B, width] of normalised images [B, 3, H, W]."""
        x, rotations, _ = self._begin(images, method)
        return self._with_rotations(rotations, partial(super().from_block, 0, x, method))

    def run(self, images: Tensor, method: Method, pooled: Callable[[int], tuple[slice, bool]]) -> Tensor:
        """Run all blocks on normalised images [B, 3, H, W]; see `through`."""
        x, rotations, _ = self._begin(images, method)
        return self._with_rotations(rotations, partial(self.through, 0, x, method, pooled))

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return image tokens [B, n, width] before the first block; class and register tokens come first.

        Raises:
            UserError: The grid of patches cannot be inferred from the number of tokens.
        """
        x, _, grid = self._begin(images, method)
        self._check_grid(grid)
        return x

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Return image tokens before block `stop`, which nothing tuned affects: stop <= method.first_block.

        Raises:
            UserError: As `embed`.
        """
        x, rotations, grid = self._begin(images, method)
        self._check_grid(grid)

        def blocks() -> Tensor:
            tokens = x
            for i in range(stop):
                tokens = self.carry(i, tokens, tokens.shape[1])
            return tokens

        return self._with_rotations(rotations, blocks)

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Return pooled features [B, width] of image tokens [B, n, width] before block `start`."""
        rotations = self._rotations(x.shape[1])
        return self._with_rotations(rotations, partial(super().from_block, start, x, method))

    def maps_from(
        self, start: int, x: Tensor, method: Method, blocks: Sequence[int], normed: bool
    ) -> list[Tensor]:
        """Return the maps of blocks from image tokens [B, n, width] before block `start`."""
        run = partial(super().maps_from, start, x, method, blocks, normed)
        return self._with_rotations(self._rotations(x.shape[1]), run)

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a block; tokens that are not read give keys and values only."""
        rotations = self._all_rotations(index, num_image, x.shape[1])
        around = (slice(0, rows.start), slice(rows.stop, x.shape[1]))
        unread = [part for part in around if part.start < part.stop]
        context = [x[:, part] for part in unread]
        context_rotations = [_select(rotations, part) for part in unread]
        if entering is not None:
            context, context_rotations = [*context, entering], [*context_rotations, None]
        attend = partial(_attend, _select(rotations, rows), context_rotations)
        mask = self.mask(index, x, num_image, rows, entering, method)
        return self.step(index, x[:, rows], context, attend, mask, method)

    def keys_values(self, index: int, prompts: Tensor) -> Rows:
        """Return the keys and values, without positions, that prompts give in a block."""
        block: Any = self.model.blocks[index]
        return _keys_values(block.attn, block.norm1(prompts))

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run timm's block on all tokens."""
        rotations = self._all_rotations(index, num_image, x.shape[1])
        # without the rows of the prefix tokens, which timm does not rotate
        without_prefix = _select(rotations, slice(self.num_prefix, None))
        return cast(Tensor, self.model.blocks[index](x, rope=without_prefix))

    def _pools_prefix(self) -> bool:
        """Return whether a pooling over tokens reads class and register tokens with the patches."""
        return self.model.attn_pool is not None

    def _begin(self, images: Tensor, method: Method) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Return image tokens before the first block, their rotations, and the grid of their patches."""
        self.check_size(images, method)
        model = self.model
        patches = model.patch_embed(method.pixels(images))
        grid = (patches.shape[1], patches.shape[2]) if model.dynamic_img_size else self.grids[0]
        x, rotations = model._pos_embed(patches)
        return model.norm_pre(x), _padded(rotations, self.num_prefix, 0), grid

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.model.rope is not None and side_of(math.prod(grid), self.grids[0]) != grid:
            raise UserError(
                f"images of {grid[0]} x {grid[1]} patches are not supported here, because the rotary "
                "positions are inferred from the number of tokens: give square images, or images of "
                f"{self.grids[0][0]} x {self.grids[0][1]} patches"
            )

    def _with_rotations(self, rotations: Tensor | None, run: Callable[[], _Out]) -> _Out:
        """Call `run`, whose blocks all use these rotations, computed once for the forward."""
        self._current_rotations = rotations
        try:
            return run()
        finally:
            self._current_rotations = None

    def _rotations(self, num_image: int) -> Tensor | None:
        """Return the rotations of image tokens, inferred from their number; equal to timm's `_pos_embed`."""
        rope: Any = self.model.rope
        if rope is None or not num_image:
            return None
        grid = side_of(num_image - self.num_prefix, self.grids[0])
        fixed = hasattr(rope, "feat_shape") and not self.model.dynamic_img_size
        return _padded(rope.get_embed() if fixed else rope.get_embed(shape=grid), self.num_prefix, 0)

    def _all_rotations(self, index: int, num_image: int, num_tokens: int) -> Tensor | None:
        """Return the sines and cosines of all tokens in a block, [..., num_tokens, 2 * head_dim]."""
        rotations = self._current_rotations
        if rotations is None:
            rotations = self._rotations(num_image)
        if rotations is not None and self.model.rope_mixed:  # one table for each block
            rotations = rotations[index]
        return _padded(rotations, 0, num_tokens - num_image)


def _padded(rotations: Tensor | None, before: int, after: int) -> Tensor | None:
    """Add rows of sine 0 and cosine 1, which rotate nothing, before and after a table of rotations."""
    if rotations is None or not before + after:
        return rotations
    sines, cosines = rotations.chunk(2, dim=-1)
    padding = (0, 0, before, after)
    return torch.cat([F.pad(sines, padding), F.pad(cosines, padding, value=1.0)], dim=-1)


def _select(rotations: Tensor | None, rows: slice) -> Tensor | None:
    return None if rotations is None else rotations[..., rows, :]


def _attend(
    read_rotations: Tensor | None,
    context_rotations: Sequence[Tensor | None],
    attn: EvaAttention | AttentionRope,
    read: Tensor,
    context: Sequence[Tensor],
    rows: Rows | None,
    mask: Tensor | None,
) -> Tensor:
    """Return the attention of `read` over `read`, context and the method's rows, with rotary positions.

    Args:
        read_rotations: Rotations of `read`; None rotates nothing.
        context_rotations: Rotations of each part of the context.
        attn: The block's attention.
        read: Normed tokens that give queries, [B, n, width].
        context: Normed tokens that give keys and values only, [B or 1, m, width].
        rows: The method's keys and values, each [heads, t, head_dim] or [B, heads, t, head_dim].
        mask: Which keys an image has, bool [B, keys]; None for all.
    """
    q, k, v = _project(attn, read, _separate_bias(attn), 3)
    pairs = [_finished(attn, k, v, read_rotations)]
    pairs += [_keys_values(attn, part, turn) for part, turn in zip(context, context_rotations, strict=True)]
    keys, values = zip(*pairs, strict=True)
    return combine(attn, read, _rotated(attn, attn.q_norm(q), read_rotations, q), keys, values, rows, mask)


def _keys_values(attn: Any, x: Tensor, rotations: Tensor | None = None) -> Rows:
    """Return keys and values [B, heads, n, head_dim] of normed tokens [B, n, width]."""
    k, v = _project(attn, x, _separate_bias(attn), 2)
    return _finished(attn, k, v, rotations)


def _finished(attn: Any, k: Tensor, v: Tensor, rotations: Tensor | None) -> Rows:
    """Normalise and rotate projected keys, and repeat keys and values for the heads that share them."""
    k, groups = _rotated(attn, attn.k_norm(k), rotations, v), getattr(attn, "num_kv_groups", 1)
    return (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)) if groups > 1 else (k, v)


def _rotated(attn: Any, x: Tensor, rotations: Tensor | None, like: Tensor) -> Tensor:
    """Rotate queries or keys [B, heads, n, head_dim] by their positions; cast them to the dtype of `like`."""
    return x if rotations is None else apply_rot_embed_cat(x, rotations, half=attn.rotate_half).type_as(like)


def _separate_bias(attn: Any) -> Tensor | None:
    """Return the bias [3 * width] that EVA's attention keeps outside its joint projection; 0 for the keys."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def _project(attn: Any, x: Tensor, bias: Tensor | None, parts: int) -> list[Tensor]:
    """Return keys and values (parts=2) or queries, keys and values (3), each [B, heads, n, head_dim]."""
    layer = attn.qkv
    if layer is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[-parts:]
        return [layer(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for layer in layers]
    if type(layer) is not nn.Linear or (bias is not None and layer.bias is not None):
        joint = layer(x)
        joint = joint if bias is None else (joint + bias).type_as(joint)
        return list(split_heads(attn, joint)[-parts:])
    bias = layer.bias if bias is None else bias
    first = (3 - parts) * attn.num_heads * attn.head_dim
    return list(split_heads(attn, F.linear(x, layer.weight[first:], None if bias is None else bias[first:])))
