"""engine=processes: make runs in several processes of this machine, each with its share of the devices."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from visprompt.errors import UserError
from visprompt.machine import cores
from visprompt.runs.devices import local_devices
from visprompt.runs.engine.pool import Died, Pool, Worker
from visprompt.runs.engine.process import WorkerDied, WorkerProcess, end
from visprompt.runs.job import Job, Trainer

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class Processes(Pool):
    """Runs units in worker processes, at most one in each slot; a context manager.

    Attributes:
        slots: The environment variables of each slot: its GPUs and its number of threads.
        folder: Where the output of the workers is written.
    """

    slots: Sequence[Mapping[str, str]]
    folder: Path
    _free: list[int] = field(default_factory=list, init=False)
    _started: int = field(default=0, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> "Processes":
        self._free = list(range(len(self.slots)))
        self._stack.enter_context(self.shown)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            end([worker.handle.process for worker in self.workers])

    def start(self) -> "_InSlot":
        """Start a worker process in a free slot."""
        self._started += 1
        slot = self._free.pop(0)
        log = self.folder / f"worker-{self._started}.log"
        return _InSlot(WorkerProcess(self.slots[slot], log, sys.path), slot)

    def send(self, handle: "_InSlot", jobs: Sequence[str]) -> None:
        """Send a unit's jobs to a worker process."""
        handle.process.send(jobs)

    def messages(self, seconds: float) -> list[tuple[Worker, dict[str, Any] | Died]]:
        """Wait for messages of the worker processes, see `Pool`."""
        by_connection = {worker.handle.process.connection: worker for worker in self.workers}
        messages: list[tuple[Worker, dict[str, Any] | Died]] = []
        for connection in wait(list(by_connection), seconds):
            worker = by_connection[connection]
            try:
                messages.append((worker, worker.handle.process.receive()))
            except WorkerDied as death:
                self._free.append(worker.handle.slot)
                messages.append((worker, Died(str(death))))
        return messages

    def advice(self, worker: Worker) -> str:
        """Return what to do about a worker that has died."""
        return f"{worker.handle.process.log} has its output; if memory ran out give engine.max_concurrent=1"


@dataclass(frozen=True, eq=False)
class _InSlot:
    """A worker process and the slot that it occupies."""

    process: WorkerProcess
    slot: int


def slots_for(jobs: Sequence[Job], runs_per_gpu: int, most: int | None) -> list[dict[str, str]]:
    """Return the environment variables of the workers that may run at the same time.

    With GPUs there are `runs_per_gpu` workers for each GPU, or for each group of as many GPUs as a run takes.
    Without, there is one for each core, or for each `OMP_NUM_THREADS` cores if that is set.

    Args:
        jobs: The jobs of a command.
        runs_per_gpu: Number of runs that share a GPU.
        most: The largest number of workers, or None.

    Raises:
        UserError: The jobs ask for more GPUs than are visible, or for GPUs by number.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    groups = _groups(visible_gpus(), jobs)
    by_threads = int(threads) if threads.isdecimal() and int(threads) else 1
    devices: list[dict[str, str]] = [{_VISIBLE: ",".join(group)} for group in groups] * runs_per_gpu
    devices = devices or [{}] * max(1, cores() // (by_threads * _per_run(jobs)))
    devices = devices[:most] if groups or most is None else [{}] * most
    share = threads or str(max(1, cores() // (len(devices) * _per_run(jobs))))  # for each device of a run
    return [each | {"OMP_NUM_THREADS": share} for each in devices]


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA shows this process: numbers, or names as in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    if _VISIBLE not in os.environ:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in os.environ[_VISIBLE].split(",")]
    # of several parts of GPUs (MIG) CUDA shows a process only one
    return names if count and all(name.startswith("MIG-") for name in names) else names[:count]


def uses_gpus(trainer: Trainer) -> bool:
    """Return whether a trainer may take GPUs, if there are any."""
    return trainer.accelerator not in ("cpu", "mps")


def _per_run(jobs: Sequence[Job]) -> int:
    return max(local_devices(job.trainer) for job in jobs)


def _groups(gpus: Sequence[str], jobs: Sequence[Job]) -> list[list[str]]:
    """Divide GPUs into groups of as many as a run takes; [] if the runs take none."""
    on_apple = torch.backends.mps.is_available()  # whose GPU accelerator=gpu takes too
    if not (gpus or on_apple) and any(job.trainer.accelerator in ("gpu", "cuda") for job in jobs):
        raise UserError(
            f"trainer.accelerator=gpu asks for a GPU, and this command sees none ({_VISIBLE}="
            f"{os.environ.get(_VISIBLE, 'not set')}): give trainer=default, or start it where there is one"
        )
    if not gpus or not any(uses_gpus(job.trainer) for job in jobs):
        return []
    for job in jobs:
        if isinstance(job.trainer.devices, list):
            count = len(job.trainer.devices)
            raise UserError(
                f"trainer.devices={job.trainer.devices} names GPUs, which engine=processes gives out itself: "
                f"give trainer.devices={count}, and name GPUs in {_VISIBLE} before the command"
            )
    size = _per_run(jobs)
    if size > len(gpus):
        raise UserError(
            f"trainer.devices={size} asks for more GPUs than the {len(gpus)} that this command sees: lower it"
        )
    return [list(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]
