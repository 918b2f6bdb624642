"""What all families of backbones have in common, and the drive of those that are made of tokens.

A family is a file: it says where a method may enter (its sites), names the model's parts, and drives timm's
own modules block by block. Never compute what the loss cannot see: outputs that nobody reads are left out by
block classes that are re-driven exactly (`is_proven`), each tested against timm's own forward. Other blocks
carry the tokens.

From images to logits (here, `models/classifier.py` and `block.py`; a method is asked, and never calls):

    x = embed(method.pixels(images))                     # [B, n, width]: class token, patches
    for i, block in enumerate(blocks):                   # from_block
        x = method.shift(i, x)
        if flow[i] enters or mixes:                      # method.token_flow()
            entering = method.tokens(i, x)               # [1 or B, p, width], in place of the last block's
        read = the rows of x whose outputs are read      # the next block drops prompts; the pooling reads few
        tokens
        queries = LN(x[read]);  context = LN(the other rows), LN(entering)                    # run_block
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
        exact: False carries the prompt tokens through every block, as the papers' codes do; for comparison.

    Attributes:
        mean: Per channel, of pixels in 0..1: what its images are normalised with; None where nothing says it.
        std: The standard deviation likewise.
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
            UserError: It is of another class.
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
        """Height and width in pixels of the images it was built for."""
        return self.image_size, self.image_size

    def carried_blocks(self) -> list[int]:
        """Return indices of the blocks that carry prompt tokens in full.

        Their class is not proven, or `exact` is off.
        """
        return []

    def pooling(self, pool: str | None) -> str:
        """Return what the features are pooled of, in words for a record.

        A method's `pool`, or else timm's own word.
        """
        return pool or str(getattr(self.model, "global_pool", "avg"))

    def forward(self, images: Tensor, method: Method) -> Tensor:
        """Pooled features of a batch.

        Args:
            images: Normalised images [B, 3, H, W].
            method: Enters where it likes, see `methods.base`.

        Returns:
            Features [B, width] as the model's own head would get them.
        """
        return self.from_block(0, self.embed(images, method), method)

    def embed(self, images: Tensor, method: Method) -> Tensor:
        """Return what the first block gets of images [B, 3, H, W].

        Tokens [B, n, width], or maps [B, channels, h, w].
        """
        raise NotImplementedError

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Return the same, maps flat, before block `stop`, at or below the method's `first_block`.

        Nothing tuned is in it.
        """
        raise NotImplementedError

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Pooled features [B, width] of what `to_block` gave."""
        raise NotImplementedError

    def check_size(self, images: Tensor, method: Method) -> None:
        """Refuse images of other channels, or of another size than the backbone's own where a method needs that one.

        Raises:
            UserError: They have others.
        """
        if images.shape[1] != 3:
            raise UserError(
                f"images are [B, 3, height, width], and these have the shape {tuple(images.shape)}"
            )
        height, width = self.own_size
        if method.fixed_size and images.shape[-2:] != (height, width):
            raise UserError(
                f"this method needs images of the backbone's own size {height} x {width} and got "
                f"{images.shape[-2]} x {images.shape[-1]}: resize them, or set backbone.image_size"
            )


class TokenFamily(Family):
    """A family whose blocks take tokens; image tokens stand first, prompts behind them."""

    def carried_blocks(self) -> list[int]:
        """Return indices of the blocks that carry prompt tokens in full.

        Their class is not proven, or `exact` is off.
        """
        return [i for i, block in enumerate(self.blocks) if not (self.exact and self.is_proven(block))]

    def is_proven(self, block: nn.Module) -> bool:
        """Return whether `drive` computes exactly what this block computes."""
        raise NotImplementedError

    def drive(
        self, index: int, x: Tensor, num_image: int, rows: slice, entering: Tensor | None, method: Method
    ) -> Tensor:
        """Run a proven block so that a method can enter it and only what is read is computed.

        Tokens that are not read give keys and values only.

        Args:
            index: Of the block.
            x: Image tokens, behind them the prompts that flowed on, [B, n, width].
            num_image: Number of image tokens.
            rows: Those of x whose outputs are read, from 0 <= start < stop <= n.
            entering: Prompts whose outputs nobody reads, [B or 1, p, width].
            method: Asked for rows of keys and values and for branches.

        Returns:
            The block's outputs of `rows`.
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
        """Take image tokens, and prompts that flow on, to block `index`.

        Returns the image tokens' new number too.
        """
        return x, num_image

    def pooled_rows(self, num_image: int, pool: str | None) -> tuple[slice, bool]:
        """Return rows of the last block's output that the pooling reads, and whether prompts are among them."""
        raise NotImplementedError

    def pool(self, x: Tensor, pool: str | None) -> Tensor:
        """Norm and pools the rows chosen by `pooled_rows` as timm does before its classifier."""
        raise NotImplementedError

    def states(self, images: Tensor) -> list[Tensor]:
        """Return tokens [B, n, width] of images before each block and behind the last, without any method."""
        like, nobody = next(self.parameters()), Method(self)
        states = [self.embed(images.to(like.device, like.dtype), nobody)]
        for i in range(self.num_blocks):
            states.append(self._plain(i, states[-1]))
        return states

    def to_block(self, stop: int, images: Tensor, method: Method) -> Tensor:
        """Image tokens before block `stop`, at or below the method's `first_block`.

        Nothing tuned is in them.
        """
        x = self.embed(images, method)
        for i in range(stop):
            x = self._plain(i, x)
        return x

    def _plain(self, index: int, x: Tensor) -> Tensor:
        """Return a block on image tokens, and what stands behind it."""
        x = self.carry(index, x, x.shape[1])
        return self.between(index + 1, x, x.shape[1])[0] if index + 1 < self.num_blocks else x

    def from_block(self, start: int, x: Tensor, method: Method) -> Tensor:
        """Pooled features [B, width] of image tokens [B, n, width] before block `start`."""
        flow, num_image = method.token_flow(), x.shape[1]
        entered = x[:, num_image:]
        for i in range(start, self.num_blocks):
            out = x[:, num_image:]
            if flow[i] is not Flow.KEEP:
                x = x[:, :num_image]
            if flow[i] is Flow.KEEP and out.shape[1]:
                x = torch.cat([method.shift(i, x[:, :num_image]), out], dim=1)
            else:
                x = method.shift(i, x)
            entering = None
            if flow[i] in (Flow.ENTER, Flow.MIX):
                last = (entered, out) if flow[i] is Flow.MIX else None
                entering = entered = method.tokens(i, x, last).to(
                    x.dtype
                )  # a backbone may be in 16 bits throughout
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
        """Run one block on the tokens x [B, n, width] and those entering.

        Returns the outputs of `rows` of x.
        """
        start, stop, _ = rows.indices(x.shape[1])
        asks = bool(method.places) or method.keys_values(index) is not None
        all_read = entering is None and (start, stop) == (0, x.shape[1])
        driven = asks or (self.exact and not all_read and self.is_proven(self._block(index)))
        if entering is not None and not (driven and self.exact):
            x, entering = torch.cat([x, entering.expand(len(x), -1, -1)], dim=1), None
        if not driven:
            return self.carry(index, x, num_image)[:, start:stop]
        # not exact: every output is computed; and a branch that looks at its neighbours needs all patches, if
        # any
        if not self.exact or (not method.tokenwise and stop > self.num_prefix):
            return self.drive(index, x, num_image, slice(0, x.shape[1]), entering, method)[:, start:stop]
        return self.drive(index, x, num_image, slice(start, stop), entering, method)


def side_of(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a grid of positions.

    Args:
        num_tokens: How many there are.
        grid: What they are for images of the backbone's own size.

    Raises:
        UserError: There are others, and they fill no square.
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
