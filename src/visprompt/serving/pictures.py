"""Turn what a request holds of an image into the backbone's input, or into the reason why it cannot be."""

import io
import logging
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visprompt.data.sources.decoders import check_resized, decoder_of
from visprompt.data.sources.images import BadImage, TooLarge, TooLong
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.models.prepared import Task
from visprompt.serving.limits import Limits
from visprompt.serving.refused import Refused

_log = logging.getLogger(__name__)

Content = bytes | np.ndarray
"""An encoded image; its pixels, uint8 [h, w, 3]; or a normalised input, float32 [3, size, size]"""


class Input(NamedTuple):
    """An image as the backbone's input.

    Attributes:
        image: Normalised, float32 [3, size, size]; of a segmentation task [3, height, width].
        size: Height and width of the picture, before it was resized.
    """

    image: Tensor
    size: tuple[int, int]


def prepare(content: Content, number: int, task: Task, limits: Limits) -> Input | Refused:
    """Return an image as the input of its task, exactly as the task's evaluation prepared it.

    Args:
        content: The image.
        number: Its place in the request, from 1, for the message.
        task: Its task.
        limits: The limits of its bytes and pixels.

    Returns:
        The input, or why the image is refused.
    """
    try:
        with torch.inference_mode():
            return _input(content, task, limits)
    except TooLong as error:
        return Refused(413, f"image {number} {error}")
    except TooLarge:
        return Refused(
            413, f"image {number} has more than the {limits.image_pixels} pixels that are decoded here"
        )
    except BadImage as error:
        return Refused(400, f"image {number} {error}")
    except Refused as refused:
        return Refused(refused.status, f"image {number} {refused}")
    except UserError as error:  # the state lacks what an older version did not store
        _log.warning("task %s: %s", task.name, error)
        return Refused(500, f"image {number} cannot be prepared: {error}")
    except Exception:  # a decoder that fails in its own way must not harm other images
        _log.exception("an image of task %s cannot be decoded", task.name)
        return Refused(400, f"image {number} cannot be decoded")


def _input(content: Content, task: Task, limits: Limits) -> Input:
    if isinstance(content, bytes):
        if len(content) > limits.image_bytes:
            raise Refused(
                413, f"has {len(content)} bytes, more than the {limits.image_bytes} that are taken here"
            )
        return _of_pixels(decoder_of(task.preprocessing, limits.image_pixels)(content), task)
    if content.dtype == np.uint8:
        if content.ndim != 3 or content.shape[2] != 3 or 0 in content.shape:
            raise Refused(400, f"has the shape {list(content.shape)}, not [height, width, 3]")
        if content.shape[0] * content.shape[1] > limits.image_pixels:
            raise TooLarge
        check_resized(content, task.preprocessing, limits.image_pixels)
        return _of_pixels(content, task)
    side = int(task.preprocessing["size"])
    if content.shape != (3, side, side):
        raise Refused(400, f"has the shape {list(content.shape)}, not [3, {side}, {side}]")
    if not np.isfinite(content).all():
        raise Refused(400, "has numbers that are not finite")
    return Input(torch.from_numpy(np.array(content, dtype=np.float32)), (side, side))


def _of_pixels(pixels: np.ndarray, task: Task) -> Input:
    return Input(to_input(pixels, task.preprocessing), (pixels.shape[0], pixels.shape[1]))


def to_png(image: Tensor, task: Task) -> bytes:
    """Return an input [3, size, size] of a task as a PNG of the picture that it was normalised from."""
    mean, std = (torch.tensor(task.preprocessing[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = (image * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()
