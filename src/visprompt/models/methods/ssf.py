"""Scaling and shifting features.

Lian et al., Scaling & Shifting Your Features, NeurIPS 2022, equations 3 and 4.

y = gamma * x + beta, channel by channel, behind every linear layer, every norm and the patch embedding. After
training the two merge into the layer before them: weight * gamma, bias * gamma + beta.

gamma is drawn from N(1, 0.02^2) and beta from N(0, 0.02^2), so the start is not quite the backbone: the
paper's choice. Different from the released code: where the tokens are averaged before the last norm, that
norm is scaled and shifted too (there, the average is); norms inside the attention (of queries and keys) are
left alone in both.
"""

import copy
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm2d, LayerNorm2dFp32, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method, Wrapped, per_block

_STD = 0.02
_NORMS_2D = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, LayerNorm2d, LayerNorm2dFp32, RmsNorm2d)
_NORMS = (nn.LayerNorm, RmsNorm, *_NORMS_2D)
_MAPS = (nn.Conv2d, *_NORMS_2D)  # put out [B, channels, height, width]
_SHORT = {"patch_embed_proj": "patch", "patch_embed_norm": "patch_norm"}


class ScaledShifted(Wrapped):
    """A layer whose output is scaled and shifted channel by channel.

    Args:
        base: A linear layer, a norm, or a convolution.
        method: Keeps gamma and beta.
        name: Of the two in the method.
        row: Theirs, where the method keeps those of all blocks together.
    """

    def __init__(self, base: nn.Module, method: "SSF", name: str, row: int | None = None) -> None:
        super().__init__(base)
        self._method = (method,)  # in a tuple, so that its parameters are not registered here too
        self._name, self._row = name, row

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer puts out, scaled and shifted."""
        out: Tensor = self.base(x)
        gamma, beta = (
            t.to(out.dtype) for t in self._pair()
        )  # under autocast the output stays in its precision
        if isinstance(self.base, _MAPS):
            gamma, beta = gamma[:, None, None], beta[:, None, None]
        return torch.addcmul(beta, out, gamma)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain layer that computes the same.

        Raises:
            UserError: The layer cannot shift.
        """
        if isinstance(self.base, (RmsNorm, RmsNorm2d)):
            raise UserError(
                "method ssf does not merge into an RmsNorm, which cannot shift: keep the tuned state"
            )
        layer, (gamma, beta) = copy.deepcopy(self.base), self._pair()
        weight: Tensor = torch.ones_like(gamma) if layer.weight is None else layer.weight  # type: ignore[assignment]  # a tensor
        bias: Tensor = torch.zeros_like(beta) if layer.bias is None else layer.bias  # type: ignore[assignment]  # a parameter or buffer
        layer.weight = nn.Parameter(weight * gamma.view(-1, *(1,) * (weight.ndim - 1)))
        layer.bias = nn.Parameter(gamma * bias + beta)
        return layer

    def _pair(self) -> tuple[Tensor, Tensor]:
        method, name = self._method[0], self._name
        gamma: Any = method.gamma[name]
        beta: Any = method.beta[name]
        return (gamma, beta) if self._row is None else (gamma[self._row], beta[self._row])


class SSF(Method):
    """Scales and shifts what every linear layer, norm and the patch embedding put out; mergeable.

    Args:
        backbone: The backbone; what its layers put out shapes the parameters, which are drawn in `attach`.

    Attributes:
        gamma: By layer. Of the blocks' layers, such as `norm1`, `qkv`, `proj`, `norm2`, `fc1`, `fc2`, each is
            [blocks, channels], or a list over the blocks that have it where their channels differ; of those
            beside the blocks, such as `patch` and `norm`, each is [channels].
        beta: The same.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"modules"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"gamma", "beta"})  # decayed, every layer would fade
    can_merge: ClassVar[bool] = True

    def __init__(self, backbone: Geometry) -> None:
        super().__init__(backbone)
        self.gamma, self.beta = nn.ParameterDict(), nn.ParameterDict()

    def attach(self, backbone: Geometry) -> None:
        """Draw the parameters and wraps the layers."""
        model = backbone.model
        inside: dict[str, list[str]] = {}
        beside = []
        for path, layer in model.named_modules():
            if not _is_scaled(path, layer):
                continue
            block = next((name for name in backbone.block_names if path.startswith(f"{name}.")), None)
            if block is None:
                beside.append(path)
            else:
                inside.setdefault(path.removeprefix(f"{block}."), []).append(path)
        for path, places in inside.items():
            name = path.removeprefix("attn.").removeprefix("mlp.").replace(".", "_")
            layers = [model.get_submodule(place) for place in places]
            shapes = [(_channels(layer),) for layer in layers]
            self.gamma[name] = per_block(shapes, _draw_gamma)
            self.beta[name] = per_block(shapes, _draw_beta)
            for row, (place, layer) in enumerate(zip(places, layers, strict=True)):
                model.set_submodule(place, ScaledShifted(layer, self, name, row))
        for path in beside:
            name, layer = path.replace(".", "_"), model.get_submodule(path)
            name = _SHORT.get(name, name)
            if name in self.gamma:  # a ResNet's first conv1, or a last norm, beside those of the blocks
                name = f"{'final' if path in backbone.final_names else 'stem'}_{name}"
            channels = _channels(layer)
            self.gamma[name] = nn.Parameter(torch.empty(channels).normal_(1, _STD))
            self.beta[name] = nn.Parameter(torch.empty(channels).normal_(0, _STD))
            model.set_submodule(path, ScaledShifted(layer, self, name))


def _is_scaled(path: str, layer: nn.Module) -> bool:
    """Return whether a layer's output is scaled and shifted.

    Not norms and gates inside an attention, not a pooling's.
    """
    if path.startswith("attn_pool") or (
        ".attn." in path and (isinstance(layer, _NORMS) or path.endswith(".gate"))
    ):
        return False
    return isinstance(layer, (nn.Linear, nn.Conv2d, *_NORMS))


def _channels(layer: Any) -> int:
    """Channel that a layer puts out."""
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.normalized_shape[-1])


def _draw_gamma(gamma: Tensor) -> None:
    gamma.normal_(1, _STD)


def _draw_beta(beta: Tensor) -> None:
    beta.normal_(0, _STD)
