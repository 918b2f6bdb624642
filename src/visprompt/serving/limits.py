"""Limits of a service, and the admission of requests under them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from visprompt.errors import UserError
from visprompt.serving.refused import Refused


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a service: the keys of `limits` in configs/serve.yaml, which says what is right for whom.

    Attributes:
        image_bytes: Bytes of one encoded image.
        image_pixels: Pixels of one image, read from its header before it is decoded.
        images: Images in one request.
        request_bytes: Bytes of one request's body.
        held_bytes: Bytes of all bodies that are held at one time.
        batch: Images in one pass of the backbone.
        batch_wait_ms: Milliseconds for which a batch that is not full waits for more images.
        queue: Images that are in the service at one time: received, waiting and computed.
        seconds: Seconds within which a request is answered, its upload included.
        drain_seconds: Seconds that open requests have to finish after SIGTERM.

    Raises:
        UserError: A request that the other limits allow could never be admitted.
    """

    image_bytes: int
    image_pixels: int
    images: int
    request_bytes: int
    held_bytes: int
    batch: int
    batch_wait_ms: float
    queue: int
    seconds: float
    drain_seconds: float

    def __post_init__(self) -> None:
        for small, large in (("images", "queue"), ("request_bytes", "held_bytes")):
            if getattr(self, small) > getattr(self, large):
                raise UserError(
                    f"limits.{small}={getattr(self, small)} is more than "
                    f"limits.{large}={getattr(self, large)}: give limits.{large} at least as much"
                )


class Admission:
    """Counts the images and bytes in the service, and refuses what is too much.

    It is used in the event loop only, so it needs no lock.

    Args:
        limits: The limits.
        seconds_per_image: Returns the recent time of one image, for Retry-After.
    """

    def __init__(self, limits: Limits, seconds_per_image: Callable[[], float]) -> None:
        self._limits = limits
        self._seconds_per_image = seconds_per_image
        self.images = 0
        self.bytes = 0

    @contextmanager
    def enter(self) -> Iterator["Ticket"]:
        """Admit a request of one image, of whose body nothing has been read yet; free all it took at the end.

        Raises:
            Refused: The service is full.
        """
        ticket = Ticket(self)
        try:
            ticket.take(images=1)
            yield ticket
        finally:
            self.images -= ticket.images
            self.bytes -= ticket.bytes

    def check(self, images: int, size: int) -> None:
        """Refuse what would be too much beside what is in the service."""
        if self.images + images > self._limits.queue or self.bytes + size > self._limits.held_bytes:
            wait = min(60, max(1, math.ceil(self.images * self._seconds_per_image())))
            raise Refused(429, f"the service is full: try again in {wait} seconds", retry_after=wait)


class Ticket:
    """What one request takes of the service's room."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.images = 0
        self.bytes = 0

    def take(self, images: int = 0, size: int = 0) -> None:
        """Take room for more images and bytes.

        Raises:
            Refused: The limit of images or bytes is reached.
        """
        self._admission.check(images, size)
        self.images += images
        self.bytes += size
        self._admission.images += images
        self._admission.bytes += size
