"""Resizing, cropping and normalisation, the same for training, evaluation and prediction.

`resampling` names one of three ways to resize m input pixels to n output pixels:

- "pillow": output pixel i is at (i + 0.5) * m / n - 0.5 of the input (half-pixel centres). The filter widens
  when the image shrinks (antialias); each pass is computed in fixed point and rounded to 8 bits.
- "tf1": TensorFlow 1's bilinear, which VPT, E2VPT and task_adaptation call. Output pixel i is at i * m / n,
  so that an enlarged image is shifted by half an input pixel; no antialias, floating point.
- "tf2": TensorFlow 2 without antialias. Half-pixel centres, floating point.

Weights of pixels inside the image are divided by their sum. Pillow's values are reproduced bit for bit on any
device, so that small images can be stored unresized.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visprompt.errors import UserError, unknown

NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "model": None,
}
"""Name -> mean and standard deviation of pixels in 0..1; None means those of the backbone"""

RESAMPLINGS = ("pillow", "tf1", "tf2")
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_FIXED = 22  # fractional bits of Pillow's 8-bit filters: 32 - 8 - 2


def check_resizing(interpolation: str, resampling: str) -> None:
    """Check an interpolation and a resampling.

    Raises:
        UserError: A name is unknown, or the two cannot be combined; the message says what to give.
    """
    if interpolation not in _FILTERS:
        raise unknown("interpolation", interpolation, _FILTERS)
    if resampling not in RESAMPLINGS:
        raise unknown("resampling", resampling, RESAMPLINGS)
    if (interpolation, resampling) == ("bicubic", "tf1"):
        raise UserError(
            "resampling=tf1 is bilinear only: give interpolation=bilinear, or resampling=pillow or tf2"
        )


def in_present_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an earlier version with its `antialias` replaced by a `resampling`."""
    known = dict(settings)
    if isinstance(known.get("antialias"), bool):
        known["resampling"] = "pillow" if known.pop("antialias") else "tf2"
    return known


def mean_and_std(
    normalisation: str, model: tuple[Sequence[float], Sequence[float]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel that a name stands for.

    Args:
        normalisation: A name of `NORMALISATIONS`.
        model: Mean and standard deviation of the backbone.

    Raises:
        UserError: There is no such name.
    """
    if normalisation not in NORMALISATIONS:
        raise unknown("normalisation", normalisation, NORMALISATIONS)
    mean, std = NORMALISATIONS[normalisation] or model
    return tuple(float(v) for v in mean), tuple(float(v) for v in std)


def resize_short_side(
    image: np.ndarray, short_side: int, interpolation: str = "bicubic", resampling: str = "pillow"
) -> np.ndarray:
    """Resize an image so that its short side has a given length.

    Args:
        image: uint8 [h, w, 3].
        short_side: New length of the shorter side in pixels; the longer one is rounded down as in
            torchvision.
        interpolation: "bilinear" or "bicubic".
        resampling: A name of `RESAMPLINGS`; TensorFlow's values are rounded to integers.

    Returns:
        uint8 [h', w', 3].
    """
    height, width = short_side_size(image.shape[0], image.shape[1], short_side)
    size = (width, height)
    if resampling == "pillow":
        return np.asarray(Image.fromarray(image).resize(size, _FILTERS[interpolation]))
    planes = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))[None].float()
    for axis, length in zip((-1, -2), size, strict=True):
        if planes.shape[axis] != length:
            rows, weights = _taps(planes.shape[axis], length, interpolation, resampling)
            planes = _filter(planes, axis, rows, weights.float())
    return planes[0].clamp(0, 255).round().to(torch.uint8).numpy().transpose(1, 2, 0)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the height and width of an image whose shorter side is resized to `short_side` pixels."""
    short = min(height, width)
    return int(short_side * height / short), int(short_side * width / short)


def window_size(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Return the height and width of an image that is scored in windows, resized with its ratio kept.

    The short side becomes `short_side` pixels, but the long side at most four times as many, as
    mmsegmentation's scale of 2048 x 512 does; both are rounded.
    """
    factor = min(short_side / min(height, width), 4 * short_side / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """Return a square of `size` pixels of an image [h, w, 3]."""
    return image[top : top + size, left : left + size]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Return the central square of an image [h, w, 3]; odd margins are rounded as in torchvision."""
    height, width = image.shape[:2]
    return crop(image, round((height - size) / 2), round((width - size) / 2), size)


def squash(image: np.ndarray, size: int, interpolation: str, resampling: str) -> np.ndarray:
    """Resize one image to a square of 8-bit values, for a store.

    Args:
        image: uint8 [h, w, c] with 1 or 3 channels.
        size: Side of the result in pixels.
        interpolation: "bilinear" or "bicubic".
        resampling: A name of `RESAMPLINGS`; TensorFlow's values are rounded to integers.

    Returns:
        uint8 [c, size, size].
    """
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    if resampling == "pillow":
        pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        resized = np.asarray(pixels.resize((size, size), _FILTERS[interpolation])).reshape(size, size, -1)
        return np.ascontiguousarray(resized.transpose(2, 0, 1))
    planes = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))  # torch requires a writable copy
    return resize(planes[None], size, interpolation, resampling)[0].round().to(torch.uint8).numpy()


def resize(images: Tensor, size: int | tuple[int, int], interpolation: str, resampling: str) -> Tensor:
    """Resize a batch, on its device.

    Args:
        images: uint8 [b, c, h, w].
        size: Height and width of the result in pixels, or its side if it is square.
        interpolation: "bilinear" or "bicubic".
        resampling: A name of `RESAMPLINGS`: exactly Pillow's values, or TensorFlow's, not rounded.

    Returns:
        float32 [b, c, height, width] in 0..255.
    """
    height, width = _both(size)
    if images.device.type == "cpu" and len(images) > 2:  # two at a time stay in the cache: four times as fast
        return torch.cat([resize(few, size, interpolation, resampling) for few in images.split(2)])
    x = images.to(torch.int32 if resampling == "pillow" else torch.float32)
    for axis, length in ((-1, width), (-2, height)):
        if x.shape[axis] != length:
            taps = _taps_on(x.device, x.dtype, x.shape[axis], length, interpolation, resampling)
            x = _filter(x, axis, *taps)
    return x.clamp(0, 255).float()  # a bicubic filter overshoots


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _filter(x: Tensor, axis: int, rows: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of rows along one axis; fixed-point sums (integers) are rounded to 8 bits."""
    total = x.new_full((), 0 if x.is_floating_point() else 1 << (_FIXED - 1))
    for tap, weight in zip(rows, weights if axis == -1 else weights[:, :, None], strict=True):
        total = total + x.index_select(axis, tap) * weight
    # no overflow of 32 bits: the weights' absolute values sum to less than 1.5, and 255 * 1.5 * 2**22 < 2**31
    return total if x.is_floating_point() else (total >> _FIXED).clamp_(0, 255)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the first caller may be an evaluation
def _taps_on(
    device: torch.device, dtype: torch.dtype, length: int, size: int, interpolation: str, resampling: str
) -> tuple[Tensor, Tensor]:
    """Return the result of `_taps` on a device, the weights as `dtype`; copied there once."""
    rows, weights = _taps(length, size, interpolation, resampling)
    return rows.to(device), weights.to(device, dtype)


def _taps(length: int, size: int, interpolation: str, resampling: str) -> tuple[Tensor, Tensor]:
    """Return the input pixels of each output pixel and their weights.

    The filters are the triangle, and Keys' cubic with a = -0.5 (IEEE Trans. ASSP 29(6), 1981, equation 15).

    Returns:
        Rows (int64 [k, size]) and weights (float64 [k, size]; in units of 2**-22 for Pillow), padded with
        weights of zero.
    """
    scale = length / size
    wide = max(scale, 1.0) if resampling == "pillow" else 1.0
    support = (1.0 if interpolation == "bilinear" else 2.0) * wide
    # in coordinates in which input pixel k covers k to k + 1
    center = np.arange(size) * scale + 0.5 if resampling == "tf1" else (np.arange(size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), length)
    rows = first + np.arange((last - first).max())[:, None]
    x = np.abs((rows - center + 0.5) * (1.0 / wide))
    if interpolation == "bilinear":
        weights = np.maximum(1.0 - x, 0.0)
    else:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights = np.where(rows < last, weights, 0.0)
    weights /= weights.sum(axis=0)
    if resampling == "pillow":
        weights = np.trunc(weights * 2**_FIXED + np.copysign(0.5, weights))
    return torch.from_numpy(np.minimum(rows, length - 1)), torch.from_numpy(weights)


def normalise(
    images: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    interpolation: str = "bilinear",
    resampling: str = "pillow",
) -> Tensor:
    """Resize and normalise stored pixels to the backbone's input, on their device.

    Args:
        images: uint8 [b, c, h, w]; one channel is repeated.
        size: Side of the result, or height and width; images of another size are squashed to it.
        mean: Mean per channel, of pixels in 0..1; as `per_channel` returns it, no copy to a GPU is needed.
        std: Standard deviation per channel, of pixels in 0..1; or likewise.
        interpolation: See `resize`.
        resampling: See `resize`.

    Returns:
        float32 [b, 3, height, width].
    """
    if images.shape[-2:] != _both(size):
        scaled = resize(images, size, interpolation, resampling) / 255
    else:
        scaled = images.to(torch.float32, copy=True).div_(255)
    shift, scale = (v if isinstance(v, Tensor) else per_channel(v, images.device) for v in (mean, std))
    return (scaled - shift).div_(scale)  # in place: new memory costs a CPU more than arithmetic


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Return a value of each channel as float32 [3, 1, 1] on a device."""
    return torch.tensor(list(values), dtype=torch.float32, device=device).view(3, 1, 1)


def to_input(image: np.ndarray, preprocessing: Mapping[str, Any]) -> Tensor:
    """Preprocess one decoded image exactly as the evaluation of the run that stored `preprocessing`.

    Args:
        image: uint8 [h, w, 3].
        preprocessing: A data module's `preprocessing`, as the tuned state stores it.

    Returns:
        float32 [3, size, size]; where images are scored in windows, [3, height, width] of `window_size`.

    Raises:
        UserError: The state was written by an older version, which stored less.
    """
    try:
        size, mean, std = (preprocessing[name] for name in ("size", "mean", "std"))
        how = preprocessing["interpolation"], preprocessing["resampling"]
        if preprocessing["resize"] == "short_side":
            image = center_crop(resize_short_side(image, preprocessing["short_side"], *how), size)
        elif preprocessing["resize"] == "windows":
            size = window_size(image.shape[0], image.shape[1], preprocessing["short_side"])
        elif image.shape[:2] != (preprocessing["native"],) * 2:
            image = squash(image, size, *how).transpose(1, 2, 0)
    except KeyError as error:
        raise UserError(
            f"the tuned state does not say its {error.args[0]}: an older version wrote it, tune it again"
        ) from error
    planes = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))  # torch requires a writable copy
    return normalise(planes[None], size, mean, std, *how)[0]
