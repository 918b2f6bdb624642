"""Turn whatever form a picture comes in into the backbone's input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from visprompt.data.sources.decoders import decoder_of
from visprompt.data.sources.images import to_rgb
from visprompt.data.transforms import to_input
from visprompt.errors import UserError

Picture = Tensor | np.ndarray | Image.Image | Path | bytes


def as_input(image: Picture, preprocessing: Mapping[str, Any] | None) -> Tensor:
    """Return an image as a normalised tensor [3, H, W].

    Args:
        image: A normalised tensor [3, H, W], returned as it is; or the path or the content of an image file,
            decoded as `preprocessing` says; or a decoded picture, uint8 [h, w, 3], or of Pillow (prepared as
            its file would be).
        preprocessing: A tuned state's `preprocessing`; None for an image without a task.

    Raises:
        UserError: The image is not of one of these forms, or cannot be decoded.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or not image.is_floating_point():
            raise UserError(
                "images must be normalised tensors [B, 3, height, width], and one of these is "
                f"{image.dtype} of the shape {tuple(image.shape)}"
            )
        return image
    if preprocessing is None:
        raise UserError("a picture without a task cannot be prepared: give a normalised tensor [3, H, W]")
    if isinstance(image, Path | bytes):
        pixels = decoder_of(preprocessing)(image)
    elif isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise UserError(
                f"a picture of Pillow's mode {image.mode} has more than 8 bits: give the path of its file"
            )
        as_own = preprocessing.get("decode") == "upright"  # else as the papers' files, whose EXIF is not read
        pixels = np.asarray(to_rgb(ImageOps.exif_transpose(image)) if as_own else image.convert("RGB"))
    else:
        pixels = image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"an array must be uint8 [height, width, 3], and one of these is {pixels.dtype} of the shape "
            f"{pixels.shape}"
        )
    return to_input(pixels, preprocessing)
