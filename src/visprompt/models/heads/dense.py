"""What the heads of dense tasks share."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from visprompt.models.contract import Geometry


class DenseHead(nn.Module):
    """Maps of some blocks -> logits of each pixel.

    Args:
        backbone: The backbone whose maps it reads.
        num_classes: Number of classes (C).
        init: Initialisation of the last layers, one of `recipe.HEAD_INITS`.

    Attributes:
        blocks: Indices of the blocks whose outputs it reads, in ascending order.
        normed: Whether the backbone's norm after the last block is applied to the last of these outputs.
    """

    blocks: tuple[int, ...]
    normed: bool

    def __init__(self, backbone: Geometry, num_classes: int, init: str) -> None:
        super().__init__()

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits [B, C, *size].

        Args:
            maps: The outputs of `blocks`, each [B, width, height, width] of patches.
            size: Height and width of the images in pixels.
        """
        raise NotImplementedError

    def losses(self, of: Callable[[Tensor], Tensor]) -> Tensor | float:
        """Return what is added to the loss of each image, [B] or 0; called after each forward in training.

        Args:
            of: Function of logits [B, C, H, W] that returns the loss of each image, [B].
        """
        return 0.0
