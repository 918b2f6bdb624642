"""Keep how many runs a command makes one after the other, and estimate when the last one will be finished."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

_current: "OneByOne | None" = None


class OneByOne:
    """The runs that a process makes one after the other.

    Args:
        total: Number of runs, as far as it is known before the first.

    Attributes:
        total: As given; at least the number of runs that have been begun.
        done: How many runs are finished.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._began: float | None = None
        self._seconds: list[float] = []  # of the runs that were trained and not only shown

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Count some runs, and let `current` return this object until they are finished."""
        global _current
        self.total = max(self.total, self.done + count)
        before, _current, self._began = _current, self, None
        try:
            yield
        finally:
            _current = before
        self.done += count  # not after an error: the runs are left for later
        if self._began is not None:
            self._seconds.append((time.monotonic() - self._began) / count)

    def trains(self) -> None:
        """Say that the run is trained: a run that is only shown says nothing about those that follow."""
        self._began = time.monotonic() if self._began is None else self._began

    def seconds_after(self, this: float) -> float:
        """Estimate the seconds of the runs that come after the one that is being made.

        Args:
            this: Estimated seconds of that run, which count if none was trained before it.
        """
        return (self.total - self.done - 1) * (fmean(self._seconds) if self._seconds else this)


def current() -> OneByOne | None:
    """Return the runs of which this process is making one, or None if they are not counted."""
    return _current
