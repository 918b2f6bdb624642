"""Give units of work to several workers, and give those of a worker that dies to another one."""

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visprompt.errors import UserError
from visprompt.runs import signals
from visprompt.runs.engine.progress import Shown
from visprompt.runs.remote_run import remote_at
from visprompt.runs.run_lock import is_free
from visprompt.runs.unit import Outcome, Unit

_POLL = 2.0  # seconds between two checks of runs that other commands are working on
Warm = tuple[str, str]  # a backbone and a task, which a worker has in memory after a run


@dataclass(eq=False)
class Queued:
    """A unit that is not finished.

    Attributes:
        number: The unit's number.
        jobs: Its jobs, as YAML.
        names: A name of each job.
        warm: What a worker has in memory after it.
        deaths: How many workers have died of it.
        since: When the worker that works on it began.
    """

    number: int
    jobs: list[str]
    names: list[str]
    warm: Warm
    deaths: int = 0
    since: float = 0.0


@dataclass(eq=False)
class Worker:
    """A worker of a pool.

    Attributes:
        handle: What the pool's engine knows it by.
        ready: Whether it takes units.
        unit: The unit that it works on.
        warm: What it has in memory.
    """

    handle: Any
    ready: bool = False
    unit: Queued | None = None
    warm: Warm | None = None


@dataclass(frozen=True)
class Died:
    """The message in place of a worker's answer if the worker has died; `how` says how."""

    how: str


@dataclass
class Pool(ABC):
    """An engine with several workers; subclasses start, ask and end them.

    Workers are started when there are units for them. A unit goes to the worker that has its task and
    backbone in memory, if there is one.

    Attributes:
        shown: Where finished runs are shown.
        most: The largest number of workers.
        retries: How often a unit is given to another worker after its worker has died.
    """

    shown: Shown
    most: int
    retries: int
    at_once: bool = field(default=True, init=False)
    workers: list[Worker] = field(default_factory=list, init=False)
    _queue: deque[Queued] = field(default_factory=deque, init=False)
    _others: dict[tuple[Path, str | None], list[Queued]] = field(default_factory=dict, init=False)
    _finished: deque[tuple[int, list[Outcome]]] = field(default_factory=deque, init=False)
    _count: int = field(default=0, init=False)
    _failed_starts: int = field(default=0, init=False)
    _checked: float = field(default=0.0, init=False)

    @abstractmethod
    def start(self) -> Any:
        """Start a worker and return its handle; its first message will be `{"ready": true}`."""

    @abstractmethod
    def send(self, handle: Any, jobs: Sequence[str]) -> None:
        """Send a unit's jobs, as YAML, to a worker."""

    @abstractmethod
    def messages(self, seconds: float) -> list[tuple[Worker, dict[str, Any] | Died]]:
        """Wait at most some seconds for messages of workers, and return those that have come."""

    def add(self, unit: Unit, names: Sequence[str]) -> int:
        """Queue a unit, see `drive.Engine`."""
        self._count += 1
        warm = json.dumps(dict(unit[0].backbone)), json.dumps([unit[0].task, dict(unit[0].data)], default=str)
        self._queue.append(Queued(self._count, [job.as_yaml() for job in unit], list(names), warm))
        return self._count

    def next(self) -> tuple[int, list[Outcome]]:
        """Wait until a unit is finished, see `drive.Engine`."""
        while not self._finished:
            signals.check()
            self._requeue_free()
            self._give()
            self.shown.running(sum(worker.unit is not None for worker in self.workers))
            for worker, message in self.messages(_POLL):
                self._take(worker, message)
        return self._finished.popleft()

    def _give(self) -> None:
        """Give units to idle workers, and start workers for those that are left."""
        idle = [worker for worker in self.workers if worker.ready and worker.unit is None]
        while idle and self._queue:
            worker, unit = self._pair(idle)
            idle.remove(worker)
            self._queue.remove(unit)
            worker.unit, worker.warm, unit.since = unit, unit.warm, time.monotonic()
            self.send(worker.handle, unit.jobs)
        starting = sum(not worker.ready for worker in self.workers)
        for _ in range(min(len(self._queue) - starting, self.most - len(self.workers))):
            self.workers.append(Worker(self.start()))

    def _pair(self, idle: Sequence[Worker]) -> tuple[Worker, Queued]:
        """Return the pair of a worker and a unit to begin next.

        That is a unit whose task and backbone the worker has in memory; otherwise one that no other worker
        has; otherwise one whose backbone it has; and among equal ones the first.
        """
        held = {worker.warm for worker in self.workers}
        pairs = [(worker, unit) for unit in self._queue for worker in idle]
        return max(
            pairs,
            key=lambda pair: (
                pair[0].warm == pair[1].warm,
                pair[1].warm not in held,
                pair[0].warm is not None and pair[0].warm[0] == pair[1].warm[0],
            ),
        )

    def _take(self, worker: Worker, message: dict[str, Any] | Died) -> None:
        """Act on the message of a worker."""
        if isinstance(message, Died):
            self.workers.remove(worker)
            self._lost(worker, message.how)
            return
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
            return
        unit, worker.unit = worker.unit, None
        assert unit is not None  # a worker answers once
        if "at_work" in message:
            at_work = message["at_work"]
            self.shown.say(f"{unit.names[0]}: {at_work['who']} is working on it: waiting until later")
            self._others.setdefault((Path(at_work["folder"]), at_work["url"]), []).append(unit)
            return
        self._finish(unit, [Outcome.of(record) for record in message["outcomes"]])

    def _lost(self, worker: Worker, how: str) -> None:
        """Queue the unit of a worker that has died again, or count it as failed.

        Raises:
            UserError: The worker had not begun, and neither had those before it.
        """
        unit = worker.unit
        if unit is None:
            self._failed_starts += not worker.ready
            # as long as another one works, the runs go on with it
            if self._failed_starts > self.retries and not any(other.ready for other in self.workers):
                raise UserError(f"workers cannot be started: the last one {how}: {self.advice(worker)}")
            return
        unit.deaths += 1
        if unit.deaths > self.retries:
            times = f", as {unit.deaths - 1} before it" if unit.deaths > 1 else ""
            reason = f"its worker {how}{times}: {self.advice(worker)}"
            self._finish(unit, [Outcome(name, None, reason) for name in unit.names])
            return
        self.shown.say(f"{unit.names[0]}: its worker {how}: started again, {unit.deaths} of {self.retries}")
        self._queue.appendleft(unit)

    def advice(self, worker: Worker) -> str:
        """Return what to do about a worker that has died."""
        return "give a smaller engine.max_concurrent if memory ran out"

    def _finish(self, unit: Queued, outcomes: list[Outcome]) -> None:
        self.shown.finished(unit.names, outcomes, time.monotonic() - unit.since)
        self._finished.append((unit.number, outcomes))

    def _requeue_free(self) -> None:
        """Queue the units whose runs other commands were working on and have left."""
        if time.monotonic() - self._checked < _POLL:
            return
        self._checked = time.monotonic()
        for folder, url in list(self._others):
            if is_free(folder, remote_at(folder, url) if url else None):
                self._queue.extend(self._others.pop((folder, url)))
