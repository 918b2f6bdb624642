"""Adapters: a small bottleneck in every block, on the output of its MLP, parallel to it, or after the block.

Adapter      y + Up(GELU(Down(y))) on the output y of the MLP, before it is added to the residual stream.
             Pfeiffer et al., AdapterFusion, EACL 2021; the baseline of Jia et al., Visual Prompt Tuning,
             ECCV 2022, section 4.1.
AdaptFormer  x + MLP(LN(x)) + s * Up(ReLU(Down(x))). Chen et al., AdaptFormer, NeurIPS 2022, eq. 2, 3.
Adapter+     x + g * Up(GELU(Down(x))) after the block, with g one number per channel. Steitz and Roth,
             Adapters Strike Back, CVPR 2024, section 3.

With Up at zero the tuned model starts equal to the backbone; only Adapter+ with init=houlsby draws Up.

Different from the released codes: VPT's code sets both Down and Up to zero, so neither ever gets a gradient
and its adapter trains the bias of Up alone; here Down is drawn at random. AdaptFormer's paper normalises the
input of the branch; its code does not, and neither does this one. Adapter+'s code draws Up like Down
(init=houlsby here) and applies no weight decay to biases and scales, as here.
"""

import math
from collections.abc import Callable
from typing import ClassVar

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import unknown
from visprompt.models.contract import Geometry, Method, Place
from visprompt.models.layers import per_block
from visprompt.models.methods.checks import check_probability, check_scale, check_size

_STD = 0.01  # of Adapter+'s truncated normal, which is cut at two of them


class Bottleneck(Method):
    """One bottleneck in every block: Down, an activation, Up; a subclass decides where its output is added.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r); None means an eighth of the block's.

    Attributes:
        down: [blocks, width, bottleneck], as PyTorch draws a linear layer: U(-1, 1) / sqrt(width).
        down_bias: [blocks, bottleneck], zero at first.
        up: [blocks, bottleneck, width], zero at first.
        up_bias: [blocks, width], zero at first.

    Where the blocks' widths differ, each attribute is a list over the blocks.

    Raises:
        UserError: The bottleneck is smaller than 1.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"branches"})

    def __init__(self, backbone: Geometry, bottleneck: int | None) -> None:
        super().__init__(backbone)
        sizes = [(width, width // 8 if bottleneck is None else bottleneck) for width in backbone.widths]
        check_size("bottleneck", min(size for _, size in sizes))
        self.down = per_block(sizes, draw_linear)
        self.down_bias = per_block([(size,) for _, size in sizes], nn.init.zeros_)
        self.up = per_block([(size, width) for width, size in sizes], nn.init.zeros_)
        self.up_bias = per_block([(width,) for width, _ in sizes], nn.init.zeros_)

    def squeeze(self, block: int, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return Up(activation(Down(x))) of a block's tokens [B, n, width]."""
        hidden = activation(F.linear(x, self.down[block].T, self.down_bias[block]))
        return F.linear(hidden, self.up[block].T, self.up_bias[block])


class Adapter(Bottleneck):
    """The adapter of the VPT paper: on the output of every MLP.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r); None means an eighth of the block's. The paper tries 8, 64 and
            256.

    Attributes:
        down, down_bias, up, up_bias: See `Bottleneck`.

    Raises:
        UserError: The bottleneck is smaller than 1.
    """

    places: ClassVar[frozenset[Place]] = frozenset({Place.OUTPUT})

    def __init__(self, backbone: Geometry, bottleneck: int | None = None) -> None:
        super().__init__(backbone, bottleneck)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return Up(GELU(Down(x))) of the MLP's output x [B, n, width]."""
        return self.squeeze(block, x, F.gelu)


class AdaptFormer(Bottleneck):
    """A scaled bottleneck parallel to every MLP, on the residual stream before the norm.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r).
        scale: Factor on the branch's output (s).
        dropout: Dropout after the activation, as in the released code.

    Attributes:
        down, down_bias, up, up_bias: See `Bottleneck`.

    Raises:
        UserError: A number lies outside its range.
    """

    places: ClassVar[frozenset[Place]] = frozenset({Place.MLP})

    def __init__(
        self, backbone: Geometry, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.1
    ) -> None:
        super().__init__(backbone, bottleneck)
        check_scale(scale)
        check_probability("dropout", dropout)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the scaled bottleneck of the residual stream x [B, n, width]."""
        return self.scale * self.squeeze(block, x, lambda hidden: self.dropout(F.relu(hidden)))


class AdapterPlus(Bottleneck):
    """A bottleneck with a learned scale per channel after every block, with its stochastic depth.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r).
        drop_path: Probability that a block's adapter is skipped for an image in training, the same in all
            blocks.
        init: "zero": Up starts at zero; "houlsby": it is drawn as Down is, as in the released code.

    Attributes:
        down: [blocks, width, bottleneck], N(0, 0.01^2) cut at two standard deviations.
        down_bias: [blocks, bottleneck], zero at first.
        up: [blocks, bottleneck, width].
        up_bias: [blocks, width], zero at first.
        scale: [blocks, width], one at first (g).

    Raises:
        UserError: A number lies outside its range, or a word is unknown.
    """

    places: ClassVar[frozenset[Place]] = frozenset({Place.AFTER})
    # as in the released code
    undecayed: ClassVar[frozenset[str]] = frozenset({"down_bias", "up_bias", "scale"})

    def __init__(
        self, backbone: Geometry, bottleneck: int = 8, drop_path: float = 0.1, init: str = "zero"
    ) -> None:
        super().__init__(backbone, bottleneck)
        check_probability("drop_path", drop_path)
        if init not in ("zero", "houlsby"):
            raise unknown("method.init", init, ("zero", "houlsby"))
        self.drop_path = DropPath(drop_path)
        self.scale = per_block([(width,) for width in backbone.widths], nn.init.ones_)
        for weights in (self.down, self.up) if init == "houlsby" else (self.down,):
            for weight in [weights] if isinstance(weights, nn.Parameter) else weights:
                nn.init.trunc_normal_(weight, std=_STD, a=-2 * _STD, b=2 * _STD)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Return the scaled bottleneck of the residual stream x [B, n, width]; zero for skipped images."""
        out: Tensor = self.drop_path(self.squeeze(block, x, F.gelu))
        return out * self.scale[block].to(out.dtype)  # under autocast the branch stays in its precision


def draw_linear(weight: Tensor, inputs: int = -2) -> None:
    """Draw a weight in place from U(-1, 1) / sqrt(inputs), as PyTorch draws a linear layer.

    Args:
        weight: [..., inputs, outputs], or any order of the axes.
        inputs: The axis of the inputs.
    """
    bound = 1 / math.sqrt(weight.shape[inputs])
    weight.uniform_(-bound, bound)
