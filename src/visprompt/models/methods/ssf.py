"""Scaling and shifting features.

Lian et al., Scaling & Shifting Your Features, NeurIPS 2022, equations 3 and 4.

y = gamma * x + beta, channel by channel, after every linear layer, every norm and the patch embedding. After
training the two merge into the layer before them: weight * gamma, bias * gamma + beta.

gamma is drawn from N(1, 0.02^2) and beta from N(0, 0.02^2), as in the paper, so the tuned model starts close
to the backbone but not equal to it. Different from the released code: if tokens are averaged before the last
norm, the output of that norm is scaled and shifted too (there, the average is). Norms of queries and keys
inside an attention are left unchanged in both.
"""

import copy
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm2d, LayerNorm2dFp32, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.contract import Geometry, Method
from visprompt.models.layers import Wrapped, per_block

_STD = 0.02
_NORMS_2D = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, LayerNorm2d, LayerNorm2dFp32, RmsNorm2d)
_NORMS = (nn.LayerNorm, RmsNorm, *_NORMS_2D)
_MAPS = (nn.Conv2d, *_NORMS_2D)  # their outputs are [B, channels, height, width]
_SHORT = {"patch_embed_proj": "patch", "patch_embed_norm": "patch_norm"}


class ScaledShifted(Wrapped):
    """A layer whose output is scaled and shifted channel by channel.

    Args:
        base: A linear layer, a norm, or a convolution.
        method: Holds gamma and beta.
        name: Key of both in the method, such as "fc1".
        row: Index into them, if one tensor holds those of all blocks.
    """

    def __init__(self, base: nn.Module, method: "SSF", name: str, row: int | None = None) -> None:
        super().__init__(base)
        self._method = (method,)  # in a tuple, so that torch does not register its parameters here too
        self._name, self._row = name, row

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the layer's output, scaled and shifted."""
        # cast, so that under autocast the output keeps its precision
        gamma, beta = (values.to(out.dtype) for values in self._pair())
        if isinstance(self.base, _MAPS):
            gamma, beta = gamma[:, None, None], beta[:, None, None]
        return torch.addcmul(beta, out, gamma)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain layer that computes the same.

        Raises:
            UserError: The layer has no bias (`RmsNorm`).
        """
        if isinstance(self.base, (RmsNorm, RmsNorm2d)):
            raise UserError(
                "method ssf cannot be merged into an RmsNorm, which has no bias: keep the tuned state"
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
    """Scales and shifts the output of every linear layer, norm and the patch embedding; mergeable.

    Args:
        backbone: The backbone; the output channels of its layers shape the parameters, drawn in `attach`.

    Attributes:
        gamma: Scales by name of layer. For layers in blocks, such as `norm1`, `qkv`, `proj`, `norm2`, `fc1`,
            `fc2`, each is [blocks, channels], or a list over the blocks if their channels differ. For layers
            outside the blocks, such as `patch` and `norm`, each is [channels].
        beta: Shifts, in the same layout.
    """

    sites: ClassVar[frozenset[str]] = frozenset({"modules"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"gamma", "beta"})  # decay would shrink all outputs
    can_merge: ClassVar[bool] = True

    def __init__(self, backbone: Geometry) -> None:
        super().__init__(backbone)
        self.gamma, self.beta = nn.ParameterDict(), nn.ParameterDict()

    def attach(self, backbone: Geometry) -> None:
        """Draw the parameters and wrap the layers."""
        model = backbone.model
        inside: dict[str, list[str]] = {}  # path in a block -> paths in the model
        outside = []
        for path, layer in model.named_modules():
            if not _is_scaled(path, layer):
                continue
            block = next((name for name in backbone.block_names if path.startswith(f"{name}.")), None)
            if block is None:
                outside.append(path)
            else:
                inside.setdefault(path.removeprefix(f"{block}."), []).append(path)
        for path_in_block, paths in inside.items():
            name = path_in_block.removeprefix("attn.").removeprefix("mlp.").replace(".", "_")
            layers = [model.get_submodule(path) for path in paths]
            shapes = [(_channels(layer),) for layer in layers]
            self.gamma[name] = per_block(shapes, _draw_gamma)
            self.beta[name] = per_block(shapes, _draw_beta)
            for row, (path, layer) in enumerate(zip(paths, layers, strict=True)):
                model.set_submodule(path, ScaledShifted(layer, self, name, row))
        for path in outside:
            name, layer = path.replace(".", "_"), model.get_submodule(path)
            name = _SHORT.get(name, name)
            # layers in the blocks may have the same name, such as a ResNet's conv1
            if name in self.gamma:
                name = f"{'final' if path in backbone.final_names else 'stem'}_{name}"
            channels = _channels(layer)
            self.gamma[name] = nn.Parameter(torch.empty(channels).normal_(1, _STD))
            self.beta[name] = nn.Parameter(torch.empty(channels).normal_(0, _STD))
            model.set_submodule(path, ScaledShifted(layer, self, name))


def _is_scaled(path: str, layer: nn.Module) -> bool:
    """Return whether a layer's output is scaled and shifted.

    Norms and gates inside an attention are not, nor are layers of an attention pooling.
    """
    if path.startswith("attn_pool") or (
        ".attn." in path and (isinstance(layer, _NORMS) or path.endswith(".gate"))
    ):
        return False
    return isinstance(layer, (nn.Linear, nn.Conv2d, *_NORMS))


def _channels(layer: Any) -> int:
    """Return the number of a layer's output channels."""
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.normalized_shape[-1])


def _draw_gamma(gamma: Tensor) -> None:
    gamma.normal_(1, _STD)


def _draw_beta(beta: Tensor) -> None:
    beta.normal_(0, _STD)
