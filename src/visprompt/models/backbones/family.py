"""The base of all families of backbones, and the forward of those made of tokens.

A family is one file: it says where a method may enter (its sites), names the model's parts, and runs timm's
modules block by block. Outputs that the loss does not depend on are not computed, if the block's class is
"proven" (`is_proven`): re-implemented exactly, and tested against timm's forward. Other blocks run timm's
forward on all tokens ("carry" them).

From images to logits (here, in `models/classifier.py` and in `block.py`; the backbone calls the method):

    x = embed(method.pixels(images))                     # [B, n, width]: class token, patches
    for i, block in enumerate(blocks):                   # from_block
        x = method.shift(i, x)
        if flow[i] is ENTER or MIX:                      # method.token_flow()
            entering = method.tokens(i, x)               # [1 or B, p, width], replaces the last block's
        read = rows of x whose outputs are read          # not prompts that the next block drops, for example
        queries = LN(x[read]);  context = LN(other rows), LN(entering)                        # run_block
        keys, values = those of queries, context and method.keys_values(i)                    # attend
        x = x[read] + Attention(queries, keys, values) + method.branch(ATTENTION) [+ ...]
        x = x + MLP(LN(x)) + method.branch(MLP) [+ ...]
    features = method.features(pool(norm(x)))            # [B, width]
    logits = head(features)                              # [B, C]
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.backbones.block import Rows, run_block
from visprompt.models.contract import Flow, Method


class Family(nn.Module):
    """A timm model without its head; a `Geometry`, whose attributes are described there.

    Args:
        model: The model.
        exact: False computes the prompt tokens' outputs in every block, as the papers' codes do; for
            comparison.

    Attributes:
        mean: Channel means that its images (pixels in 0..1) are normalised with; None if unknown.
        std: Channel standard deviations, likewise.
    """

    model_class: ClassVar[type[nn.Module]]
    model: nn.Module
    width: int
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    block_names: tuple[str, ...]
    between_names: tuple[str | None, ...]
    final_names: tuple[str, ...] = ()
    stem: str
    patch_size: int
    image_size: int
    any_size: bool = False
    num_prefix: int = 0
    has_class_token: bool = False
    sites: frozenset[str]

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        super().__init__()
        self.model, self.exact = model, exact
        config = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = config.get("mean"), config.get("std")

    @classmethod
    def check_class(cls, model: nn.Module) -> None:
        """Refuse a model of another class than the family's.

        A subclass is refused too: it may embed or pool in another way (timm's distilled ViT has two class
        tokens).

        Raises:
            UserError: The model is of another class.
        """
        if type(model) is not cls.model_class:
            raise UserError(
                f"backbone class {type(model).__name__} is not a plain timm {cls.model_class.__name__}: "
                "choose one"
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks of all stages in their order."""
        return [self.model.get_submodule(name) for name in self.block_names]

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks (L)."""
        return len(self.block_names)

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was built for."""
        return self.image_size, self.image_size

    def carried_blocks(self) -> list[int]:
        """Return the indices of blocks that compute the outputs of all prompt tokens."""
        return []

    def pooling(self, pool: str | None) -> str:
        """Return a word for records that says what the features are pooled from: `pool`, else timm's word."""
        return pool or str(getattr(self.model, "global_pool", "avg"))

    def forward(self, images: Tensor, method: Method) -> Tensor:
        """Return the pooled features of a batch.

        Args:
            images: Normalised images [B, 3, H, W].
            method: The method, called where it enters; see `models.contract`.

        Returns:
            Features [B, width] as the model's head would get them.
        """
        return self.from_block(0, self.embed(images, method), method)

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return the first block's input: tokens [B, n, width], or maps [B, channels, height, width].

        Args:
            images: Normalised images [B, 3, H, W].
            method: The method; it may change the pixels.
        """
        raise NotImplementedError

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Return the input of block `stop`: tokens [B, n, width], or flat maps [B, channels, height * width].

        Args:
            stop: At most the method's `first_block`, so that nothing tuned affects the result.
            images: Normalised images [B, 3, H, W].
            method: The method.
        """
        raise NotImplementedError

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Return pooled features [B, width] of what `to_block` returned for block `start`."""
        raise NotImplementedError

    def check_size(self, images: Tensor, method: Method) -> None:
        """Refuse images without 3 channels, or of a size that the method does not support.

        Raises:
            UserError: The images have another number of channels or another size.
        """
        if images.shape[1] != 3:
            raise UserError(
                f"images must be [B, 3, height, width], and these have the shape {tuple(images.shape)}"
            )
        height, width = self.own_size
        if method.fixed_size and images.shape[-2:] != (height, width):
            raise UserError(
                f"this method needs images of the backbone's own size {height} x {width} and got "
                f"{images.shape[-2]} x {images.shape[-1]}: resize them, or set backbone.image_size"
            )


class TokenFamily(Family):
    """A family whose blocks take tokens: image tokens first, then prompts."""

    def carried_blocks(self) -> list[int]:
        """Return the indices of blocks that compute the outputs of all prompt tokens.

        These are blocks of a class that is not proven, or all blocks if `exact` is off.
        """
        return [i for i, block in enumerate(self.blocks) if not (self.exact and self.is_proven(block))]

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether `drive` computes exactly what this block computes."""
        raise NotImplementedError

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a proven block, with the method in it, and compute only the outputs that are read.

        Tokens that are not read give keys and values only.

        Args:
            index: Index of the block.
            x: Image tokens, then the prompts that flowed on, [B, n, width].
            num_image: Number of image tokens.
            rows: The rows of x whose outputs are read, 0 <= start < stop <= n.
            entering: Prompts whose outputs are not read, [B or 1, p, width].
            method: Gives keys, values and branches.

        Returns:
            The block's outputs for `rows`.
        """
        parts = [x[:, : rows.start], x[:, rows.stop :], *([] if entering is None else [entering])]
        context = [part for part in parts if part.shape[1]]
        return run_block(self._block(index), x[:, rows], context, self.attend, method, index)

    def attend(self, attn: Any, read: Tensor, context: Sequence[Tensor], rows: Rows | None) -> Tensor:
        """Return the attention [B, n, width] of a proven block, see `block.run_block`."""
        raise NotImplementedError

    def _block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.block_names[index])

    def carry(self, index: int, x: Tensor, num_image: int) -> Tensor:
        """Run timm's own block on all tokens x [B, n, width], prompts among them."""
        raise NotImplementedError

    def between(self, index: int, x: Tensor, num_image: int) -> tuple[Tensor, int]:
        """Apply what is between block `index - 1` and block `index`, such as a patch merging.

        Args:
            index: Index of the block that comes next.
            x: Image tokens, then prompts that flow on, [B, n, width].
            num_image: Number of image tokens.

        Returns:
            The tokens, and the new number of image tokens.
        """
        return x, num_image

    def pooled_rows(self, num_image: int, pool: str | None) -> tuple[slice, bool]:
        """Return the rows of the last block's output that are pooled, and whether they include prompts."""
        raise NotImplementedError

    def pool(self, x: Tensor, pool: str | None) -> Tensor:
        """Apply the final norm to the rows chosen by `pooled_rows`, and pool them, as timm does."""
        raise NotImplementedError

    def states(self, images: Tensor) -> list[Tensor]:
        """Return the tokens [B, n, width] before each block and after the last, without any method."""
        like, no_method = next(self.parameters()), Method(self)
        states = [self.embed(images.to(like.device, like.dtype), no_method)]
        for i in range(self.num_blocks):
            states.append(self._plain(i, states[-1]))
        return states

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Return image tokens [B, n, width] before block `stop`; see `Family.to_block`."""
        x = self.embed(images, method)
        for i in range(stop):
            x = self._plain(i, x)
        return x

    def _plain(self, index: int, x: Tensor) -> Tensor:
        """Run a block on image tokens, and what is between it and the next block."""
        x = self.carry(index, x, x.shape[1])
        return self.between(index + 1, x, x.shape[1])[0] if index + 1 < self.num_blocks else x

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Return pooled features [B, width] of image tokens [B, n, width] before block `start`."""
        flow, num_image = method.token_flow(), x.shape[1]
        entered = x[:, num_image:]  # prompts that last entered a block
        for i in range(start, self.num_blocks):
            prompt_outputs = x[:, num_image:]
            if flow[i] is not Flow.KEEP:
                x = x[:, :num_image]
            if flow[i] is Flow.KEEP and prompt_outputs.shape[1]:
                x = torch.cat([method.shift(i, x[:, :num_image]), prompt_outputs], dim=1)
            else:
                x = method.shift(i, x)
            entering = None
            if flow[i] in (Flow.ENTER, Flow.MIX):
                last = (entered, prompt_outputs) if flow[i] is Flow.MIX else None
                # cast: the whole backbone may be in a 16-bit dtype
                entering = entered = method.tokens(i, x, last).to(x.dtype)
            if i + 1 == self.num_blocks:
                rows, with_prompts = self.pooled_rows(num_image, method.pool)
            else:
                with_prompts = flow[i + 1] in (Flow.KEEP, Flow.MIX)
                rows = slice(0, None if with_prompts else num_image)
            if entering is not None and with_prompts:
                x, entering = torch.cat([x, entering.expand(len(x), -1, -1)], dim=1), None
            x = self._run_block(i, x, num_image, rows, entering, method)
            if i + 1 < self.num_blocks:
                x, num_image = self.between(i + 1, x, num_image)
        return self.pool(x, method.pool)

    def _run_block(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run one block on the tokens x [B, n, width] and those entering, and return the outputs of `rows`.

        The block is driven (`drive`) if the method enters it, or if outputs can be left out; else carried.
        """
        start, stop, _ = rows.indices(x.shape[1])
        enters = bool(method.places) or method.keys_values(index) is not None
        all_read = entering is None and (start, stop) == (0, x.shape[1])
        driven = enters or (self.exact and not all_read and self.is_proven(self._block(index)))
        if entering is not None and not (driven and self.exact):
            x, entering = torch.cat([x, entering.expand(len(x), -1, -1)], dim=1), None
        if not driven:
            return self.carry(index, x, num_image)[:, start:stop]
        # all outputs are computed if `exact` is off, and if patches are read and a branch needs all of them
        if not self.exact or (not method.tokenwise and stop > self.num_prefix):
            return self.drive(index, x, num_image, slice(0, x.shape[1]), entering, method)[:, start:stop]
        return self.drive(index, x, num_image, slice(start, stop), entering, method)


def side_of(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a grid, inferred from its number of positions.

    Args:
        num_tokens: Number of positions.
        grid: Height and width for images of the backbone's own size; any other grid must be square.

    Raises:
        UserError: The number is neither that of `grid` nor a square.
    """
    if math.prod(grid) == num_tokens:
        return grid
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UserError(
            f"images of another size than the backbone's own must be square, and these have {num_tokens} "
            "positions: crop or resize them, or set backbone.image_size"
        )
    return side, side
