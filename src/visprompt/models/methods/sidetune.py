"""Side-tuning.

Zhang et al., Side-Tuning, ECCV 2020, in the form of Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.1.

    features = a * B(x) + (1 - a) * W S(x),  a = sigmoid(alpha),  alpha = 0 at the start

B is the frozen backbone, S torchvision's AlexNet up to its pooling (256 maps of 6 x 6 for images of every
size), W a linear layer without bias from those 9216 numbers to the backbone's width. S, W and alpha are
tuned. As in the released code, S reads images normalised for the backbone.

Different from the released code: nothing is downloaded, the pre-trained S comes from a file that the user
names; and images with a side below 63, too small for the poolings of S, are enlarged to that side.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method

RANDOM = "random"
_CHANNELS, _POOLED = 256, 6
_SMALLEST = 63  # side of the smallest image for which AlexNet's last pooling has an output


class SideTune(Method):
    """Mixes the frozen features with those of a small side network that is trained.

    Args:
        backbone: The backbone whose width is that of the side network's features.
        weights: "random", or a file of torchvision's AlexNet weights (the paper's), such as
            alexnet-owt-7be5be79.pth.

    Attributes:
        alpha: Scalar; sigmoid(alpha) is the backbone's share.
        side: AlexNet's convolutions, under torchvision's numbers.
        projection: Its weight is [width, 9216].

    Raises:
        UserError: There is no such file, or it does not hold AlexNet's weights.
    """

    def __init__(self, backbone: Geometry, weights: str = RANDOM) -> None:
        super().__init__(backbone)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.side = alexnet_features()
        self.projection = nn.Linear(_CHANNELS * _POOLED**2, backbone.width, bias=False)
        self._shape: tuple[int, ...] = ()  # of the images that were stored
        if weights != RANDOM:
            _load(self.side, Path(weights).expanduser())

    @property
    def first_block(self) -> int:
        """The number of blocks: the backbone's features are the same in every epoch."""
        return self.num_blocks

    def stored(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Return the backbone's features and, for the side network, the pixels: [B, width + 3 * H * W]."""
        self._shape = tuple(images.shape[1:])
        return torch.cat([pooled, images.flatten(1)], dim=1)

    def resumed(self, stored: Tensor) -> Tensor:
        """Return the mixed features [B, width] from rows that `stored` returned for images of one size."""
        pooled, pixels = stored.split([self.projection.out_features, math.prod(self._shape)], dim=1)
        return self.features(pooled, pixels.unflatten(1, self._shape))

    def features(self, pooled: Tensor, images: Tensor) -> Tensor:
        """Mix the backbone's features [B, width] with the side network's of images [B, 3, H, W]."""
        share = self.alpha.sigmoid()
        return share * pooled + (1 - share) * self._side_features(images)

    def _side_features(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < _SMALLEST:
            size = (max(height, _SMALLEST), max(width, _SMALLEST))
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        maps = F.adaptive_avg_pool2d(self.side(images), _POOLED)
        out: Tensor = self.projection(maps.flatten(1))
        return out


def alexnet_features() -> nn.Sequential:
    """Build AlexNet's convolutions as in torchvision, whose class also draws a head of 59 million weights."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, _CHANNELS, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(_CHANNELS, _CHANNELS, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


def _load(side: nn.Sequential, file: Path) -> None:
    """Load the convolutions from a file of AlexNet's weights; its classifier is ignored."""
    if not file.is_file():
        raise UserError(
            f"there is no file of AlexNet weights at {file}: correct method.weights=..., or give {RANDOM}"
        )
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        parts = {name.partition("."): tensor for name, tensor in tensors.items()}
        side.load_state_dict(
            {rest: tensor for (first, _, rest), tensor in parts.items() if first == "features"}
        )
    except Exception as error:  # torch's readers raise many kinds of exceptions
        raise UserError(
            f"{file} does not hold the weights of torchvision's AlexNet ({type(error).__name__}): "
            f"correct method.weights=..., or give {RANDOM}"
        ) from error
