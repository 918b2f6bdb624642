"""Tensors of the Open Inference Protocol: in JSON, or as bytes after it (Triton's binary extension)."""

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from visprompt.serving.pictures import Content
from visprompt.serving.reading import check_count, from_base64
from visprompt.serving.refused import Refused

_LENGTH = struct.Struct("<I")
_TYPES: dict[Any, np.dtype[Any]] = {"UINT8": np.dtype(np.uint8), "FP32": np.dtype("<f4")}


def split(content: bytes, json_length: str | None) -> tuple[dict[str, Any], bytes]:
    """Split a body into its JSON and the bytes behind it.

    Args:
        content: The body.
        json_length: The header Inference-Header-Content-Length; None if the body is JSON alone.

    Raises:
        Refused: The header is wrong, or the JSON is.
    """
    end = len(content)
    if json_length is not None:
        # the length first: int() raises an error for a text of thousands of digits
        if not json_length.isdecimal() or len(json_length) > 12 or int(json_length) > len(content):
            raise Refused(
                400, f"Inference-Header-Content-Length={json_length:.20} is not a length within the body"
            )
        end = int(json_length)
    try:
        asked = json.loads(content[:end])
    except (ValueError, RecursionError) as error:
        raise Refused(
            400, "the request is not JSON: send a request of the Open Inference Protocol"
        ) from error
    if not isinstance(asked, dict):
        raise Refused(400, "the request is not a JSON object: send a request of the Open Inference Protocol")
    return asked, content[end:]


def images_of(asked: Mapping[str, Any], binary: bytes, name: str, most: int) -> list[Content | Refused]:
    """Return the images of a request's only input.

    Args:
        asked: The request's JSON.
        binary: The bytes behind it.
        name: The input's name.
        most: Number of images allowed.

    Returns:
        For BYTES [n] encoded images; for UINT8 [n, h, w, 3] pixels; for FP32 [n, 3, h, w] normalised inputs.

    Raises:
        Refused: The input is not one of these.
    """
    inputs = asked.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, f"the request has not exactly one input: send one, named {name}")
    given = inputs[0]
    shape, kind, parameters = given.get("shape"), given.get("datatype"), given.get("parameters") or {}
    if given.get("name") != name:
        raise Refused(400, f"the input is named {given.get('name')!r:.80}: name it {name}")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise Refused(400, f"the shape of input {name} is not a list of whole numbers above 0")
    check_count(shape[0], most)
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size != len(binary)):
        raise Refused(400, f"binary_data_size={size!r:.80} is not the {len(binary)} bytes behind the JSON")
    if kind == "BYTES":
        if shape not in ([shape[0]], [shape[0], 1]):
            raise Refused(400, f"input {name} of BYTES has the shape {shape}, not [images]")
        return _encoded(given.get("data"), binary if size is not None else None, shape[0])
    if isinstance(kind, str) and kind in _TYPES and len(shape) == 4:
        return [*_numbers(given.get("data"), binary if size is not None else None, shape, _TYPES[kind])]
    raise Refused(
        400,
        f"input {name} is {kind!r:.80} of shape {shape}: send BYTES [n] (image files), UINT8 [n, h, w, 3] or "
        "FP32 [n, 3, h, w]",
    )


def _encoded(data: Any, binary: bytes | None, count: int) -> list[Content | Refused]:
    """Return encoded images: raw with their lengths in bytes, or in base64 in JSON."""
    images: list[Content | Refused] = []
    if binary is not None:
        place = 0
        while place + 4 <= len(binary):
            (length,) = _LENGTH.unpack_from(binary, place)
            images.append(binary[place + 4 : place + 4 + length])
            place += 4 + length
        whole = place == len(binary)
    else:
        texts = _flat(data)
        whole = all(isinstance(text, str) for text in texts)
        images += [from_base64(text, number + 1) for number, text in enumerate(texts)] if whole else []
    if not whole or len(images) != count:
        raise Refused(400, f"the data of the input are not the {count} images that its shape says")
    return images


def _numbers(data: Any, binary: bytes | None, shape: Sequence[int], kind: np.dtype[Any]) -> np.ndarray:
    count = prod(shape)
    try:
        if binary is not None:
            numbers = np.frombuffer(binary, kind)
        elif isinstance(data, list) and kind == np.uint8:
            numbers = np.asarray(data, np.int64).ravel()
            numbers = numbers.astype(kind) if ((numbers >= 0) & (numbers < 256)).all() else numbers[:0]
        else:
            numbers = np.asarray(data if isinstance(data, list) else [], kind).ravel()
        if numbers.size != count:
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(
            400, f"the data of the input are not the {count} numbers of its shape and type"
        ) from error
    return numbers.reshape(shape)


def _flat(data: Any) -> list[Any]:
    """Return a list of texts that may come as [[text], [text]]."""
    if not isinstance(data, list):
        return [None]
    return [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in data]


def output(
    name: str, values: np.ndarray | Sequence[str], shape: Sequence[int], binary: bool
) -> tuple[Any, bytes]:
    """Return an output's JSON, and its bytes if it is binary.

    Args:
        name: The output's name.
        values: Numbers, float32 or uint8; or texts, in the order of the shape.
        shape: Its shape.
        binary: Whether the values are sent as bytes.
    """
    kind = next(
        (word for word, dtype in _TYPES.items() if isinstance(values, np.ndarray) and values.dtype == dtype),
        "BYTES",
    )
    about: dict[str, Any] = {"name": name, "datatype": kind, "shape": [*shape]}
    if not binary:
        data = values.ravel().tolist() if isinstance(values, np.ndarray) else [*values]
        return about | {"data": data}, b""
    if isinstance(values, np.ndarray):
        content = values.astype(_TYPES[kind]).tobytes()
    else:
        texts = [text.encode() for text in values]
        content = b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    return about | {"parameters": {"binary_data_size": len(content)}}, content
