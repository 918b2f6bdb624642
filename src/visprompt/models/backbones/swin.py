"""Swin transformers of timm: Swin-T, S, B, L and S3. Liu et al., Swin Transformer, ICCV 2021.

Prompts as in Jia et al., Visual Prompt Tuning, ECCV 2022: they stand in every window beside its tokens,
without relative positions and never masked; behind the attention each is the average over the windows of its
image; a patch merging gets each four times, in place of four neighbours; the final pooling is over image and
prompt tokens.

    [x_w, P_w] = Attention([LN(x)_w, LN(P)]) in every window w;  x = x + [x_1, x_2, ...],  P = P + mean over w
    of P_w

A prompt is the same in all windows, so its query, key and value are computed once for an image, and its
projection, which is linear, once behind the average. Where its output is not read, it gives a key and a value
alone.

Different from the released code, whose averages mix the images of a batch: here they are of each image's own
windows.
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
from visprompt.models.backbones.family import TokenFamily, side_of
from visprompt.models.contract import Method


class Swin(TokenFamily):
    """A timm `SwinTransformer` without its head.

    Images may have another side than its own, whatever it was built for: windows at the right and lower edges
    are filled up as timm's option `dynamic_img_size` does it, and what is left of a side that the patch does
    not divide is dropped.

    Args:
        model: Any `SwinTransformer`.
        exact: False computes the outputs of all prompts in all blocks, as the paper's code does; for
            comparison.

    Raises:
        UserError: The model is of another class, has parts of another class, or pools nothing.
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
                f"this SwinTransformer has a {foreign}, which nothing drives: choose a plain one of timm"
            )
        if not model.head.global_pool.pool_type:
            raise UserError("the backbone pools nothing: set backbone.global_pool to avg, avgmax or max")
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
        # a method's rows of keys and values are made for heads that share the width among them
        fit = all(block.attn.qkv.out_features == 3 * block.dim for block in blocks)
        everywhere = {"tokens", "weights", "modules", "pixels", "branches"}
        self.sites = frozenset(everywhere | ({"keys_values"} if fit else set()))

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images it was built for; a model may be oblong."""
        embedding: Any = self.model.patch_embed
        height, width = embedding.img_size
        return height, width

    def pooling(self, pool: str | None) -> str:
        """Timm's own word, and of which tokens: with prompts the default is of both."""
        return f"{cast(Any, self.model.head).global_pool.pool_type} of {pool or 'image_prompt'}"

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether the block is of the plain class."""
        return driven.is_proven(block, SwinTransformerBlock, (WindowAttention,))

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Image tokens [B, n, width] before the first block.

        Raises:
            UserError: The images are neither of the backbone's own size nor, as those are, square.
        """
        self.check_size(images, method)
        embedding: Any = self.model.patch_embed
        maps = embedding.proj(method.pixels(images))  # the whole of it refuses all sizes but its own
        (height, width), own = maps.shape[-2:], self.grids[0]
        if (height, width) != own and not (self.any_size and height == width):
            others = " or another square" if self.any_size else ""
            raise UserError(
                f"images of {height} x {width} patches do not fit, this backbone takes {own[0]} x "
                f"{own[1]}{others}: crop or resize them, or set backbone.image_size"
            )
        return cast(Tensor, embedding.norm(maps.flatten(2).transpose(1, 2)))

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a block; tokens that are not read give keys and values only."""
        parts = [x[:, : rows.start], x[:, rows.stop :], *([] if entering is None else [entering])]
        context = [part for part in parts if part.shape[1]]
        attend = self._attention(index, num_image, rows.start == 0)
        return driven.run_block(self._block(index), x[:, rows], context, attend, method, index)

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run a block on all tokens, the prompts among them in every window."""
        return driven.run_block(self._block(index), x, [], self._attention(index, num_image, True))

    def _block(self, index: int) -> Any:
        stage, i = self._places[index]
        return cast(Any, self.model.layers[stage]).blocks[i]

    def _attention(self, index: int, num_image: int, reads_image: bool) -> driven.Attend:
        """Return a block's attention over a map of `num_image` tokens."""
        size = side_of(num_image, self.grids[index])
        return partial(_attend, self._block(index), size, num_image if reads_image else 0)

    def between(self, index: int, x: Tensor, num_image: int) -> tuple[Tensor, int]:
        """Merge patches where a stage begins; a prompt stands for four neighbours."""
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
        """Return rows of the last block's output that the pooling reads, and whether prompts are among them."""
        if pool == "image":
            return slice(0, num_image), False
        return slice(num_image if pool == "prompt" else 0, None), True  # by default the paper's: of both

    def pool(self, x: Tensor, pool: str | None) -> Tensor:
        """Norm and pools the rows chosen by `pooled_rows` as timm does before its classifier."""
        # a map of one column: timm pools over height and width, wherever a token stands
        return cast(Tensor, self.model.head(self.model.norm(x).unsqueeze(2), pre_logits=True))


def _foreign(model: SwinTransformer) -> str | None:
    """Return a part's class that is not timm's own, whose work is done here."""
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
) -> Tensor:
    """Return attention within the windows of a block, prompts among the tokens of every window.

    Args:
        block: The block.
        size: Height and width of the map of image tokens.
        num_image: How many of `read` are image tokens: the whole map, or 0 where the outputs of prompts alone
            are read.
        attn: The block's attention.
        read: Normed tokens whose outputs are read, [B, n, width]: those of the image first, then prompts.
        context: Normed tokens that give keys and values only, [B or 1, m, width]; the image's first, if they
            are not read.
        rows: The method's keys and values, each [heads, t, head_dim].

    Returns:
        [B, n, width].
    """
    image, *prompts = [read[:, :num_image], *context] if num_image else context
    asking = read[:, num_image:]
    windows = _windows(block, image.unflatten(1, size))
    parts = [(windows, num_image > 0), *((part.unsqueeze(1), False) for part in prompts)]
    if asking.shape[1]:
        parts.insert(1, (asking.unsqueeze(1), True))  # the order of the queries is that of `read`
    num_windows, area = windows.shape[1:3]
    query, key, value = _join(attn, parts, rows, len(read), num_windows)
    mask = (
        _mask(block, size, num_windows, query.shape[-2], key.shape[-2]).to(query.dtype) if num_image else None
    )
    rate = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate, scale=attn.scale)
    out = out.unflatten(1, (num_windows, -1)).transpose(2, 3).flatten(3)  # [B, windows, tokens, width]
    outs = [_put_back(block, out[:, :, :area], size)] if num_image else []
    if asking.shape[1]:
        outs.append(out[:, :, -asking.shape[1] :].mean(1))
    return cast(Tensor, attn.proj_drop(attn.proj(torch.cat(outs, dim=1))))


def _join(
    attn: Any, parts: Sequence[tuple[Tensor, bool]], rows: driven.Rows | None, batch: int, num_windows: int
) -> tuple[Tensor, ...]:
    """Return queries, keys and values of the tokens of all windows, each [B, windows * heads, tokens, head_dim].

    Windows and heads lie side by side, so that one mask serves all images of a batch.

    Args:
        attn: A block's attention.
        parts: Normed tokens of each window or, with one window, of all alike, [B or 1, windows or 1, n,
            width]; and whether they are read.
        rows: The method's keys and values.
        batch: Number of images (B).
        num_windows: Of an image.
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
        keys.append(rows[0])
        values.append(rows[1])
    dtype, size = keys[0].dtype, (batch, num_windows, -1, -1, -1)
    joined = (torch.cat([p.to(dtype).expand(size) for p in part], dim=-2) for part in (queries, keys, values))
    return tuple(one.flatten(1, 2) for one in joined)


def _windows(block: Any, maps: Tensor) -> Tensor:
    """Return windows [B, windows, area, width] of maps [B, H, W, width], shifted, and filled up with zeros."""
    down, right = block.shift_size
    x = maps.roll((-down, -right), (1, 2)) if down or right else maps
    height, width = _filled(block, (maps.shape[1], maps.shape[2]))
    x = F.pad(x, (0, 0, 0, width - maps.shape[2], 0, height - maps.shape[1]))
    return window_partition(x, block.window_size).view(len(maps), -1, block.window_area, maps.shape[-1])


def _put_back(block: Any, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the map of windows [B, windows, area, width], as tokens [B, H * W, width]."""
    down, right = block.shift_size
    parts = windows.flatten(0, 1).unflatten(1, block.window_size)
    maps = window_reverse(parts, block.window_size, *_filled(block, size))[:, : size[0], : size[1]]
    return (maps.roll((down, right), (1, 2)) if down or right else maps).flatten(1, 2)


def _filled(block: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a map that is filled up to whole windows."""
    (height, width), (rows, columns) = size, block.window_size
    return height + -height % rows, width + -width % columns


def _project(attn: Any, x: Tensor, is_read: bool) -> tuple[Tensor, ...]:
    """Return queries if they are read, keys and values of x [B, windows, n, width], each [B, windows, heads, n, head_dim]."""
    if is_read or type(attn.qkv) is not nn.Linear:
        joint, parts = attn.qkv(x), 3
    else:
        # the last two thirds of the joint projection's rows are those of the keys and the values
        third, parts = attn.qkv.out_features // 3, 2
        joint = F.linear(x, attn.qkv.weight[third:], None if attn.qkv.bias is None else attn.qkv.bias[third:])
    split = joint.unflatten(-1, (parts, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    return split if is_read else split[-2:]


def _mask(block: Any, size: tuple[int, int], num_windows: int, queries: int, keys: int) -> Tensor:
    """Return what is added to the logits of all windows, [1, windows * heads, queries, keys].

    Nothing for prompts and rows.
    """
    mask: Tensor = block.attn._get_rel_pos_bias()
    if any(block.shift_size):
        shifted = block.attn_mask if size == tuple(block.input_resolution) else None
        if shifted is None:  # timm makes it for the size that a model is built for
            shifted = block.get_attn_mask(mask.new_empty(1, *_filled(block, size), 1))
        mask = mask + shifted.unsqueeze(1)
    mask = mask.expand(num_windows, -1, -1, -1).flatten(0, 1).unsqueeze(0)
    return F.pad(mask, (0, keys - block.window_area, 0, queries - block.window_area))
