"""A finished run as the report sees it, and what several of them have in common."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from visprompt.data.catalog import TASKS
from visprompt.models.methods import METHODS
from visprompt.reports.settings import UNRECORDED, before_the_choice, family, is_protocol, scope, settings
from visprompt.runs.result import Result

Values = tuple[tuple[str, str], ...]
"""Settings and their values, sorted: what runs are grouped by."""
_Group = TypeVar("_Group")


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        folder: Where it lies.
        result: What its result.json says.
    """

    folder: Path
    result: Result

    @cached_property
    def settings(self) -> dict[str, str]:
        """See `settings.settings`."""
        return settings(self.result)

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.result.method["name"])

    @property
    def task(self) -> str:
        """Id of the task, or the name of the user's own images."""
        return self.result.task

    @property
    def family(self) -> str:
        """See `settings.family`."""
        return family(self.task)

    @property
    def prunes(self) -> bool:
        """Whether it is a link of a chain of pruning: it names the initial values that it starts from."""
        return self.result.method.get("initial") is not None

    def values(self, reach: str) -> Values:
        """Its settings of one `settings.scope`."""
        return tuple(sorted((key, value) for key, value in self.settings.items() if scope(key, self.method) == reach))

    def at(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Values of some settings."""
        return tuple(self.settings.get(key, UNRECORDED) for key in keys)

    @cached_property
    def base(self) -> tuple[Any, ...]:
        """What a final run has in common with the points of its grid: everything that is not chosen for the task."""
        facts = {"task": self.task, "data.fingerprint": self.settings.get("data.fingerprint", UNRECORDED)}
        shared = dict([*self.values("row"), *self.values("family")])
        return (self.method, *sorted((before_the_choice(shared) | facts).items()))

    @property
    def choice(self) -> Values:
        """What a recipe's row or a grid chose for the task, without pruning, which no point of the grid has yet."""
        return tuple(before_the_choice(dict(self.values("chosen"))).items())


def grouped(runs: Iterable[Run], key: Callable[[Run], _Group]) -> dict[_Group, list[Run]]:
    """Runs by what `key` says of them, in their order."""
    groups: dict[_Group, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def differing(variants: Iterable[Values]) -> list[str]:
    """Keys in which settings differ, sorted."""
    found = [dict(variant) for variant in variants]
    keys = {key for one in found for key in one}
    return sorted(key for key in keys if len({one.get(key) for one in found}) > 1)


def held(groups: Sequence[Sequence[Run]]) -> list[dict[str, str]]:
    """Settings that hold for all runs of a group, and what they do not record while others do.

    Args:
        groups: Groups of runs of one method each, which share all settings of the scopes "row" and "family".

    Returns:
        For each group values by key, those of a family of tasks under "key (family)". Others are runs of any group for
        settings of the protocol, of the same method for its own, of the same family for the family's.
    """
    asked: dict[str, set[str]] = defaultdict(set)
    for run in (run for group in groups for run in group):
        for key, _ in run.values("row"):
            asked["" if is_protocol(key) else run.method].add(key)
        asked[run.family] |= {key for key, _ in run.values("family")}
    found = []
    for group in groups:
        keys = sorted(asked[""] | asked[group[0].method])
        one = dict(zip(keys, group[0].at(keys), strict=True))
        for run in group:
            one |= {f"{key} ({run.family})": run.settings.get(key, UNRECORDED) for key in asked[run.family]}
        found.append(one)
    return found


def method_place(method: str) -> tuple[int, str]:
    """Sorts methods as `METHODS` does, unknown ones behind them."""
    return _place(method, METHODS)


def task_place(task: str) -> tuple[int, str]:
    """Sorts tasks as the catalog does, the user's own behind them."""
    return _place(task, TASKS)


def _place(name: str, known: Iterable[str]) -> tuple[int, str]:
    names = list(known)
    return names.index(name) if name in names else len(names), name
