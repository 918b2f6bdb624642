"""A linear layer on the patches of the last block."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.contract import Geometry
from visprompt.models.heads.dense import DenseHead
from visprompt.models.layers import init_linear


class LinearHead(DenseHead):
    """Gives each patch logits by a linear layer, and interpolates them to pixels.

    The last block's outputs are normed as the backbone norms them. Interpolation and the linear layer are
    both linear, so their order does not matter; this one computes less.

    Attributes:
        weight: [C, width].
        bias: [C].
    """

    def __init__(self, backbone: Geometry, num_classes: int, init: str) -> None:
        super().__init__(backbone, num_classes, init)
        self.blocks, self.normed = (backbone.num_blocks - 1,), True
        layer = init_linear(nn.Linear(backbone.widths[-1], num_classes), init)
        self.weight, self.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits [B, C, *size] of the last block's map."""
        logits = F.conv2d(maps[-1], self.weight[:, :, None, None], self.bias)
        # in float32: interpolation is in none of autocast's lists
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
