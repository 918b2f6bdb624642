"""The base of all families of backbones.

A family is one file: it says where a method may enter (its sites), names the model's parts, and runs timm's
modules block by block. Outputs that the loss does not depend on are not computed, if the block's class is
"proven" (`is_proven`): re-implemented exactly, and tested against timm's forward. Other blocks run timm's
forward on all tokens ("carry" them).
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.contract import Method


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

    def maps(self, images: Tensor, method: Method, blocks: Sequence[int], normed: bool) -> list[Tensor]:
        """Return the outputs of blocks as maps, for heads that read every patch.

        Blocks after the last of them are not run, and outputs that are neither read here nor by the next
        block (class token, prompts) are not computed.

        Args:
            images: Normalised images [B, 3, H, W] of the backbone's own size.
            method: The method.
            blocks: Indices of the blocks, in ascending order.
            normed: Whether the norm after the last block is applied to the last of the maps.

        Returns:
            For each block [B, width, height, width of the map].
        """
        return self.maps_from(0, self.embed(images, method), method, blocks, normed)

    def maps_from(
        self, start: int, x: Tensor, method: Method, blocks: Sequence[int], normed: bool
    ) -> list[Tensor]:
        """Return the `maps` of blocks from what `to_block` returned for block `start`."""
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
