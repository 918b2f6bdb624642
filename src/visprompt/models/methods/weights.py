"""Tuning of some of the backbone's parameters, alone or together with prompts.

Bias:       every bias. Ben Zaken et al., BitFit, ACL 2022; Cai et al., TinyTL, NeurIPS 2020; the "Bias" of
            Jia et al., Visual Prompt Tuning, ECCV 2022, section 4.1. The bias of the keys is included: the
            softmax is invariant to it, but it is stored in one tensor with those of queries and values.
VPT + bias: the same with prompts, shallow or deep (Jia et al., appendix).
LayerNorm:  scale and shift of every layer norm, on a ResNet of every batch norm. De Min et al., On the
            Effectiveness of LayerNorm Tuning for Continual Learning in Vision Transformers, ICCV workshops
            2023; Frankle et al., Training BatchNorm and Only BatchNorm, ICLR 2021.

The released VPT code tunes every parameter with "bias" anywhere in its name; here the last part of the name
decides, which is the same set on a plain ViT. On Swin that code also tunes the tables of relative position
biases; here they are an option of Bias, `relative_positions=true`. On convolutional networks it trains only
the head; here the biases of norms and convolutions are tuned too.
"""

from typing import ClassVar

from torch import nn

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method
from visprompt.models.methods.vpt import VPT

_NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


class Bias(Method):
    """Tunes every bias of the backbone.

    Args:
        backbone: The backbone that is tuned.
        relative_positions: Whether Swin's tables of relative positions are tuned too.

    Raises:
        UserError: The backbone has no bias, or no such table (raised by `attach`).
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    can_merge: ClassVar[bool] = True

    def __init__(self, backbone: Geometry, relative_positions: bool = False) -> None:
        super().__init__(backbone)
        self.relative_positions = relative_positions

    def attach(self, backbone: Geometry) -> None:
        """Refuse a backbone without the parameters that are to be tuned; change nothing."""
        _require(bias_names(backbone.model), "biases")
        if self.relative_positions:
            _require(table_names(backbone.model), "tables of relative positions")

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the names of the head, the backbone's biases and, if asked for, its tables of positions."""
        backbone = classifier.get_submodule("backbone")
        tables = table_names(backbone) if self.relative_positions else frozenset()
        return super().tuned_names(classifier) | _of_backbone(bias_names(backbone) | tables)


class VPTBias(VPT):
    """VPT that tunes every bias of the backbone as well; options and attributes are those of `VPT`.

    Raises:
        UserError: As `VPT`, or the backbone has no bias (raised by `attach`).
    """

    sites: ClassVar[frozenset[str]] = VPT.sites | {"weights"}

    @property
    def first_block(self) -> int:
        """0, whichever blocks have prompts: biases are tuned from the first block on."""
        return 0

    def attach(self, backbone: Geometry) -> None:
        """Refuse a backbone without any bias."""
        super().attach(backbone)
        _require(bias_names(backbone.model), "biases")

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the names of the head, the prompts and the backbone's biases.

        The biases of an attention pooling are left out if `pool` replaces that pooling.
        """
        names = bias_names(classifier.get_submodule("backbone"))
        if self.pool is not None:
            names = frozenset(name for name in names if not name.startswith("model.attn_pool."))
        return super().tuned_names(classifier) | _of_backbone(names)


class LayerNorm(Method):
    """Tunes scale and shift of every layer norm and batch norm of the backbone.

    Layer norms inside attentions are included. A batch norm keeps its pre-trained statistics.

    Raises:
        UserError: The backbone has no such norm (raised by `attach`); others, such as RmsNorm, are not tuned.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    can_merge: ClassVar[bool] = True

    def attach(self, backbone: Geometry) -> None:
        """Refuse a backbone without any layer norm or batch norm; change nothing."""
        _require(norm_names(backbone.model), "layer or batch norms")

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the names of the head and of the parameters of every layer norm and batch norm."""
        names = norm_names(classifier.get_submodule("backbone"))
        return super().tuned_names(classifier) | _of_backbone(names)


def bias_names(module: nn.Module) -> frozenset[str]:
    """Return the names of all biases in a module, including `q_bias` and `v_bias` of EVA's attention."""
    pairs = ((name, name.rpartition(".")[2]) for name, _ in module.named_parameters())
    return frozenset(name for name, last in pairs if last == "bias" or last.endswith("_bias"))


def table_names(module: nn.Module) -> frozenset[str]:
    """Return the names of Swin's tables of relative position biases in a module."""
    names = (name for name, _ in module.named_parameters())
    return frozenset(name for name in names if name.endswith("relative_position_bias_table"))


def norm_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of all layer norms and batch norms in a module."""
    norms = [(name, norm) for name, norm in module.named_modules() if isinstance(norm, _NORMS)]
    return frozenset(
        f"{name}.{parameter}" for name, norm in norms for parameter, _ in norm.named_parameters(recurse=False)
    )


def _of_backbone(names: frozenset[str]) -> frozenset[str]:
    return frozenset(f"backbone.{name}" for name in names)


def _require(names: frozenset[str], what: str) -> None:
    if not names:
        raise UserError(f"this backbone has no {what} to tune: choose another method, or another backbone")
