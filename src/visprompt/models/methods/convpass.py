"""Convpass: convolutional bypasses.

Jie and Deng, Convolutional Bypasses Are Better Vision Transformer Adapters, 2022.

    x <- x + Attention(LN(x)) + s * Bypass(LN(x));    x <- x + MLP(LN(x)) + s * Bypass'(LN(x))
    Bypass(z) = Up(GELU(Conv(GELU(Down(z)))))

Down and Up are linear per token (1x1). Conv is a 3x3 convolution over the grid of patches; the class token is
convolved as an image of one pixel, so only the centre of the kernel multiplies it.

Each bypass outputs zero at first, because Up starts at zero. Different from the released code: GELU as the
paper says, where the code approximates it by x * sigmoid(1.702 x); register tokens are treated as the class
token is; any grid and bottleneck are possible.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import unknown
from visprompt.models.contract import Geometry, Method, Place
from visprompt.models.methods.checks import check_probability, check_scale, check_size

_ORDER = (Place.ATTENTION, Place.MLP)  # order of a block's two bypasses in the stacked parameters


class Convpass(Method):
    """Two convolutional bypasses in every block, parallel to its attention and to its MLP.

    Args:
        backbone: The backbone whose width, grid and number of blocks shape the bypasses.
        bottleneck: Channels of the convolution (r).
        scale: Factor on the output of both bypasses (s); the released code chooses 0.01 to 100 per task.
        dropout: Dropout before Up.
        init: Initialisation of the convolution: "identity" (each channel passes unchanged) or "xavier".

    Attributes:
        down: [blocks, 2, width, bottleneck], Xavier-uniform; the second axis is attention, MLP.
        down_bias: [blocks, 2, bottleneck], zero at first.
        conv: [blocks, 2, bottleneck, bottleneck, 3, 3].
        conv_bias: [blocks, 2, bottleneck], zero at first.
        up: [blocks, 2, bottleneck, width], zero at first.
        up_bias: [blocks, 2, width], zero at first.

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"branches", "stream"})
    places: ClassVar[frozenset[Place]] = frozenset(_ORDER)
    fixed_size = True  # the convolution needs the grid of patches
    tokenwise: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Geometry,
        bottleneck: int = 8,
        scale: float = 1.0,
        dropout: float = 0.1,
        init: str = "identity",
    ) -> None:
        super().__init__(backbone)
        check_size("bottleneck", bottleneck)
        check_scale(scale)
        check_probability("dropout", dropout)
        if init not in ("identity", "xavier"):
            raise unknown("method.init", init, ("identity", "xavier"))
        self.num_prefix, self.grid = backbone.num_prefix, backbone.grids[0]
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        stack, width = (self.num_blocks, len(_ORDER)), backbone.width
        bound = math.sqrt(6 / (width + bottleneck))
        self.down = nn.Parameter(torch.empty(*stack, width, bottleneck).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.zeros(*stack, bottleneck))
        self.conv = nn.Parameter(_kernel(bottleneck, init, stack))
        self.conv_bias = nn.Parameter(torch.zeros(*stack, bottleneck))
        self.up = nn.Parameter(torch.zeros(*stack, bottleneck, width))
        self.up_bias = nn.Parameter(torch.zeros(*stack, width))

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the scaled bypass of normed image tokens [B, n, width]: all, or those before the patches."""
        assert normed is not None  # both places have a norm
        index = (block, _ORDER.index(place))
        hidden = F.gelu(F.linear(normed, self.down[index].T, self.down_bias[index]))
        hidden = F.gelu(self._convolve(hidden, self.conv[index], self.conv_bias[index]))
        return self.scale * F.linear(self.dropout(hidden), self.up[index].T, self.up_bias[index])

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Convolve tokens [B, n, r] with a kernel [r, r, 3, 3].

        Patches are convolved over their grid. Class and register tokens each see only the kernel's centre.
        """
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        prefix = F.linear(prefix, kernel[:, :, 1, 1], bias)
        if not patches.shape[1]:  # in the last block, if the pooling reads no patches
            return prefix
        patches = F.conv2d(patches.transpose(1, 2).unflatten(2, self.grid), kernel, bias, padding=1)
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def _kernel(channels: int, init: str, stack: tuple[int, int]) -> Tensor:
    """Return initial kernels [*stack, channels, channels, 3, 3]."""
    if init == "xavier":
        bound = math.sqrt(6 / (2 * 9 * channels))
        return torch.empty(*stack, channels, channels, 3, 3).uniform_(-bound, bound)
    kernel = torch.zeros(*stack, channels, channels, 3, 3)
    kernel[..., 1, 1] = torch.eye(channels)
    return kernel
