"""The service behind all endpoints: from the images of a request to probabilities or masks."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import lru_cache, partial
from typing import Any, TypeVar

from torch import Tensor

from visprompt.errors import UserError
from visprompt.machine import cores
from visprompt.models.attention import Weights
from visprompt.models.bank import Bank
from visprompt.models.prepared import Task
from visprompt.serving.batching import Batcher, answers
from visprompt.serving.limits import Admission, Limits, Ticket
from visprompt.serving.metrics import Metrics
from visprompt.serving.pictures import Content, Input, prepare
from visprompt.serving.refused import Refused
from visprompt.serving.states import States
from visprompt.text import visible

_T = TypeVar("_T")


class _Room:
    """The pixels that are left for the masks of a request."""

    def __init__(self, pixels: int) -> None:
        self._left = pixels

    def take(self, pixels: int) -> bool:
        """Take pixels if so many are left, and return whether they were."""
        fits = pixels <= self._left
        self._left -= pixels if fits else 0
        return fits


@lru_cache
def names_of(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return class names as texts that can be sent: bytes of folders' names that are not UTF-8 as escapes."""
    return tuple(map(visible, class_names))


class Service:
    """Decodes images in threads, computes them in batches that mix all tasks, and bounds both.

    Args:
        bank: The tasks.
        states: What keeps the bank equal to the files.
        limits: The limits.
    """

    def __init__(self, bank: Bank, states: States, limits: Limits) -> None:
        self.bank = bank
        self.states = states
        self.limits = limits
        self.metrics = Metrics()
        self.draining = False
        self._batcher = Batcher(
            partial(answers, bank),
            size=limits.batch,
            wait=limits.batch_wait_ms / 1000,
            metrics=self.metrics,
        )
        self._pool = ThreadPoolExecutor(min(8, cores() + 1), thread_name_prefix="decode")
        # apart from it, because requests for tasks that are being loaded wait
        self._loading = ThreadPoolExecutor(4, thread_name_prefix="load")
        self._attending = asyncio.Semaphore(1)
        self._admission = Admission(limits, lambda: self._batcher.seconds_per_image)
        self.metrics.admitted.set_function(lambda: self._admission.images)
        self.metrics.held.set_function(lambda: self._admission.bytes)
        self.metrics.waiting.set_function(lambda: len(self._batcher))

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self._batcher.alive and not self.draining

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Ticket]:
        """Admit a request and limit its time.

        Raises:
            Refused: The service is full, or the time is over.
        """
        seconds = self.limits.seconds
        with self._admission.enter() as ticket:
            try:
                async with asyncio.timeout(seconds):
                    yield ticket
            except TimeoutError:
                raise Refused(
                    504, f"the request was not answered within {seconds:g} seconds: try again"
                ) from None

    async def task(self, name: str) -> Task:
        """Return a task, loaded if it was evicted.

        Raises:
            Refused: It does not answer.
        """
        with suppress(UserError):  # most requests wait for no thread
            if (task := self.bank.in_memory(name)) is not None:
                return task
        return await self.while_loading(self.states.task, name)

    async def predict(self, task: Task, contents: Sequence[Content | Refused]) -> list[Tensor | Refused]:
        """Return each image's probabilities [C], float32, or its mask, uint8 [H, W], or why it has none.

        The masks of a request have no more pixels together than one image may have, because they are held
        until all are answered.

        Args:
            task: The task, as it is now: an answer never mixes the logits of one state with the classes of
                another that replaces it meanwhile.
            contents: The images; what could not even be read stays refused.
        """
        room = _Room(self.limits.image_pixels)
        return list(await asyncio.gather(*(self._one(task, c, i + 1, room) for i, c in enumerate(contents))))

    async def attention(self, task: Task, content: Content | Refused) -> tuple[Tensor, Weights]:
        """Return an image as the backbone's input [3, size, size], and the attention of its pooled tokens.

        Images are computed one at a time between the batches, as this is for people who look at them.

        Raises:
            Refused: The image cannot be used, or the backbone has no attention that can be shown.
        """
        image = await self._input(task, content, 1)
        if isinstance(image, Refused):
            raise image
        async with self._attending:
            try:
                found = await self.in_thread(self.bank.attention, image.image, task)
            except UserError as error:
                raise Refused(422, str(error)) from error
        self.metrics.images.labels(task.name, "ok").inc()
        return image.image, found

    async def in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function that takes long, in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def while_loading(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function that may wait until a state is loaded, in a thread that no decoding needs."""
        return await asyncio.get_running_loop().run_in_executor(self._loading, function, *arguments)

    def close(self) -> None:
        """End all threads, after what is in the queue."""
        self.states.close()
        self._loading.shutdown()
        self._pool.shutdown()
        self._batcher.close()

    async def _one(
        self, task: Task, content: Content | Refused, number: int, room: "_Room"
    ) -> Tensor | Refused:
        outcome = await self._input(task, content, number)
        if not isinstance(outcome, Refused) and task.kind.dense and not room.take(math.prod(outcome.size)):
            self.metrics.images.labels(task.name, "bad").inc()
            return Refused(
                413,
                f"image {number} is too much: the masks of a request have at most "
                f"{self.limits.image_pixels} pixels together, so send fewer images in one",
            )
        if isinstance(outcome, Refused):
            return outcome
        try:
            shares = await asyncio.wrap_future(self._batcher.submit(outcome, task))
        except Exception:  # the thread has logged it
            shares = None
        if shares is None or not shares.isfinite().all():
            self.metrics.images.labels(task.name, "failed").inc()
            why = (
                "failed: the log of the service says why"
                if shares is None
                else "gave no finite probabilities"
            )
            return Refused(500, f"image {number} {why}")
        self.metrics.images.labels(task.name, "ok").inc()
        return shares

    async def _input(self, task: Task, content: Content | Refused, number: int) -> Input | Refused:
        """Return an image as the backbone's input, or why it cannot be; the latter is counted."""
        outcome: Input | Refused
        if isinstance(content, Refused):
            outcome = content
        else:
            outcome = await self.in_thread(self._prepared, content, number, task)
        if isinstance(outcome, Refused):
            self.metrics.images.labels(task.name, "failed" if outcome.status >= 500 else "bad").inc()
        return outcome

    def _prepared(self, content: Content, number: int, task: Task) -> Input | Refused:
        started = time.monotonic()
        outcome = prepare(content, number, task, self.limits)
        self.metrics.decoding.observe(time.monotonic() - started)
        return outcome
