"""The answers of segmentation tasks in the service's own endpoints: a mask in JSON, or as a PNG by itself."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi.responses import Response
from pydantic import BaseModel
from torch import Tensor

from visprompt.data.mask_pictures import COLOURS, indexed_png
from visprompt.serving.refused import Refused

PNG = "image/png"


class ClassShare(BaseModel):
    """A class that occurs in a mask."""

    index: int
    """Its value in the mask."""
    name: str
    share: float
    """Of all pixels."""
    colour: str
    """In the mask's palette, such as #800000."""


class MaskAnswer(BaseModel):
    """The class of each pixel of an image, turned upright by its EXIF orientation."""

    png: str
    """Indexed PNG in base64."""
    height: int
    width: int
    classes: list[ClassShare]
    """Those that occur, the largest first."""


def check_one(images: Sequence[object]) -> None:
    """Refuse several images where the answer is one PNG."""
    if len(images) > 1:
        raise Refused(406, f"a PNG is one mask, and the request holds {len(images)} images: send one")


def png_answer(outcome: Tensor | Refused) -> Response:
    """Return a mask, uint8 [H, W], as an indexed PNG.

    Raises:
        Refused: The image is bad.
    """
    if isinstance(outcome, Refused):
        raise outcome
    return Response(indexed_png(outcome.numpy()), media_type=PNG)


def described(labels: np.ndarray, class_names: Sequence[str], top_k: int) -> dict[str, Any]:
    """Return a mask, uint8 [H, W], in the form of `MaskAnswer`, with so many classes."""
    counts = np.bincount(labels.ravel(), minlength=len(class_names))
    present = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    classes = [
        {
            "index": i,
            "name": class_names[i],
            "share": counts[i] / labels.size,
            "colour": f"#{COLOURS[i].tobytes().hex()}",
        }
        for i in present[:top_k]
    ]
    png = base64.b64encode(indexed_png(labels)).decode()
    return {"png": png, "height": labels.shape[0], "width": labels.shape[1], "classes": classes}
