"""Read the body of a request under the limits, and the images in it."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from visprompt.errors import sentence
from visprompt.serving.limits import Ticket
from visprompt.serving.refused import Refused
from visprompt.serving.service import Service

TOP_K = 5
_MOST_KEYS = 10


class PredictRequest(BaseModel):
    """Images as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str]
    """Image files in base64 (not addresses: nothing is fetched)."""
    top_k: Annotated[int, Field(ge=1, le=100_000)] = TOP_K
    """Number of classes to return, the most probable first."""


@dataclass(frozen=True)
class Given:
    """What a request asks.

    Attributes:
        images: Encoded images, or why one cannot be read.
        top_k: Number of classes to return.
    """

    images: list[bytes | Refused]
    top_k: int


async def read(request: Request, ticket: Ticket, service: Service) -> Given:
    """Read images from multipart/form-data or JSON.

    Args:
        request: The request.
        ticket: Its room in the service; more is taken as the body arrives.
        service: The service, for its limits.

    Raises:
        Refused: The body is too large or cannot be read, or holds no image or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        given = await _multipart(request, ticket, service)
    elif kind == "application/json":
        content = await body(request, ticket, service)
        given = await service.in_thread(_json, content, service.limits.images)
    else:
        raise Refused(415, "send the images as multipart/form-data or as application/json")
    if not given.images:
        raise Refused(400, "the request holds no image: send at least one")
    take_images(len(given.images), ticket, service)
    return given


def take_images(count: int, ticket: Ticket, service: Service) -> None:
    """Take room for the images of a request, of which one was admitted with it.

    Raises:
        Refused: They are too many for one request, or for now.
    """
    check_count(count, service.limits.images)
    ticket.take(images=count - 1)


def check_count(count: int, most: int) -> None:
    """Refuse more images than one request may hold.

    Raises:
        Refused: There are more than `most`.
    """
    if count > most:
        raise Refused(413, f"the request holds {count} images, more than the {most} allowed")


async def body(request: Request, ticket: Ticket, service: Service) -> bytes:
    """Read a body whole.

    Raises:
        Refused: It is larger than allowed, or compressed.
    """
    return b"".join([chunk async for chunk in _chunks(request, ticket, service)])


async def _chunks(request: Request, ticket: Ticket, service: Service) -> AsyncGenerator[bytes, None]:
    """Yield a body in parts, and count them while they come: a header may lie, or be missing."""
    most = service.limits.request_bytes
    too_large = Refused(413, f"the request has more than the {most} bytes allowed")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "compressed requests are not read: send the body as it is")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > most:
            raise too_large
        ticket.take(size=len(chunk))
        yield chunk


async def _multipart(request: Request, ticket: Ticket, service: Service) -> Given:
    parser = MultiPartParser(
        request.headers, _chunks(request, ticket, service), max_files=service.limits.images, max_fields=10
    )
    parser.spool_max_size = service.limits.request_bytes  # in memory: images are not written to the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"the form cannot be read: {error.message.rstrip('.')}") from error
    images: list[bytes | Refused] = []
    top_k = str(TOP_K)
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            images.append(await value.read())
            await value.close()
        elif name == "top_k":
            top_k = value
        else:
            raise Refused(400, f"unknown field {name!r}: send the images as files, and top_k as a number")
    if not top_k.isdecimal() or len(top_k) > 9 or not 1 <= int(top_k) <= 100_000:
        raise Refused(400, "top_k is not a number of classes: give a whole number of 1 or more")
    return Given(images, int(top_k))


def _json(content: bytes, most: int) -> Given:
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the request is not JSON") from error
    # before pydantic, which collects an error for each entry and key
    if isinstance(given, dict) and len(given) > _MOST_KEYS:
        raise Refused(400, "the request is not valid: it has unknown keys, give only images and top_k")
    if isinstance(given, dict) and isinstance(given.get("images"), list):
        check_count(len(given["images"]), most)
    try:
        asked = PredictRequest.model_validate(given)
    except ValidationError as error:
        raise Refused(400, f"the request is not valid: {sentence(error)}") from error
    return Given([from_base64(text, number + 1) for number, text in enumerate(asked.images)], asked.top_k)


def from_base64(text: str, number: int) -> bytes | Refused:
    """Return the bytes of an image, or the reason why it has none; `number` is its place, from 1."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return Refused(
            400, f"image {number} is not base64: send the file's bytes in base64, not an address or a path"
        )
