"""`dry_run=true`: which runs a command would make, how long they would take here, and what they need.

Nothing is trained, fetched or written, but for Hydra's own record of the command. Finished runs are found as
the command itself would find them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from visprompt.data.catalog.task import in_bytes
from visprompt.data.datamodule import no_images
from visprompt.data.sampler import GlobalBatches
from visprompt.errors import UserError
from visprompt.runs import compose
from visprompt.runs.job import Job
from visprompt.runs.result import Result, read_result
from visprompt.runs.run import build_classifier, prepare
from visprompt.runs.run_all import Outcome, check_sweeper, local_devices
from visprompt.text import Terminal
from visprompt.tuning import protocol, pruning, pruning_chain
from visprompt.tuning.dry_run.needs import Needs, offline
from visprompt.tuning.dry_run.pace import PATIENCE, Pace, measure_pace, state_bytes

console = Terminal()
_BESIDE = 20_000  # bytes of config, curve and result beside a tuned state
_COLUMNS = ("method", "grid", "seeds", "runs", "steps", "time left")


@dataclass(frozen=True)
class Planned:
    """A run that a command would make.

    Attributes:
        shape: A job that costs as much.
        exact: The run's own job; None where runs before it are still to say it (the chosen point, pruning's
            masks).
    """

    shape: Job
    exact: Job | None


def train(cfg: DictConfig) -> float:
    """Say what `train.py` would do with a command line.

    Args:
        cfg: What `@hydra.main` composed.

    Returns:
        nan: nothing is scored.

    Raises:
        UserError: Runs could not begin, for a reason other than missing files.
    """
    check_sweeper(cfg)
    found = DryRun()
    with offline():
        for job in compose.jobs(cfg):
            with found.line(job):
                found.add(job, "-", [job.seed], found.planned(job))
    return found.say()


def tune(cfg: DictConfig) -> float:
    """Say what `tune.py` would do with a command line.

    Args:
        cfg: What `@hydra.main` composed.

    Returns:
        nan: nothing is scored.

    Raises:
        UserError: As `train`.
    """
    jobs, seeds = protocol.asked(cfg)
    found = DryRun()
    with offline():
        for job in jobs:
            with found.line(job):
                found.add_protocol(job, seeds)
    return found.say()


class DryRun:
    """What was found out so far, over all lines of the table.

    Attributes:
        lines: The table's lines.
        failed: Why the runs of a line could not begin.
        needs: What is missing.
        paces: What was measured, by what decides it.
        states: Bytes of tuned states, by what decides them.
        frozen: Where the frozen layers' output was counted: it is made once and stays from run to run.
        seconds: Of all runs that are left, as far as they could be measured.
        results: Bytes that these leave behind.
        resume: Bytes of the largest resume state on the way.
        limits: Keys that end epochs early, which the sums leave out.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []
        self.failed: list[str] = []
        self.needs = Needs()
        self.paces: dict[str, Pace] = {}
        self.states: dict[str, int] = {}
        self.frozen: set[str] = set()
        self.seconds = 0.0
        self.results = self.resume = 0
        self.limits: set[str] = set()

    @contextmanager
    def line(self, job: Job) -> Iterator[None]:
        """Find out one line of the table; what is wrong with it does not stop the others."""
        try:
            yield
        except UserError as error:
            self.failed.append(f"{job.name}: {error}")

    def add_protocol(self, job: Job, seeds: Sequence[int]) -> None:
        """Add the line of the protocol for one method on one task."""
        asked: list[list[Job]] = []

        def look(jobs: Iterable[Job]) -> list[Outcome]:
            asked.append(list(jobs))
            return [Outcome(one.name, self.stored(one)) for one in asked[-1]]

        outcomes = protocol.tune_one(job, seeds, look)
        points = {json.dumps(self._numbers(one)): one for one in asked[0]}.values()  # equal ones are one run
        runs = [Planned(one, one) for one in points]
        if len(asked) > 1:
            runs += [run for one in asked[1] for run in self.planned(one)]
        elif any(
            outcome.result is None for outcome in outcomes
        ):  # else the whole grid diverged, and nothing follows
            finals = [job.vary({"split": "final", "seed": seed}) for seed in seeds]
            runs += [replace(run, exact=None) for one in finals for run in self.planned(one)]
        self.add(job, _in_words(len(asked[0]), len(points), job.grid), seeds, runs)

    def planned(self, job: Job) -> list[Planned]:
        """Return the runs that a job stands for: itself, or its chain of pruning."""
        if not pruning_chain.prunes(job):
            return [Planned(job, job)]
        points = pruning_chain.prune_points(job)
        links = self._links(job, points) if self._has_folder(job) else [None] * (len(points) + 1)
        tune, final = (
            job.vary(pruning_chain.unpruned(job) | {"split": split}) for split in ("tune", "final")
        )
        shapes = [tune] * len(points) + [final] * (job.split == "final")
        return [Planned(shape, link) for shape, link in zip(shapes, links, strict=False)]

    def _links(self, job: Job, points: Sequence[pruning.Point]) -> list[Job | None]:
        """Return the runs of a chain of pruning; None where runs before it are still to say it."""
        tune = job.vary({"split": "tune", "rerun": job.rerun and job.split == "tune"})
        folder = prepare(tune).folder
        start, found, chosen = (
            pruning_chain.stored(folder / f"{name}.json") for name in ("initial", "importance", "masks")
        )
        bare = tune.vary({"method.prune_tokens": None, "method.prune_segments": None})
        links: list[Job | None] = [None] * len(points)
        if start:
            links[0] = pruning_chain.link_of(bare, start["initial"])
        if start and found:
            masks = [pruning.prune(pruning.Importance.of(found), point).options() for point in points[:-1]]
            links[1:] = [pruning_chain.link_of(bare, start["initial"], one) for one in masks]
        return [*links, pruning_chain.link_of(job, chosen["initial"], chosen["options"]) if chosen else None]

    def _has_folder(self, job: Job) -> bool:
        """Return whether a job has a folder, and others of its task and method are there."""
        facts = self.needs.facts(job)
        return facts.ready and (Path(job.paths.log_dir) / facts.datamodule.task / job.method.name).is_dir()

    def stored(self, job: Job) -> Result | None:
        """Return the result of a job that is finished and not to be run anew."""
        return (
            read_result(prepare(job).folder, hashed=False)
            if self._has_folder(job) and not job.rerun
            else None
        )

    def add(self, job: Job, grid: str, seeds: Sequence[int], runs: Sequence[Planned]) -> None:
        """Add a line to the table, and what its runs cost to the sums."""
        steps = sorted({self._steps(run.shape) for run in runs})
        left = [run.shape for run in runs if run.exact is None or self.stored(run.exact) is None]
        paces = [self._pace(one) for one in left]
        seconds = sum(self._cost(one, pace) for one, pace in zip(left, paces, strict=True))
        self.seconds += seconds
        self.limits |= {f"trainer.{key}" for key, _ in job.trainer if key.startswith("limit_")}
        for one in left:
            size = self._state(one)
            self.results += size + _BESIDE
            copies = (
                3 if "adamw" in one.recipe.optimizer else 2
            )  # the state, and what its optimiser keeps of it
            self.resume = max(self.resume, copies * size)
        if pruning_chain.prunes(job):
            grid += f", {len(pruning_chain.prune_points(job))} of pruning"
        done = f"{len(runs)}, {len(runs) - len(left)} done"
        each = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1])))
        time = "unknown" if any(pace.why for pace in paces) else in_time(seconds)
        task = self.needs.facts(job).datamodule.task
        self.lines.append((task, str(job.method.name), grid, ", ".join(map(str, seeds)), done, each, time))

    def _steps(self, job: Job) -> int:
        """Optimiser steps of a run."""
        accumulate = int(job.trainer.accumulate_grad_batches)
        batches = GlobalBatches(
            num_rows=self._rows(job),
            batch_size=job.recipe.batch_size,
            world=_devices(job),
            accumulate=accumulate,
            training=True,
        )
        return int(job.recipe.epochs) * (len(batches) // accumulate)

    def _rows(self, job: Job) -> int:
        """Training images, nearly: a share is taken of each class, and rounded there."""
        sets = self.needs.facts(job).datamodule.train_sets[job.split]
        return round(sum(self._count(job, name) for name in sets) * job.data.fraction)

    def _count(self, job: Job, split_set: str) -> int:
        sizes = self.needs.facts(job).sizes
        if split_set not in sizes:
            raise no_images(self.needs.facts(job).datamodule.task, split_set)
        return sizes[split_set]

    def _shape(self, job: Job) -> list[Any]:
        """Return what decides the cost of a step."""
        parts: list[Any] = [dict(job.backbone), dict(job.method)]
        parts += [
            job.recipe.batch_size,
            job.recipe.optimizer,
            job.precision,
            job.trainer.accelerator,
            _devices(job),
        ]
        return [*parts, job.trainer.accumulate_grad_batches, self.needs.facts(job).datamodule.augments]

    def _numbers(self, job: Job) -> list[Any]:
        """Return what decides the numbers of one of a grid's runs."""
        return [job.recipe.model_dump(), dict(job.method)]

    def _pace(self, job: Job) -> Pace:
        facts, key = self.needs.facts(job), json.dumps(self._shape(job))  # the head takes next to no time
        if key not in self.paces:
            datamodule = facts.datamodule
            found = measure_pace(job, facts.backbone, facts.classes, _devices(job), datamodule.augments)
            self.paces[key] = found
        return self.paces[key]

    def _state(self, job: Job) -> int:
        facts = self.needs.facts(job)
        key = json.dumps([*self._shape(job)[:2], facts.classes])
        if key not in self.states:
            self.states[key] = state_bytes(build_classifier(job, facts.backbone, facts.classes))
        return self.states[key]

    def _cost(self, job: Job, pace: Pace) -> float:
        """Return seconds of a run."""
        final = job.split == "final"
        unscored = final and job.data.get("test") == "none"
        scored = (
            0 if unscored else self._count(job, "test" if final else self.needs.facts(job).datamodule.val_set)
        )
        seconds = self._steps(job) * pace.step
        once = json.dumps([job.task, job.split, *self._shape(job)])
        if once not in self.frozen:
            self.frozen.add(once)
            seconds += (self._rows(job) + (0 if final else scored)) * pace.frozen
        if final:
            return seconds + scored * pace.image / _devices(job)
        times = job.recipe.epochs // job.trainer.check_val_every_n_epoch
        return seconds + times * scored * pace.kept / _devices(job)

    def say(self) -> float:
        """Print the table and what is needed.

        Returns:
            nan.

        Raises:
            UserError: Some lines failed.
        """
        table = Table(title="dry run: nothing is trained")
        table.add_column("task", no_wrap=True)
        for name in _COLUMNS:
            table.add_column(name, overflow="fold")
        for line in self.lines:
            table.add_row(*line)
        if self.lines:
            console.print(table)
            for sentence in (*self.needs.described(), self._time(), self._disk(), *self.needs.sentences()):
                console.print(sentence, soft_wrap=True)
        if self.failed:
            raise UserError(
                f"{'; '.join(self.failed)} ({len(self.failed)} of {len(self.lines) + len(self.failed)} "
                "would fail)"
            )
        return math.nan

    def _time(self) -> str:
        paces = self.paces.values()
        why = [f"no time for some: {pace.why}" for pace in paces if pace.why][:1]
        if not any(pace.device for pace in paces):
            return "; ".join(why) or "nothing is left to run"
        scaled = (
            ""
            if all(pace.whole for pace in paces)
            else f", those over {PATIENCE:.0f} s scaled up from a few images"
        )
        device = next(pace.device for pace in paces if pace.device)
        known = (
            f"time left: about {in_time(self.seconds)}, one run after the other, by steps on random images "
            "measured "
            f"now on {device}{scaled}; reading data, starting up and talk between devices come on top"
        )
        limits = [f"{', '.join(sorted(self.limits))} would make it less"] if self.limits else []
        return "; ".join([known, *limits, *why])

    def _disk(self) -> str:
        parts = self.needs.disk() | ({"results": self.results + self.resume} if self.results else {})
        listed = ", ".join(f"{in_bytes(size)} of {name}" for name, size in parts.items())
        return (
            f"disk: about {in_bytes(sum(parts.values()))} more: {listed}" if parts else "disk: nothing more"
        )


def _in_words(points: int, runs: int, grid: Mapping[str, Any] | None) -> str:
    """Return a grid's number of points, of what they are made, and how many runs they are where some are equal."""
    sizes = [f"{len(values)} {key!s}" for key, values in (grid or {}).items() if len(values) > 1]
    made_of = f": {' x '.join(sizes)}" if len(sizes) > 1 else ""
    return f"{points}{made_of}" + (f", {runs} of them different" if runs < points else "")


def _devices(job: Job) -> int:
    return local_devices(job.trainer) * int(job.trainer.num_nodes)


def in_time(seconds: float) -> str:
    """Return a time in words."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h" if hours < 100 else f"{hours / 24:.0f} days"
