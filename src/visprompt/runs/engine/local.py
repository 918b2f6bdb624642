"""engine=local: make runs in this process, one after the other."""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext

from visprompt.runs import ranks
from visprompt.runs.one_by_one import OneByOne
from visprompt.runs.run_lock import AtWork, is_free, is_given_up
from visprompt.runs.unit import Outcome, Unit, run_unit
from visprompt.text import Terminal

console = Terminal()
_POLL = 2.0  # seconds between two checks of runs that other processes are working on


class LocalEngine:
    """Makes the runs of units in this process.

    Args:
        wait: What to do about a run that another process is working on: True runs the other units first and
            then waits for that process to finish or end; False counts the run as failed, unless that
            process is on another machine and gives no sign of life.
        total: Number of runs, as far as it is known before the first; None shows only the time left of each.
    """

    at_once = False

    def __init__(self, wait: bool = True, total: int | None = None) -> None:
        self._wait = wait
        self._runs = None if total is None else OneByOne(total)
        self._count = 0
        self._queue: deque[tuple[int, Unit]] = deque()
        self._waiting: dict[int, tuple[Unit, AtWork]] = {}

    def add(self, unit: Unit, names: Sequence[str]) -> int:
        """Queue a unit, see `drive.Engine`."""
        self._count += 1
        self._queue.append((self._count, unit))
        return self._count

    def next(self) -> tuple[int, list[Outcome]]:
        """Make the runs of the next unit, see `drive.Engine`."""
        while self._queue:
            number, unit = self._queue.popleft()
            try:
                return number, self._run(unit)
            except AtWork as error:
                if not self._wait:
                    # ranks would have to agree whether they wait
                    if not ranks.started_elsewhere() and is_given_up(error.folder, error.remote):
                        self._queue.appendleft((number, unit))
                        continue
                    return number, [Outcome(job.name, None, str(error)) for job in unit]
                self._waiting[number] = unit, error
                said = f"{unit[0].name}: {error.who} is working on it: waiting until later"
                console.print(said, highlight=False, soft_wrap=True)
        while True:
            for number, (unit, at_work) in list(self._waiting.items()):
                if not is_free(at_work.folder, at_work.remote):
                    continue
                try:
                    outcomes = self._run(unit)
                    del self._waiting[number]
                    return number, outcomes
                except AtWork as error:  # a third process, or a later run of a chain of pruning
                    self._waiting[number] = unit, error
            time.sleep(_POLL)

    def _run(self, unit: Unit) -> list[Outcome]:
        with self._runs.running(len(unit)) if self._runs is not None else nullcontext():
            return run_unit(unit)
