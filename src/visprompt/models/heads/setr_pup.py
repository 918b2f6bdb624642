"""The head of VPT's segmentation table: SETR's progressive upsampling, with three auxiliary heads.

Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers, CVPR
2021 (SETR-PUP); Jia et al., Visual Prompt Tuning, ECCV 2022, table 3. As mmsegmentation's configuration of
SETR-PUP for ADE20K (ViT-L/16) has it:

    main:       LN -> 4 x (3x3 convolution to 256, batch norm, ReLU, 2x bilinear) -> 1x1 convolution
    auxiliary:  LN -> 2 x (3x3 convolution to 256, batch norm, ReLU, 4x bilinear) -> 1x1 convolution
    loss = CE(main) + 0.4 * sum of CE(auxiliary), which read blocks 10, 15 and 20 of 24

The main head reads the last block, without the backbone's norm. Backbones of another depth give the blocks at
the same shares of it, rounded up. 13.14 million parameters for 150 classes on ViT-L (the paper: 13.18).
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.models.contract import Geometry
from visprompt.models.heads.dense import DenseHead
from visprompt.models.layers import init_linear
from visprompt.models.segmentation import resized

CHANNELS = 256
AUXILIARY_WEIGHT = 0.4
_AUXILIARY = (10, 15, 20)  # of 24 blocks, counted from 1


class SETRPUP(DenseHead):
    """Upsamples the last block's map in four steps; in training three other blocks are classified too.

    Attributes:
        main: The main head.
        auxiliary: The auxiliary heads; not computed in evaluation.
    """

    def __init__(self, backbone: Geometry, num_classes: int, init: str) -> None:
        super().__init__(backbone, num_classes, init)
        depth = backbone.num_blocks
        self.blocks = (*(math.ceil(depth * place / 24) - 1 for place in _AUXILIARY), depth - 1)
        self.normed = False
        widths = [backbone.widths[block] for block in self.blocks]
        self.main = _Upsampling(widths[-1], num_classes, 4, 2, init)
        self.auxiliary = nn.ModuleList(_Upsampling(width, num_classes, 2, 4, init) for width in widths[:-1])
        self._others: list[Tensor] = []

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits [B, C, *size]; in training those of the auxiliary heads are kept for `losses`."""
        self._others = []
        if self.training:
            pairs = zip(self.auxiliary, maps[:-1], strict=True)
            self._others = [resized(head(one).float(), size) for head, one in pairs]
        return resized(self.main(maps[-1]).float(), size)

    def losses(self, of: Callable[[Tensor], Tensor]) -> Tensor | float:
        """Return 0.4 times the losses [B] of the auxiliary heads."""
        others, self._others = self._others, []
        return AUXILIARY_WEIGHT * sum(map(of, others))


class _Upsampling(nn.Module):
    """Convolutions, each followed by an upsampling, and a 1x1 convolution to logits.

    Args:
        width: Channels of the map that it reads.
        num_classes: Number of classes.
        steps: Number of convolutions.
        factor: By which each step enlarges height and width.
        init: Initialisation of the last convolution.
    """

    def __init__(self, width: int, num_classes: int, steps: int, factor: int, init: str) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(width, eps=1e-6)
        convs = [nn.Conv2d(c, CHANNELS, 3, padding=1, bias=False) for c in [width, *[CHANNELS] * (steps - 1)]]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in convs)
        last = init_linear(nn.Linear(CHANNELS, num_classes), init)
        self.last = nn.Conv2d(CHANNELS, num_classes, 1)
        self.last.weight.data, self.last.bias.data = last.weight.data[:, :, None, None], last.bias.data  # type: ignore[union-attr]  # it has a bias

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, C, h', w'] of a map [B, width, h, w]."""
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
            x = F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)
        logits: Tensor = self.last(x)
        return logits
