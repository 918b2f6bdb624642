"""Tuning a few of the backbone's own numbers, alone or together with prompts.

Bias:       every bias. Ben Zaken et al., BitFit, ACL 2022; Cai et al., TinyTL, NeurIPS 2020; the "Bias" of
Jia et al.,
            Visual Prompt Tuning, ECCV 2022, section 4.1. That of the keys is among them, though softmax
            cannot see it: it lies in one tensor with those of queries and values.
VPT + bias: the same with prompts, shallow or deep (Jia et al., appendix).
LayerNorm:  scale and shift of every layer norm, on a ResNet of every batch norm. De Min et al., On the
Effectiveness of
            LayerNorm Tuning for Continual Learning in Vision Transformers, ICCV workshops 2023; Frankle et
            al., Training BatchNorm and Only BatchNorm, ICLR 2021.

The released VPT code takes every parameter that has "bias" somewhere in its name; here the last part of the
name decides, which on a plain ViT is the same set. On Swin that code takes the tables of relative positions
too, which are no biases in this sense: `relative_positions=true` of Bias. On its conv nets it trains the head
alone, here the biases of norms and convolutions as well.
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
        UserError: `attach` finds no bias, or no table.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    can_merge: ClassVar[bool] = True

    def __init__(self, backbone: Geometry, relative_positions: bool = False) -> None:
        super().__init__(backbone)
        self.relative_positions = relative_positions

    def attach(self, backbone: Geometry) -> None:
        """Change nothing; refuses a backbone without what is to be tuned."""
        _require(bias_names(backbone.model), "biases")
        if self.relative_positions:
            _require(table_names(backbone.model), "tables of relative positions")

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the head, every bias of the backbone and, where asked for, its tables of relative positions."""
        backbone = classifier.get_submodule("backbone")
        tables = table_names(backbone) if self.relative_positions else frozenset()
        return super().tuned_names(classifier) | _of_backbone(bias_names(backbone) | tables)


class VPTBias(VPT):
    """VPT that tunes every bias of the backbone as well; options and attributes are those of `VPT`.

    Raises:
        UserError: As `VPT`, or `attach` finds no bias.
    """

    sites: ClassVar[frozenset[str]] = VPT.sites | {"weights"}

    @property
    def first_block(self) -> int:
        """0, whichever blocks have prompts: the biases below them are tuned too."""
        return 0

    def attach(self, backbone: Geometry) -> None:
        """Refuse a backbone without any bias."""
        super().attach(backbone)
        _require(bias_names(backbone.model), "biases")

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the head, the prompts and every bias of the backbone.

        Not those of its attention pooling under a `pool`.
        """
        names = bias_names(classifier.get_submodule("backbone"))
        if self.pool is not None:  # it takes that one's place
            names = frozenset(name for name in names if not name.startswith("model.attn_pool."))
        return super().tuned_names(classifier) | _of_backbone(names)


class LayerNorm(Method):
    """Tunes scale and shift of every layer norm of the backbone, those inside an attention included, or batch norm.

    The statistics of a batch norm stay those of the pre-training.

    Raises:
        UserError: `attach` finds no such norm (others, such as the root-mean-square one, are not tuned).
    """

    sites: ClassVar[frozenset[str]] = frozenset({"weights"})
    can_merge: ClassVar[bool] = True

    def attach(self, backbone: Geometry) -> None:
        """Change nothing; refuses a backbone without any layer norm."""
        _require(norm_names(backbone.model), "layer or batch norms")

    def tuned_names(self, classifier: nn.Module) -> frozenset[str]:
        """Return the head and the parameters of every layer norm and batch norm of the backbone."""
        return super().tuned_names(classifier) | _of_backbone(
            norm_names(classifier.get_submodule("backbone"))
        )


def bias_names(module: nn.Module) -> frozenset[str]:
    """Return names of all biases in a module, those of EVA's queries and values (q_bias, v_bias) among them."""
    last = ((name, name.rpartition(".")[2]) for name, _ in module.named_parameters())
    return frozenset(name for name, own in last if own == "bias" or own.endswith("_bias"))


def table_names(module: nn.Module) -> frozenset[str]:
    """Return names of the tables of relative positions in a module."""
    names = (name for name, _ in module.named_parameters())
    return frozenset(name for name in names if name.endswith("relative_position_bias_table"))


def norm_names(module: nn.Module) -> frozenset[str]:
    """Return names of the parameters of all layer norms and batch norms in a module."""
    norms = [(name, norm) for name, norm in module.named_modules() if isinstance(norm, _NORMS)]
    return frozenset(
        f"{name}.{own}" for name, norm in norms for own, _ in norm.named_parameters(recurse=False)
    )


def _of_backbone(names: frozenset[str]) -> frozenset[str]:
    return frozenset(f"backbone.{name}" for name in names)


def _require(names: frozenset[str], what: str) -> None:
    if not names:
        raise UserError(f"this backbone has no {what} to tune: choose another method, or another backbone")
