"""Vision transformers with rotary positions, timm's class Eva.

EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2.

An attention rotates the queries and the keys of every patch by angles that are its position; class and
register tokens have none, and prompts get none. A row of sine 0 and cosine 1 rotates nothing: with such rows
around those of the patches, tokens of every kind stand in any order, prompts behind the image tokens as in
every family.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.backbones.block import Rows, combine, is_proven, run_block
from visprompt.models.backbones.family import side_of
from visprompt.models.backbones.vit import ViT
from visprompt.models.contract import Method, split_heads


class EVA(ViT):
    """A timm `Eva` without its head.

    Args:
        model: Any `Eva`: rotary positions of any kind, absolute ones or both; norms before or behind the
            branches.
        exact: False carries the prompt tokens through every block, as the papers' codes do; for comparison.

    Raises:
        UserError: The model is of another class, or pools nothing.
    """

    model_class = Eva
    model: Eva  # type: ignore[assignment]  # it has all that ViT asks of a model, but no common class

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        super().__init__(model, exact)
        self._held: Tensor | None = None  # the rotations of the images that are being computed
        blocks: list[Any] = self.blocks
        for block in blocks:
            if getattr(block.attn, "q_bias", None) is not None:
                # timm then calls the joint projection, which a method may have wrapped, and does not read its
                # weight
                block.attn.qkv_bias_separate = True

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether the block is of the class with its norms before the branches."""
        return is_proven(block, EvaBlock, (EvaAttention, AttentionRope))

    def forward(self, images: Tensor, method: Method) -> Tensor:
        """Pooled features [B, width] of normalised images [B, 3, H, W]."""
        x, rotations, _ = self._begin(images, method)
        return self._holding(rotations, partial(super().from_block, 0, x, method))

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Image tokens [B, n, width] before the first block; class and register tokens stand first.

        Raises:
            UserError: The number of tokens does not tell their positions.
        """
        x, _, grid = self._begin(images, method)
        self._check_grid(grid)
        return x

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Image tokens before block `stop`, at or below the method's `first_block`: nothing tuned is in them.

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

        return self._holding(rotations, blocks)

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Pooled features [B, width] of image tokens [B, n, width] before block `start`."""
        return self._holding(self._rotations(x.shape[1]), partial(super().from_block, start, x, method))

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a block; tokens that are not read give keys and values only."""
        all_rows = self._rows(index, num_image, x.shape[1])
        parts = [
            part for part in (slice(0, rows.start), slice(rows.stop, x.shape[1])) if part.start < part.stop
        ]
        context, of_context = [x[:, part] for part in parts], [_some(all_rows, part) for part in parts]
        if entering is not None:
            context, of_context = [*context, entering], [*of_context, None]
        attend = partial(_attend, _some(all_rows, rows), of_context)
        return run_block(self.model.blocks[index], x[:, rows], context, attend, method, index)

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run timm's block on all tokens."""
        rows = _some(self._rows(index, num_image, x.shape[1]), slice(self.num_prefix, None))
        return cast(Tensor, self.model.blocks[index](x, rope=rows))

    def _pools_prefix(self) -> bool:
        """Return whether a pooling over tokens reads class and register tokens with the patches."""
        return self.model.attn_pool is not None

    def _begin(self, images: Tensor, method: Method) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Image tokens before the first block, their rotations, and the grid of their patches."""
        self.check_size(images, method)
        model = self.model
        patches = model.patch_embed(method.pixels(images))
        grid = (patches.shape[1], patches.shape[2]) if model.dynamic_img_size else self.grids[0]
        x, rotations = model._pos_embed(patches)
        return model.norm_pre(x), _padded(rotations, self.num_prefix, 0), grid

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.model.rope is not None and side_of(math.prod(grid), self.grids[0]) != grid:
            raise UserError(
                f"images of {grid[0]} x {grid[1]} patches leave tokens whose number does not tell their "
                "rotary "
                f"positions: give square images, or such of the backbone's own {self.grids[0][0]} x "
                f"{self.grids[0][1]}"
            )

    def _holding(self, rotations: Tensor | None, run: Callable[[], Tensor]) -> Tensor:
        """Run blocks by these rotations, which are made once for all of them."""
        self._held = rotations
        try:
            return run()
        finally:
            self._held = None

    def _rotations(self, num_image: int) -> Tensor | None:
        """Return the rotations of image tokens that come without their images.

        Those that timm's `_pos_embed` makes.
        """
        rope: Any = self.model.rope
        if rope is None or not num_image:
            return None
        grid = side_of(num_image - self.num_prefix, self.grids[0])
        fixed = hasattr(rope, "feat_shape") and not self.model.dynamic_img_size
        return _padded(rope.get_embed() if fixed else rope.get_embed(shape=grid), self.num_prefix, 0)

    def _rows(self, index: int, num_image: int, num_tokens: int) -> Tensor | None:
        """Return the rotations of all tokens in a block, [..., num_tokens, 2 * head_dim].

        Sines, then cosines.
        """
        rotations = self._rotations(num_image) if self._held is None else self._held
        if rotations is not None and self.model.rope_mixed:  # each block has its own
            rotations = rotations[index]
        return _padded(rotations, 0, num_tokens - num_image)


def _padded(rotations: Tensor | None, before: int, behind: int) -> Tensor | None:
    """Return rotations with rows before and behind them that rotate nothing."""
    if rotations is None or not before + behind:
        return rotations
    sines, cosines = rotations.chunk(2, dim=-1)
    rows = (0, 0, before, behind)
    return torch.cat([F.pad(sines, rows), F.pad(cosines, rows, value=1.0)], dim=-1)


def _some(rotations: Tensor | None, rows: slice) -> Tensor | None:
    return None if rotations is None else rotations[..., rows, :]


def _attend(
    of_read: Tensor | None,
    of_context: Sequence[Tensor | None],
    attn: EvaAttention | AttentionRope,
    read: Tensor,
    context: Sequence[Tensor],
    rows: Rows | None,
) -> Tensor:
    """Return attention of normed tokens [B, n, width] over themselves, the context and the method's rows, by rotations."""
    bias = _separate_bias(attn)
    q, *own = _project(attn, read, bias, 3)
    pairs = [own, *(_project(attn, part, bias, 2) for part in context)]
    groups = getattr(attn, "num_kv_groups", 1)
    keys, values = [], []
    for (k, v), rotations in zip(pairs, (of_read, *of_context), strict=True):
        k = _rotated(attn, attn.k_norm(k), rotations, v)
        keys.append(k.repeat_interleave(groups, dim=1) if groups > 1 else k)
        values.append(v.repeat_interleave(groups, dim=1) if groups > 1 else v)
    return combine(attn, read, _rotated(attn, attn.q_norm(q), of_read, q), keys, values, rows)


def _rotated(attn: Any, x: Tensor, rotations: Tensor | None, like: Tensor) -> Tensor:
    """Return queries or keys [B, heads, n, head_dim] in their positions.

    In the precision of `like`, which norms may leave.
    """
    return x if rotations is None else apply_rot_embed_cat(x, rotations, half=attn.rotate_half).type_as(like)


def _separate_bias(attn: Any) -> Tensor | None:
    """Return the bias [3 * width] that EVA's attention keeps beside its joint projection, that of the keys being zero."""
    return (
        None if getattr(attn, "q_bias", None) is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    )


def _project(attn: Any, x: Tensor, bias: Tensor | None, parts: int) -> list[Tensor]:
    """Return the last 2 or 3 of queries, keys and values of normed tokens, each [B, heads, n, head_dim]."""
    layer = attn.qkv
    if layer is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[-parts:]
        return [one(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for one in layers]
    if type(layer) is not nn.Linear or (bias is not None and layer.bias is not None):
        joint = layer(x)
        joint = joint if bias is None else (joint + bias).type_as(joint)
        return list(split_heads(attn, joint)[-parts:])
    bias = layer.bias if bias is None else bias
    first = (3 - parts) * attn.num_heads * attn.head_dim
    return list(split_heads(attn, F.linear(x, layer.weight[first:], None if bias is None else bias[first:])))
