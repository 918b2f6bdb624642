"""What prompt tuning is compared with. Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.1.

Linear:    a linear head on frozen features.
Mlp-k:     a head of k linear layers; every hidden one is followed by ReLU, batch norm and dropout.
Partial-k: the last k residual blocks and the final norm. The released code counts stages on a ResNet; here
blocks,
           everywhere.
Full:      everything.

The paper says no more of Mlp-k than "k layers". That k counts the last layer too follows from its table 1:
Mlp-3 with two hidden layers of width d gives the 1.35 x total parameters stated there; three would give 1.52
x.
"""

import operator
from typing import ClassVar

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, init_linear
from visprompt.models.methods.adapters import check_probability


class Linear(Method):
    """Tunes the head on frozen features."""

    can_merge: ClassVar[bool] = True

    @property
    def first_block(self) -> int:
        """Behind the last block: no block sees anything tuned."""
        return self.num_blocks


class MLP(Linear):
    """Tunes a head of several layers on frozen features.

    Args:
        backbone: The backbone whose features it reads.
        num_layers: Linear layers of the head (k), the last one included.
        dropout: Dropout behind every hidden layer.

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
    """A classifier's last layer with hidden ones before it.

    It is the last layer, so that `weight` and `bias` mean in every head the same: the bias is not decayed.

    Args:
        width: Of the features and of every hidden layer (d).
        num_classes: Number of logits (C).
        num_hidden: Number of hidden layers.
        dropout: Dropout behind every hidden layer.
        init: Initialisation of the last layer.

    Attributes:
        hidden: The hidden layers, weights [d, d] kaiming fan-out (the released code's).
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


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes a batch of one image by its running statistics.

    The last batch may be that short.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


class Partial(Method):
    """Tunes the last blocks, what joins them, and the norm behind them, before or after the pooling.

    Args:
        backbone: The backbone that is tuned.
        num_blocks: Number of residual blocks (k), counted from the end through all stages.

    Raises:
        UserError: There are not as many blocks.
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
        # what stands between two stages is tuned where both of its neighbours are
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

    VPT's released code has no stochastic depth on ViT-B, and dropout of 0.1 behind the position embedding and
    behind both layers of every MLP: `drop_path=0, dropout=0.1`.

    Args:
        backbone: The backbone that is tuned.
        drop_path: Probability that the last block's branches are skipped for an image; it grows linearly from
            0 at the first block.
        dropout: Dropout behind the position embedding and in the MLPs of a transformer.

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
        """Set the stochastic depth of every residual branch that has one, and the dropout."""
        if self.dropout:
            self._drop(backbone)
        for i, block in enumerate(backbone.blocks):
            rate = self.drop_path * i / max(1, self.num_blocks - 1)
            for module in list(block.modules()):
                for name in [name for name in vars(module) | module._modules if name.startswith("drop_path")]:
                    setattr(module, name, DropPath(rate) if rate else nn.Identity())

    def _drop(self, backbone: Geometry) -> None:
        """Set the dropout; a GRN or gated MLP of timm has one or both of the two places."""
        places = [getattr(backbone.model, "pos_drop", None)]
        found = [(block, getattr(block, "mlp", None)) for block in backbone.blocks]
        if any(not isinstance(getattr(mlp, "drop2", None), nn.Dropout) for _, mlp in found):
            raise UserError(
                f"method.dropout={self.dropout} is of the MLPs of transformers, and this backbone has none "
                "with dropout: give method.dropout=0"
            )
        places += [getattr(mlp, name, None) for _, mlp in found for name in ("drop1", "drop2")]
        for place in places:
            if isinstance(place, nn.Dropout):
                place.p = self.dropout

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return every parameter."""
        return frozenset(name for name, _ in classifier.named_parameters())
