"""Adapters: a small bottleneck in every block, on, beside or behind its MLP.

Adapter      y + Up(GELU(Down(y))) on the output y of the MLP, before it is added to the stream. Pfeiffer et
al.,
             AdapterFusion, EACL 2021; the baseline of Jia et al., Visual Prompt Tuning, ECCV 2022, section
             4.1.
AdaptFormer  x + MLP(LN(x)) + s * Up(ReLU(Down(x))). Chen et al., AdaptFormer, NeurIPS 2022, equations 2 and
3.
Adapter+     x + g * Up(GELU(Down(x))) behind the block, g one number per channel. Steitz and Roth, Adapters
Strike
             Back, CVPR 2024, section 3.

Each starts equal to the backbone, because Up starts at zero; only Adapter+ with init=houlsby draws Up, too.

Different from the released codes. VPT's zeroes Down and Up alike: with both at zero neither ever gets a
gradient, and all that its adapter trains is the bias of Up; here Down is drawn. AdaptFormer's paper norms the
input of the branch; its code does not, and neither does this. Adapter+ draws Up as it draws Down
(init=houlsby does so here) and keeps weight decay off biases and scales.
"""

import math
from collections.abc import Callable
from typing import ClassVar

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError, unknown
from visprompt.models.contract import Geometry, Method, Place, per_block

_STD = 0.01  # of Adapter+'s truncated normal, which is cut at two of them


class Bottleneck(Method):
    """One bottleneck in every block: Down, an activation, Up; where it stands is for its subclasses to say.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r); None means an eighth of the block's.

    Attributes:
        down: [blocks, width, bottleneck], as PyTorch draws a linear layer: U(-1, 1) / sqrt(width).
        down_bias: [blocks, bottleneck], zero at first.
        up: [blocks, bottleneck, width], zero at first.
        up_bias: [blocks, width], zero at first. Where the blocks' widths differ, each is a list over the
            blocks.

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
        """Up(activation(Down(x))) of a block's tokens [B, n, width]."""
        hidden = activation(F.linear(x, self.down[block].T, self.down_bias[block]))
        return F.linear(hidden, self.up[block].T, self.up_bias[block])


class Adapter(Bottleneck):
    """The adapter of the VPT paper: on the output of every MLP.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r); None means an eighth of the block's. The paper tries 8, 64 and
            256.

    Attributes:
        down: See `Bottleneck`, as for `down_bias`, `up` and `up_bias`.

    Raises:
        UserError: The bottleneck is smaller than 1.
    """

    places: ClassVar[frozenset[Place]] = frozenset({Place.OUTPUT})

    def __init__(self, backbone: Geometry, bottleneck: int | None = None) -> None:
        super().__init__(backbone, bottleneck)

    def branch(self, place: Place, block: int, x: Tensor, normed: Tensor | None) -> Tensor:
        """Up(GELU(Down(x))) of the MLP's output x [B, n, width]."""
        return self.squeeze(block, x, F.gelu)


class AdaptFormer(Bottleneck):
    """A scaled bottleneck beside every MLP, on the stream before the norm.

    Args:
        backbone: The backbone whose width and number of blocks shape the bottlenecks.
        bottleneck: Width of a bottleneck (r).
        scale: Of the branch (s).
        dropout: Dropout behind the activation (the released code's).

    Attributes:
        down: See `Bottleneck`, as for `down_bias`, `up` and `up_bias`.

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
        """Return the scaled bottleneck of the stream x [B, n, width]."""
        return self.scale * self.squeeze(block, x, lambda hidden: self.dropout(F.relu(hidden)))


class AdapterPlus(Bottleneck):
    """A bottleneck with a learned scale per channel behind every block, and stochastic depth of its own.

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
    undecayed: ClassVar[frozenset[str]] = frozenset(
        {"down_bias", "up_bias", "scale"}
    )  # as in the released code

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
        """Return the scaled bottleneck of the stream x [B, n, width], zero for the images that skip it."""
        out: Tensor = self.drop_path(self.squeeze(block, x, F.gelu))
        return out * self.scale[block].to(out.dtype)  # under autocast the branch stays in its precision


def draw_linear(weight: Tensor, inputs: int = -2) -> None:
    """Draw [..., inputs, outputs], or with its inputs along another axis, from U(-1, 1) / sqrt(inputs), as PyTorch."""
    bound = 1 / math.sqrt(weight.shape[inputs])
    weight.uniform_(-bound, bound)


def check_size(name: str, value: int) -> None:
    """Raise a UserError unless an option's value is 1 or more."""
    if value < 1:
        raise UserError(f"method.{name}={value} is too small: give at least 1, or use method=linear")


def check_rank(value: int, width: int) -> None:
    """Raise a UserError unless the rank of an update is one that layers of a width can have."""
    check_size("rank", value)
    if value > width:
        raise UserError(
            f"method.rank={value} is beyond the width {width} of the layers, whose updates have no higher "
            f"rank: give 1 to {width}"
        )


def check_scale(value: float) -> None:
    """Raise a UserError unless `scale` is a positive number."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"method.scale={value} cannot scale what is tuned: give a number above 0")


def check_probability(name: str, value: float) -> None:
    """Raise a UserError unless an option's value lies in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"method.{name}={value} is not a probability: give a number from 0 to below 1")
