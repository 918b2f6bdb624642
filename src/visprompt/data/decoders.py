"""How an image file becomes pixels, by the name that a tuned state carries, so that prediction does the same."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visprompt.data.content import decode_rgb
from visprompt.data.folder import decode
from visprompt.data.raw.natural import decode_sun397
from visprompt.data.raw.specialized import decode_retina
from visprompt.errors import UserError

DECODERS: dict[str, Callable[[Path], np.ndarray]] = {
    "upright": decode,
    "rgb": lambda path: decode_rgb(path.read_bytes()),
    "sun397": lambda path: decode_sun397(path.read_bytes()),
    "retina": lambda path: decode_retina(path.read_bytes()),
}
"""Name -> the function that reads a file into uint8 [h, w, 3]; raises `BadImage`."""


def decoder_of(preprocessing: Mapping[str, Any]) -> Callable[[Path], np.ndarray]:
    """Return the function that decodes a file as the images of a run were decoded.

    Args:
        preprocessing: A data module's `preprocessing`, as kept in the tuned state.

    Raises:
        UserError: It does not say how.
    """
    found = DECODERS.get(str(preprocessing.get("decode")))
    if found is None:
        raise UserError("the tuned state does not say how images are decoded: an older version wrote it, tune it again")
    white_level = preprocessing.get("white_level")
    return found if white_level is None else partial(decode, white_level=white_level)
