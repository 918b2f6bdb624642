"""Swin transformers of timm: Swin-T, S, B, L and S3. Liu et al., Swin Transformer, ICCV 2021.

Prompts as in Jia et al., Visual Prompt Tuning, ECCV 2022: they join the tokens of every window, without
relative position biases and never masked; after the attention a prompt is the average over the windows of its
image; a patch merging gets each prompt four times, in place of four neighbouring patches; the final pooling
is over image and prompt tokens.

    [x_w, P_w] = Attention([LN(x)_w, LN(P)]) in every window w
    x = x + [x_1, x_2, ...];  P = P + mean of P_w over w

A prompt is the same in all windows, so its query, key and value are computed once for an image. The output
projection is linear, so it is applied once, after the average. A prompt whose output is not read only gives a
key and a value.

Different from the released code, whose averages mix the images of a batch: here they are over the windows of
one image.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.backbones import block as driven
from visprompt.models.backbones.family import side_of
from visprompt.models.backbones.token_family import TokenFamily
from visprompt.models.contract import Method


class Swin(TokenFamily):
    """A timm `SwinTransformer` without its head.

    Square images of any size are supported, even if the model was built for one size: windows at the right
    and lower edges are padded with zeros as by timm's option `dynamic_img_size`, and pixels beyond the last
    whole patch are dropped.

    Args:
        model: Any `SwinTransformer`.
        exact: False computes the outputs of all prompts in all blocks, as the paper's code does; for
            comparison.

    Raises:
        UserError: The model is of another class, has parts of another class, or has no pooling.
    """

    model_class = SwinTransformer
    model: SwinTransformer
    final_names = ("norm",)
    stem = "patch_embed.proj"

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        self.check_class(model)
        model = cast(SwinTransformer, model)
        if foreign := _foreign(model):
            raise UserError(
                f"this SwinTransformer has a {foreign}, which is not supported: choose a plain one of timm"
            )
        if not model.head.global_pool.pool_type:
            raise UserError("the backbone has no pooling: set backbone.global_pool to avg, avgmax or max")
        model.reset_classifier(0)
        super().__init__(model, exact)
        stages: Any = model.layers
        self._places = [(stage, i) for stage, layer in enumerate(stages) for i in range(len(layer.blocks))]
        self.block_names = tuple(f"layers.{stage}.blocks.{i}" for stage, i in self._places)
        self.between_names = tuple(
            f"layers.{stage}.downsample" if stage and not i else None for stage, i in self._places
        )
        blocks: list[Any] = self.blocks
        self.width = model.head.num_features
        self.widths = tuple(block.dim for block in blocks)
        self.heads = tuple(block.attn.num_heads for block in blocks)
        self.grids = tuple((block.input_resolution[0], block.input_resolution[1]) for block in blocks)
        embedding: Any = model.patch_embed
        self.patch_size, self.image_size = embedding.patch_size[0], embedding.img_size[0]
        self.any_size = self.grids[0][0] == self.grids[0][1]
        # methods draw keys and values of width / heads dimensions, so the heads must divide the width evenly
        fits = all(block.attn.qkv.out_features == 3 * block.dim for block in blocks)
        everywhere = {"tokens", "weights", "modules", "pixels", "branches"}
        self.sites = frozenset(everywhere | ({"keys_values"} if fits else set()))

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was built for; they may differ."""
        embedding: Any = self.model.patch_embed
        height, width = embedding.img_size
        return height, width

    def pooling(self, pool: str | None) -> str:
        """Return timm's word and the pooled tokens, such as "avg of image_prompt", which is the default."""
        return f"{cast(Any, self.model.head).global_pool.pool_type} of {pool or 'image_prompt'}"

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether the block is of the plain class."""
        return driven.is_proven(block, SwinTransformerBlock, (WindowAttention,))

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return image tokens [B, n, width] before the first block.

        Raises:
            UserError: The images have neither the backbone's own size nor, if that is square, another square.
        """
        self.check_size(images, method)
        embedding: Any = self.model.patch_embed
        maps = embedding.proj(method.pixels(images))  # not `embedding`, which refuses other sizes
        (height, width), expected = maps.shape[-2:], self.grids[0]
        if (height, width) != expected and not (self.any_size and height == width):
            others = " or another square" if self.any_size else ""
            raise UserError(
                f"images of {height} x {width} patches do not fit, because this backbone takes "
                f"{expected[0]} x {expected[1]}{others}: crop or resize them, or set backbone.image_size"
            )
        return cast(Tensor, embedding.norm(maps.flatten(2).transpose(1, 2)))

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a block; tokens that are not read give keys and values only."""
        parts = [x[:, : rows.start], x[:, rows.stop :], *([] if entering is None else [entering])]
        context = [part for part in parts if part.shape[1]]
        attend = self._attention(index, num_image, rows.start == 0)
        mask = self.mask(index, x, num_image, rows, entering, method)
        return self.step(index, x[:, rows], context, attend, mask, method)

    def keys_values(self, index: int, prompts: Tensor) -> driven.Rows:
        """Return the keys and values that prompts give in every window of a block."""
        block = self._block(index)
        k, v = _project(block.attn, block.norm1(prompts)[:, None], False)
        return k.squeeze(1), v.squeeze(1)

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run a block on all tokens, with the prompts in every window."""
        return driven.run_block(self._block(index), x, [], self._attention(index, num_image, True))

    def _block(self, index: int) -> Any:
        stage, i = self._places[index]
        return cast(Any, self.model.layers[stage]).blocks[i]

    def _attention(self, index: int, num_image: int, reads_image: bool) -> driven.Attend:
        """Return the attention of a block, for a map of `num_image` image tokens, as `run_block` calls it."""
        size = side_of(num_image, self.grids[index])
        return partial(_attend, self._block(index), size, num_image if reads_image else 0)

    def between(self, index: int, x: Tensor, num_image: int) -> tuple[Tensor, int]:
        """Merge patches at the start of a stage; a prompt is merged with three copies of itself."""
        stage, i = self._places[index]
        if stage == 0 or i > 0:
            return x, num_image
        merging: Any = cast(Any, self.model.layers[stage]).downsample
        image: Tensor = merging(
            x[:, :num_image].unflatten(1, side_of(num_image, self.grids[index - 1]))
        ).flatten(1, 2)
        if x.shape[1] == num_image:
            return image, image.shape[1]
        prompts = merging.reduction(merging.norm(x[:, num_image:].repeat(1, 1, 4)))
        return torch.cat([image, prompts], dim=1), image.shape[1]

    def pooled_rows(self, num_image: int, pool: str | None) -> tuple[slice, bool]:
        """Return the rows of the last block's output that are pooled, and whether they include prompts."""
        if pool == "image":
            return slice(0, num_image), False
        return slice(num_image if pool == "prompt" else 0, None), True  # default: both, as in the paper

    def norm(self, x: Tensor) -> Tensor:
        """Apply the final norm to each token."""
        return cast(Tensor, self.model.norm(x))

    def pool(self, x: Tensor, pool: str | None) -> Tensor:
        """Apply the final norm to the rows chosen by `pooled_rows`, and pool them, as timm does."""
        # as a map of one column: timm pools over height and width, so the arrangement does not matter
        return cast(Tensor, self.model.head(self.model.norm(x).unsqueeze(2), pre_logits=True))


def _foreign(model: SwinTransformer) -> str | None:
    """Return the name of the first class among the model's parts that is not supported; None if all are."""
    known = (SwinTransformerBlock, WindowAttention, PatchEmbed)
    stages: Any = model.layers
    parts = [
        model.patch_embed,
        *(part for stage in stages for block in stage.blocks for part in (block, block.attn)),
    ]
    return next((type(part).__name__ for part in parts if type(part) not in known), None)


def _attend(
    block: Any,
    size: tuple[int, int],
    num_image: int,
    attn: Any,
    read: Tensor,
    context: Sequence[Tensor],
    rows: driven.Rows | None,
    present: Tensor | None,
) -> Tensor:
    """Return the attention within the windows of a block, with prompts in every window.

    Args:
        block: The block.
        size: Height and width of the map of image tokens.
        num_image: Number of image tokens in `read`: the whole map, or 0 if only outputs of prompts are read.
        attn: The block's attention.
        read: Normed tokens whose outputs are read, [B, n, width]: image tokens first, then prompts.
        context: Normed tokens that give keys and values only, [B or 1, m, width]; the image tokens are the
            first part if they are not in `read`.
        rows: The method's keys and values, each [heads, t, head_dim] or [B, heads, t, head_dim].
        present: Which keys an image has, bool [B, keys], those of image tokens first; None for all.

    Returns:
        [B, n, width].
    """
    image, *prompts = [read[:, :num_image], *context] if num_image else context
    read_prompts = read[:, num_image:]
    windows = _windows(block, image.unflatten(1, size))
    parts = [(windows, num_image > 0), *((part.unsqueeze(1), False) for part in prompts)]
    if read_prompts.shape[1]:
        parts.insert(1, (read_prompts.unsqueeze(1), True))  # queries in the order of `read`
    num_windows, area = windows.shape[1:3]
    query, key, value = _join(attn, parts, rows, read.shape[0], num_windows)
    mask = None
    if num_image:
        mask = _mask(block, size, num_windows, query.shape[-2], key.shape[-2]).to(query.dtype)
    if present is not None:
        # a window has the same prompts and rows as its image, after its own image tokens
        before = 0 if num_image else read.shape[1]  # keys that come before those of the image tokens
        others = torch.cat([present[:, :before], present[:, before + image.shape[1] :]], dim=1)
        shown = F.pad(others, (windows.shape[2], 0), value=True)[:, None, None]
        absent = torch.zeros_like(shown, dtype=query.dtype).masked_fill(~shown, float("-inf"))
        mask = absent if mask is None else mask + absent
    rate = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate, scale=attn.scale)
    out = out.unflatten(1, (num_windows, -1)).transpose(2, 3).flatten(3)  # [B, windows, tokens, width]
    outs = [_put_back(block, out[:, :, :area], size)] if num_image else []
    if read_prompts.shape[1]:
        outs.append(out[:, :, -read_prompts.shape[1] :].mean(1))
    return cast(Tensor, attn.proj_drop(attn.proj(torch.cat(outs, dim=1))))


def _join(
    attn: Any, parts: Sequence[tuple[Tensor, bool]], rows: driven.Rows | None, batch: int, num_windows: int
) -> tuple[Tensor, ...]:
    """Return queries, keys and values in all windows, each [B, windows * heads, tokens, head_dim].

    Windows and heads share an axis, so that one mask serves all images of a batch.

    Args:
        attn: A block's attention.
        parts: Pairs of normed tokens [B or 1, windows or 1, n, width], whose axes of length 1 are broadcast,
            and whether their outputs are read.
        rows: The method's keys and values.
        batch: Number of images (B).
        num_windows: Number of windows of an image.
    """
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for tokens, is_read in parts:
        *q, k, v = _project(attn, tokens, is_read)
        queries.extend(q)
        keys.append(k)
        values.append(v)
    if rows:
        # of all images, or of each: [B, 1, heads, t, head_dim]
        k, v = (part if part.ndim == 3 else part[:, None] for part in rows)
        keys.append(k)
        values.append(v)
    dtype, size = keys[0].dtype, (batch, num_windows, -1, -1, -1)
    joined = (torch.cat([p.to(dtype).expand(size) for p in part], dim=-2) for part in (queries, keys, values))
    return tuple(tensor.flatten(1, 2) for tensor in joined)


def _windows(block: Any, maps: Tensor) -> Tensor:
    """Return windows [B, windows, area, width] of maps [B, H, W, width], after shift and zero padding."""
    down, right = block.shift_size
    x = maps.roll((-down, -right), (1, 2)) if down or right else maps
    height, width = _padded_size(block, (maps.shape[1], maps.shape[2]))
    x = F.pad(x, (0, 0, 0, width - maps.shape[2], 0, height - maps.shape[1]))
    return window_partition(x, block.window_size).view(maps.shape[0], -1, block.window_area, maps.shape[-1])


def _put_back(block: Any, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `_windows`: windows [B, windows, area, width] to tokens [B, H * W, width]."""
    down, right = block.shift_size
    parts = windows.flatten(0, 1).unflatten(1, block.window_size)
    maps = window_reverse(parts, block.window_size, *_padded_size(block, size))[:, : size[0], : size[1]]
    return (maps.roll((down, right), (1, 2)) if down or right else maps).flatten(1, 2)


def _padded_size(block: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a map after padding to whole windows."""
    (height, width), (rows, columns) = size, block.window_size
    return height + -height % rows, width + -width % columns


def _project(attn: Any, x: Tensor, is_read: bool) -> tuple[Tensor, ...]:
    """Project x [B, windows, n, width] to keys and values, and to queries first if its outputs are read.

    Returns:
        2 or 3 tensors [B, windows, heads, n, head_dim].
    """
    if is_read or type(attn.qkv) is not nn.Linear:
        joint, parts = attn.qkv(x), 3
    else:
        # the joint projection's rows are those of queries, keys and values, a third each
        third, parts = attn.qkv.out_features // 3, 2
        joint = F.linear(x, attn.qkv.weight[third:], None if attn.qkv.bias is None else attn.qkv.bias[third:])
    split = joint.unflatten(-1, (parts, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    return split if is_read else split[-2:]


def _mask(block: Any, size: tuple[int, int], num_windows: int, queries: int, keys: int) -> Tensor:
    """Return the term added to the attention logits of all windows, [1, windows * heads, queries, keys].

    It is the relative position bias and the mask of shifted windows; 0 for prompts and the method's rows.
    """
    mask: Tensor = block.attn._get_rel_pos_bias()
    if any(block.shift_size):
        shift_mask = block.attn_mask if size == tuple(block.input_resolution) else None
        if shift_mask is None:  # timm stores it only for the size that the model is built for
            shift_mask = block.get_attn_mask(mask.new_empty(1, *_padded_size(block, size), 1))
        mask = mask + shift_mask.unsqueeze(1)
    mask = mask.expand(num_windows, -1, -1, -1).flatten(0, 1).unsqueeze(0)
    return F.pad(mask, (0, keys - block.window_area, 0, queries - block.window_area))
