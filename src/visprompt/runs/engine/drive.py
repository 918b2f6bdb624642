"""The interface of engines, and the loop that gives several sequences of runs to one of them."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from visprompt.runs import stack
from visprompt.runs.job import Job
from visprompt.runs.unit import Outcome, Unit

T = TypeVar("T")
Named = tuple[str, Job]
"""A job with the name of its outcome, such as "dtd/vpt_deep recipe.lr=0.1"."""
Steps = Generator[Sequence[Named], list[Outcome], T]
"""Yields jobs that may run at the same time, is sent their outcomes in the same order, and returns a value.

The protocol on one task is such a sequence: the points of its grid, then the seeds of the chosen point.
"""


class Engine(Protocol):
    """Makes the runs of units of work.

    Attributes:
        at_once: Whether it works on several units at the same time, and so wants all that can be made.
    """

    at_once: bool

    def add(self, unit: Unit, names: Sequence[str]) -> int:
        """Queue a unit.

        Args:
            unit: The jobs of the unit.
            names: A name of each job, for messages.

        Returns:
            The unit's number.
        """

    def next(self) -> tuple[int, list[Outcome]]:
        """Wait until a unit is finished, and return its number and the outcomes of its jobs.

        A unit with a run that another command is working on comes after that run is free.
        """


def units(named: Sequence[Named], stacks: bool) -> list[list[int]]:
    """Divide jobs into units; return the places in `named` of the jobs of each unit."""
    return stack.groups([job for _, job in named]) if stacks else [[place] for place in range(len(named))]


def drive(engine: Engine, sequences: Iterable[Steps[T]], stacks: bool = False) -> list[T]:
    """Advance sequences of runs over one engine until all have ended.

    An engine that works on one unit at a time gets one sequence after the other; the runs of all sequences
    are given to any other engine as soon as what they depend on is finished.

    Args:
        engine: The engine.
        sequences: The sequences; each is advanced when the outcomes of all jobs that it yielded are there.
        stacks: Whether jobs that can be are trained together, see `runs.stack`.

    Returns:
        What the sequences returned, in the same order.
    """
    waiting = deque(enumerate(sequences))
    active: dict[int, _Active[T]] = {}
    owners: dict[int, tuple[int, list[int]]] = {}  # sequence, and places of the jobs, by the unit's number
    returned: dict[int, T] = {}

    def advance(number: int, steps: Steps[T], outcomes: list[Outcome] | None) -> None:
        try:
            named = next(steps) if outcomes is None else steps.send(outcomes)
            while not named:
                named = steps.send([])
        except StopIteration as end:
            returned[number] = end.value
            active.pop(number, None)
            return
        active[number] = _Active(steps, named)
        for places in units(named, stacks):
            chosen = [named[place] for place in places]
            ticket = engine.add(tuple(job for _, job in chosen), [name for name, _ in chosen])
            owners[ticket] = number, places

    while waiting or active:
        while waiting and (engine.at_once or not active):
            advance(*waiting.popleft(), None)
        if active:
            ticket, outcomes = engine.next()
            number, places = owners.pop(ticket)
            if active[number].has_all(places, outcomes):
                advance(number, active[number].steps, active[number].in_order())
    return [returned[number] for number in sorted(returned)]


class _Active(Generic[T]):
    """A sequence whose yielded jobs are with the engine."""

    def __init__(self, steps: Steps[T], named: Sequence[Named]) -> None:
        self.steps = steps
        self._names = [name for name, _ in named]
        self._outcomes: dict[int, Outcome] = {}

    def has_all(self, places: Iterable[int], outcomes: Iterable[Outcome]) -> bool:
        """Keep the outcomes of a unit, and return whether those of all jobs are there."""
        for place, outcome in zip(places, outcomes, strict=True):
            self._outcomes[place] = replace(outcome, name=self._names[place])
        return len(self._outcomes) == len(self._names)

    def in_order(self) -> list[Outcome]:
        """Return the outcomes in the order of the jobs."""
        return [self._outcomes[place] for place in range(len(self._names))]


def in_one_step(jobs: Iterable[Job]) -> Steps[list[Outcome]]:
    """Return the sequence of jobs that do not depend on each other; it returns their outcomes."""
    return (yield [(job.name, job) for job in jobs])
