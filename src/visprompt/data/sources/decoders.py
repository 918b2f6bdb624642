"""Decoders by the name that a tuned state stores, so that prediction decodes as training did."""

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.sources.content import decode_rgb
from visprompt.data.sources.images import MAX_PIXELS, TooLong, decode, decoding, open_image
from visprompt.data.sources.natural import decode_sun397
from visprompt.data.sources.specialized import decode_retina
from visprompt.data.transforms import short_side_size
from visprompt.errors import UserError


def _content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _opened(source: Path | bytes) -> Path | BytesIO:
    return BytesIO(source) if isinstance(source, bytes) else source


def _checked(source: Path | bytes, max_pixels: int) -> bytes:
    """Return a file's bytes after checking, before OpenCV decodes it, its format and its number of pixels."""
    with decoding():
        open_image(_opened(source), max_pixels).close()
        return _content(source)


def _upright(source: Path | bytes, **options: Any) -> np.ndarray:
    return decode(_opened(source), **options)


DECODERS: dict[str, Callable[..., np.ndarray]] = {
    "upright": _upright,
    "rgb": lambda source, max_pixels=MAX_PIXELS: decode_rgb(_content(source), max_pixels),
    "sun397": lambda source, max_pixels=MAX_PIXELS: decode_sun397(_checked(source, max_pixels)),
    "retina": lambda source, max_pixels=MAX_PIXELS: decode_retina(_checked(source, max_pixels)),
}
"""Name -> function of a path or content and `max_pixels`; it returns uint8 [h, w, 3] or raises `BadImage`"""


def decoder_of(
    preprocessing: Mapping[str, Any], max_pixels: int = MAX_PIXELS
) -> Callable[[Path | bytes], np.ndarray]:
    """Return the function that decodes a file, or its content, as the images of a run were decoded.

    Args:
        preprocessing: A data module's `preprocessing`, as the tuned state stores it.
        max_pixels: See `images.open_image`; the caller sets the limit, not the state.

    Raises:
        UserError: The state names no decoder.
    """
    found = DECODERS.get(str(preprocessing.get("decode")))
    if found is None:
        raise UserError(
            "the tuned state does not say how images are decoded: an older version wrote it, tune it again"
        )
    white_level = preprocessing.get("white_level")
    options = {} if white_level is None else {"white_level": white_level}
    decoder = partial(found if white_level is None else _upright, max_pixels=max_pixels, **options)

    def decoded(source: Path | bytes) -> np.ndarray:
        pixels = decoder(source)
        check_resized(pixels, preprocessing, max_pixels)
        return pixels

    return decoded


def check_resized(pixels: np.ndarray, preprocessing: Mapping[str, Any], max_pixels: int) -> None:
    """Refuse a picture [h, w, 3] that resizing by the short side would make larger than is decoded.

    A picture of 16 x 3,000,000 pixels is a small file, and its short side of 256 would need fifty gigabytes.

    Raises:
        TooLong: It would have more than `max_pixels` pixels.
    """
    if preprocessing.get("resize") == "short_side" and "short_side" in preprocessing:
        side = int(preprocessing["short_side"])
        height, width = short_side_size(pixels.shape[0], pixels.shape[1], side)
        if height * width > max_pixels:
            raise TooLong(
                f"would be resized to {width:,} x {height:,} pixels, more than the {max_pixels:,} allowed"
            )
