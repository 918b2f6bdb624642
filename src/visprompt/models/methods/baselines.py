"""The baselines of prompt tuning. Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.1.

Linear:    a linear head on frozen features.
Mlp-k:     a head of k linear layers; every hidden one is followed by ReLU, batch norm and dropout.
Partial-k: the last k residual blocks and the final norm. The released code counts stages on a ResNet; this
           code counts blocks on every backbone.
Full:      every parameter.

The paper describes Mlp-k only as "k layers". Its table 1 shows that k counts the last layer too: Mlp-3 with
two hidden layers of width d has the 1.35 x total parameters stated there; three would give 1.52 x.
"""

import operator
from typing import ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method
from visprompt.models.layers import init_linear
from visprompt.models.methods.checks import check_probability


class Linear(Method):
    """Tunes the head on frozen features."""

    can_merge: ClassVar[bool] = True

    @property
    def first_block(self) -> int:
        """The number of blocks: no block reads anything tuned."""
        return self.num_blocks


class MLP(Linear):
    """Tunes a head of several layers on frozen features.

    Args:
        backbone: The backbone whose features it reads.
        num_layers: Linear layers of the head (k), the last one included.
        dropout: Dropout after every hidden layer.

    Raises:
        UserError: A number lies outside its range.
    """

    can_merge: ClassVar[bool] = False

    def __init__(self, backbone: Geometry, num_layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__(backbone)
        if num_layers < 2:
            raise UserError(
                f"method.num_layers={num_layers} is too small: give at least 2, or use method=linear"
            )
        check_probability("dropout", dropout)
        self.num_layers, self.dropout = operator.index(num_layers), dropout

    def make_head(self, width: int, num_classes: int, init: str) -> nn.Module:
        """Build the head: features [B, width] -> logits [B, num_classes]."""
        return MLPHead(width, num_classes, self.num_layers - 1, self.dropout, init)


class MLPHead(nn.Linear):
    """A classifier's last layer, with hidden layers before it.

    The class derives from the last layer, so `head.weight` and `head.bias` mean the same as in a linear head;
    weight decay leaves out `head.bias` by that name.

    Args:
        width: Width of the features and of every hidden layer (d).
        num_classes: Number of logits (C).
        num_hidden: Number of hidden layers.
        dropout: Dropout after every hidden layer.
        init: Initialisation of the last layer, one of `HEAD_INITS`.

    Attributes:
        hidden: The hidden layers; weights [d, d], Kaiming-normal by fan-out as in the released code.
        weight: [C, d].
        bias: [C].
    """

    def __init__(self, width: int, num_classes: int, num_hidden: int, dropout: float, init: str) -> None:
        super().__init__(width, num_classes)
        layers: list[nn.Module] = []
        for _ in range(num_hidden):
            linear = nn.Linear(width, width)
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            layers += [linear, nn.ReLU(), _BatchNorm(width), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        init_linear(self, init)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, d]."""
        return super().forward(self.hidden(input))

    @torch.no_grad()
    def merged(self) -> nn.Sequential:
        """Return linear layers with the same logits in evaluation mode, the batch norms merged into them.

        A norm y = a x + c before a layer W y + b gives (W a) x + (b + W c).
        """
        layers: list[nn.Module] = []
        scale: Tensor | None = None
        shift: Tensor | None = None
        for layer in (*self.hidden, self):
            if isinstance(layer, nn.Linear):
                weight: Tensor = layer.weight
                bias: Tensor = layer.bias
                if scale is not None and shift is not None:
                    weight, bias = weight * scale, bias + weight @ shift
                merged = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
                merged.weight.copy_(weight)
                merged.bias.copy_(bias)
                layers.append(merged)
            elif isinstance(layer, nn.ReLU):
                layers.append(layer)
            elif isinstance(layer, _BatchNorm):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
                shift = layer.bias - layer.running_mean * scale
        return nn.Sequential(*layers)


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that uses its running statistics for a training batch of one image (the last may be one)."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


class Partial(Method):
    """Tunes the last blocks, the downsampling between them, and the norms after them, also after the pooling.

    Args:
        backbone: The backbone that is tuned.
        num_blocks: Number of residual blocks (k), counted from the end through all stages.

    Raises:
        UserError: The backbone has fewer blocks.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    can_merge: ClassVar[bool] = True

    def __init__(self, backbone: Geometry, num_blocks: int = 1) -> None:
        super().__init__(backbone)
        if not 1 <= num_blocks <= self.num_blocks:
            raise UserError(
                f"method.num_blocks={num_blocks} does not fit: give 1 to {self.num_blocks}, the backbone's "
                "blocks"
            )
        self._first = first = self.num_blocks - operator.index(num_blocks)
        # a downsampling between two stages is tuned if the blocks on both sides of it are
        between = [name for name in backbone.between_names[first + 1 :] if name is not None]
        self._names = (*backbone.block_names[first:], *between, *backbone.final_names)

    @property
    def first_block(self) -> int:
        """The first of the tuned blocks."""
        return self._first

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the head, the last blocks, and the final norms."""
        modules = [f"backbone.model.{name}" for name in self._names]
        tuned = (f"{m}.{name}" for m in modules for name, _ in classifier.get_submodule(m).named_parameters())
        return super().tuned_names(classifier) | frozenset(tuned)


class Full(Method):
    """Tunes every parameter, with stochastic depth or dropout on.

    VPT's released code uses no stochastic depth on ViT-B, but dropout of 0.1 after the position embedding and
    after both layers of every MLP: give `drop_path=0, dropout=0.1` for that.

    Args:
        backbone: The backbone that is tuned.
        drop_path: Probability that the last block's branches are skipped for an image; it grows linearly from
            0 at the first block.
        dropout: Dropout after the position embedding and in the MLPs of a transformer.

    Raises:
        UserError: A number is not a probability, or the backbone has no MLPs with dropout.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    trains_backbone: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def __init__(self, backbone: Geometry, drop_path: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__(backbone)
        for name, value in (("drop_path", drop_path), ("dropout", dropout)):
            check_probability(name, value)
        self.drop_path, self.dropout = drop_path, dropout

    def attach(self, backbone: Geometry) -> None:
        """Set the dropout, and the stochastic depth of every residual branch that has a place for it."""
        if self.dropout:
            self._set_dropout(backbone)
        for i, block in enumerate(backbone.blocks):
            rate = self.drop_path * i / max(1, self.num_blocks - 1)
            for module in list(block.modules()):
                for name in [name for name in vars(module) | module._modules if name.startswith("drop_path")]:
                    setattr(module, name, DropPath(rate) if rate else nn.Identity())

    def _set_dropout(self, backbone: Geometry) -> None:
        """Set the rate of the model's dropout layers; timm's MLPs have `drop2` and most also `drop1`."""
        mlps = [getattr(block, "mlp", None) for block in backbone.blocks]
        if any(not isinstance(getattr(mlp, "drop2", None), nn.Dropout) for mlp in mlps):
            raise UserError(
                f"method.dropout={self.dropout} needs transformer MLPs with dropout layers, which this "
                "backbone does not have: give method.dropout=0"
            )
        layers = [getattr(backbone.model, "pos_drop", None)]
        layers += [getattr(mlp, name, None) for mlp in mlps for name in ("drop1", "drop2")]
        for layer in layers:
            if isinstance(layer, nn.Dropout):
                layer.p = self.dropout

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the names of all parameters."""
        return frozenset(name for name, _ in classifier.named_parameters())
