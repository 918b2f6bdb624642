"""The preprocessing of `visprompt.data.transforms.to_input` as a module that can be exported.

Width and height of the pictures are sizes of the graph's input, so the filters are computed in the graph, by
the formulas of `transforms._taps`. Pillow's sums are integers below 2**31, which float64 represents exactly,
so one matrix product for each axis gives Pillow's values bit for bit. TensorFlow's filters have 2 or 4 taps,
which are gathered and summed in float32, as `transforms` does.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visprompt.data.transforms import check_resizing
from visprompt.errors import UserError

_FIXED = float(2**22)  # Pillow's weights are whole numbers in units of 2**-22
_KEYS = ("size", "resize", "interpolation", "resampling", "mean", "std", "native")


class Preprocess(nn.Module):
    """Resize, crop and normalise decoded pictures of any size as the evaluation of a run does.

    Args:
        preprocessing: A tuned state's `preprocessing`.

    Raises:
        UserError: The state was written by an older version, which stored less.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        super().__init__()
        missing = [name for name in _KEYS if name not in preprocessing]
        if missing:
            raise UserError(
                f"the tuned state does not say its {missing[0]}: an older version wrote it, tune it again"
            )
        check_resizing(preprocessing["interpolation"], preprocessing["resampling"])
        self.size: int = preprocessing["size"]
        self.short_side = preprocessing["short_side"] if preprocessing["resize"] == "short_side" else None
        self.native = None if self.short_side else preprocessing["native"]
        self.cubic = preprocessing["interpolation"] == "bicubic"
        self.resampling: str = preprocessing["resampling"]
        for name in ("mean", "std"):
            values = torch.tensor([float(value) for value in preprocessing[name]])
            self.register_buffer(name, values.view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return float32 [B, 3, size, size] of decoded pictures, uint8 [B, h, w, 3]."""
        sides = [torch.full((), side, dtype=torch.float64) for side in pictures.shape[1:3]]
        x = pictures.permute(0, 3, 1, 2)
        x = x.double() if self.resampling == "pillow" else x.float()
        targets = [self._target(side, torch.minimum(*sides)) for side in sides]
        for axis in (-1, -2):
            x = self._resized(x, axis, sides[axis], *targets[axis])
        if self.resampling != "pillow":
            x = self._rounded(x.clamp(0, 255), *sides)
        return (x.float() / 255 - self.mean) / self.std

    def _target(self, side: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
        """Return the length to which a side is resized, and the first pixel of it that is kept."""
        if self.short_side is None:
            return torch.full_like(side, self.size), torch.zeros_like(side)
        length = torch.floor(self.short_side * side / short)
        return length, torch.round((length - self.size) / 2)  # halves to even, as Python rounds

    def _resized(self, x: Tensor, axis: int, side: Tensor, length: Tensor, start: Tensor) -> Tensor:
        """Resize one axis of x [B, 3, h, w] to `length` pixels, of which `size` from `start` are computed."""
        scale = side / length
        index = torch.arange(self.size, dtype=torch.float64) + start
        center = index * scale + 0.5 if self.resampling == "tf1" else (index + 0.5) * scale
        wide = scale.clamp(min=1.0) if self.resampling == "pillow" else torch.ones_like(scale)
        support = (2.0 if self.cubic else 1.0) * wide
        first = torch.floor(center - support + 0.5).clamp(min=0.0)
        last = torch.minimum(torch.floor(center + support + 0.5), side)
        if self.resampling == "pillow":
            pixels = torch.arange(x.shape[axis], dtype=torch.float64)
            weights = self._weights(pixels[:, None], center, wide, first, last)
            weights = torch.sign(weights) * torch.floor(weights.abs() * _FIXED + 0.5)
            sums = x @ weights if axis == -1 else weights.mT @ x
            return torch.floor((sums + _FIXED / 2) / _FIXED).clamp(0, 255)
        taps = first + torch.arange(4 if self.cubic else 2, dtype=torch.float64)[:, None]
        weights = self._weights(taps, center, wide, first, last).float()
        total = torch.zeros((), dtype=torch.float32)
        for tap, weight in zip(torch.minimum(taps, side - 1).long(), weights, strict=True):
            total = total + x.index_select(axis, tap) * (weight if axis == -1 else weight[:, None])
        return total

    def _weights(self, taps: Tensor, center: Tensor, wide: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Return the weights [k, size] of input pixels `taps` in each output pixel, which sum to 1."""
        x = ((taps - center + 0.5) * (1.0 / wide)).abs()
        if self.cubic:
            near = (1.5 * x - 2.5) * x * x + 1.0
            far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
            weights = torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))
        else:
            weights = (1.0 - x).clamp(min=0.0)
        weights = torch.where((taps >= first) & (taps < last), weights, torch.zeros_like(weights))
        return weights / weights.sum(0)

    def _rounded(self, x: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Round to 8 bits, unless the picture has the size at which the run stored it unresized."""
        if self.native is None:
            return x.round()
        stored = (height == self.native) & (width == self.native)
        return torch.where(stored, x, x.round())
