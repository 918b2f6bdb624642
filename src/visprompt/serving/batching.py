"""Gather the images of all requests into batches, in one thread that calls the bank."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import NamedTuple

import torch
from torch import Tensor

from visprompt.models.bank import Bank
from visprompt.models.dense_prediction import mask_of
from visprompt.models.prepared import Task
from visprompt.serving.metrics import Metrics
from visprompt.serving.pictures import Input

_log = logging.getLogger(__name__)

Compute = Callable[[Sequence[Input], Sequence[Task]], Sequence[Tensor]]


class _Job(NamedTuple):
    image: Input
    task: Task
    result: "Future[Tensor]"
    since: float  # on the monotonic clock


class Batcher:
    """A queue of images and the thread that computes them, whatever their tasks, in the order of arrival.

    Args:
        compute: Returns each image's result, of images and their tasks.
        size: Images in one batch.
        wait: Seconds for which a batch that is not full waits for more images.
        metrics: Where batches are counted.
    """

    def __init__(self, compute: Compute, *, size: int, wait: float, metrics: Metrics) -> None:
        self._function = compute
        self._size = size
        self._wait = wait
        self._metrics = metrics
        self._jobs: deque[_Job] = deque()
        self._changed = Condition()
        self._closed = False
        self.seconds_per_image = 0.0  # a moving mean, for Retry-After
        self._thread = Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether batches are computed."""
        return self._thread.is_alive() and not self._closed

    def __len__(self) -> int:
        """Return the number of images that wait."""
        return len(self._jobs)

    def submit(self, image: Input, task: Task) -> "Future[Tensor]":
        """Put an image into the queue.

        Returns:
            Its result to come. One that is cancelled before its batch begins is not computed.

        Raises:
            RuntimeError: The queue is closed.
        """
        job = _Job(image, task, Future(), time.monotonic())
        with self._changed:
            if self._closed:
                raise RuntimeError("the queue is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.result

    def close(self) -> None:
        """Compute what is in the queue, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            if jobs := [job for job in jobs if job.result.set_running_or_notify_cancel()]:
                started = time.monotonic()
                self._metrics.batch_begins(
                    [job.since for job in jobs], {job.task.name for job in jobs}, started
                )
                self._compute(jobs)
                seconds = time.monotonic() - started
                self._metrics.computing.observe(seconds)
                self.seconds_per_image += 0.1 * (seconds / len(jobs) - self.seconds_per_image)

    def _next(self) -> list[_Job]:
        """Return the next batch; an empty one if the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            self._changed.wait_for(lambda: len(self._jobs) >= self._size or self._closed, timeout=self._wait)
            return [self._jobs.popleft() for _ in range(min(self._size, len(self._jobs)))]

    def _compute(self, jobs: Sequence[_Job]) -> None:
        """Compute a batch; if it fails, compute each image alone, so that only those fail which must."""
        try:
            results = self._function([job.image for job in jobs], [job.task for job in jobs])
        except Exception as error:  # anything: the thread must go on
            if len(jobs) > 1:
                _log.warning("a batch of %d images failed (%s): computing each alone", len(jobs), error)
                for job in jobs:
                    self._compute([job])
                return
            _log.exception("an image of task %s failed", jobs[0].task.name)
            jobs[0].result.set_exception(error)
            return
        for job, result in zip(jobs, results, strict=True):
            job.result.set_result(result)


def answers(bank: Bank, images: Sequence[Input], tasks: Sequence[Task]) -> list[Tensor]:
    """Return the probabilities [C] of each image, float32; of a segmentation task the mask, uint8 [H, W].

    All are on the CPU. A mask of numbers that are not finite is NaN, float32 [].
    """
    flat = [i for i, task in enumerate(tasks) if not task.kind.dense]
    found = dict(
        zip(flat, _probabilities(bank, [images[i] for i in flat], [tasks[i] for i in flat]), strict=True)
    )
    return [
        _mask(bank, image, task) if task.kind.dense else found[i]
        for i, (image, task) in enumerate(zip(images, tasks, strict=True))
    ]


def _probabilities(bank: Bank, images: Sequence[Input], tasks: Sequence[Task]) -> list[Tensor]:
    """Return the probabilities [C], float32 on the CPU, of images of tasks with a label for each image."""
    if not images:
        return []
    logits = bank([each.image for each in images], tasks)
    flat = torch.cat([row.float() for row in logits]).cpu()  # one copy from the GPU, not one for each image
    rows = flat.split([len(row) for row in logits])
    return [task.probabilities(row) for task, row in zip(tasks, rows, strict=True)]


def _mask(bank: Bank, image: Input, task: Task) -> Tensor:
    """Return the mask of an image; alone, because the logits of all its pixels take up to a gigabyte."""
    mask = mask_of(bank([image.image], task)[0], image.size)
    return torch.from_numpy(mask.labels) if math.isfinite(mask.probability) else torch.tensor(math.nan)
