"""Say which runs a command would make, how long they would take here, and what they need: `dry_run=true`.

Nothing is trained, downloaded or written, except Hydra's record of the command. Finished runs are recognised
as they would be without `dry_run=true`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from visprompt.data.catalog.task import in_bytes
from visprompt.data.sampler import GlobalBatches
from visprompt.errors import UserError
from visprompt.runs import compose
from visprompt.runs.devices import all_devices
from visprompt.runs.job import Job
from visprompt.runs.result import Result, read_result
from visprompt.runs.run import build_classifier, prepare
from visprompt.runs.run_all import check_sweeper
from visprompt.text import Terminal
from visprompt.tuning import protocol, pruning, pruning_chain
from visprompt.tuning.dry_run.needs import Needs, offline
from visprompt.tuning.dry_run.pace import PATIENCE, Pace, in_time, measure_pace, state_bytes

console = Terminal()
_OTHER_FILES = 20_000  # bytes of config, curve and result of a run
_COLUMNS = ("method", "grid", "seeds", "runs", "steps", "time left")


@dataclass(frozen=True)
class Planned:
    """A run that a command would make.

    Attributes:
        shape: A job that takes the same time and memory.
        exact: The run's job, or None if it depends on runs that have not been made yet (the chosen point of
            a grid, the masks of pruning).
    """

    shape: Job
    exact: Job | None


def train(cfg: DictConfig) -> float:
    """Say what `train.py` would do with a command line.

    Args:
        cfg: The config that `@hydra.main` composed.

    Returns:
        nan, because nothing is scored.

    Raises:
        UserError: Runs could not start, for another reason than missing files.
    """
    check_sweeper(cfg)
    plan = DryRun()
    with offline():
        for job in compose.jobs(cfg):
            with plan.line(job):
                plan.add(job, "-", [job.seed], plan.planned(job))
    return plan.say()


def tune(cfg: DictConfig) -> float:
    """Say what `tune.py` would do with a command line.

    Args:
        cfg: The config that `@hydra.main` composed.

    Returns:
        nan, because nothing is scored.

    Raises:
        UserError: As in `train`.
    """
    jobs, seeds = protocol.asked(cfg)
    plan = DryRun()
    with offline():
        for job in jobs:
            with plan.line(job):
                plan.add_protocol(job, seeds, cfg.points)
    return plan.say()


class DryRun:
    """The table of a dry run, with sums over its lines. A line is a method on a task.

    Attributes:
        lines: The table's lines.
        failed: Why the runs of a line could not start.
        needs: Missing data and weights.
        paces: Measured times, by the settings that decide them (as JSON).
        states: Bytes of tuned states, by the settings that decide them (as JSON).
        frozen: Settings (as JSON) for which the time of the frozen layers has been counted; their output is
            cached and shared by runs.
        seconds: Time of all runs that are left, as far as it could be measured.
        results: Bytes of the files of these runs.
        resume: Bytes of the largest resume state.
        limits: Keys that shorten epochs, which the times ignore.
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
        """Collect the error of a line of the table, so that the other lines are still computed."""
        try:
            yield
        except UserError as error:
            self.failed.append(f"{job.name}: {error}")

    def add_protocol(self, job: Job, seeds: Sequence[int], numbers: Sequence[int] | None = None) -> None:
        """Add a line for the protocol of one method on one task, or for some points of its grid alone."""
        steps, outcomes = protocol.looked_up(job, seeds, self.stored)
        grid = protocol.chosen_points(steps[0], numbers)
        points = {json.dumps(self.numbers(each)): each for each in grid}.values()  # equal points are one run
        runs = [Planned(each, each) for each in points]
        if numbers is not None:
            seeds = [protocol.GRID_SEED]
        elif len(steps) > 1:  # all runs of the grid are finished, so that the choice is known
            runs += [run for final in steps[1] for run in self.planned(final)]
        elif any(outcome.result is None for outcome in outcomes):  # not all have diverged
            finals = [job.vary({"split": "final", "seed": seed}) for seed in seeds]
            runs += [replace(run, exact=None) for final in finals for run in self.planned(final)]
        self.add(job, _in_words(len(grid), len(points), job.grid), seeds, runs)

    def planned(self, job: Job) -> list[Planned]:
        """Return the runs that a job means: itself, or its chain of pruning."""
        if not pruning_chain.prunes(job):
            return [Planned(job, job)]
        pruning_chain.check(job)
        points = pruning_chain.prune_points(job)
        links = self._links(job, points) if self._has_folder(job) else [None] * (len(points) + 1)
        tune, final = (
            job.vary(pruning_chain.unpruned(job) | {"split": split}) for split in ("tune", "final")
        )
        shapes = [tune] * len(points) + [final] * (job.split == "final")
        return [Planned(shape, link) for shape, link in zip(shapes, links, strict=False)]

    def _links(self, job: Job, points: Sequence[pruning.Point]) -> list[Job | None]:
        """Return the jobs of a chain of pruning; None for a job that depends on runs not made yet.

        The unpruned run is first, then the other points, then the final run.
        """
        tune = job.vary({"split": "tune", "rerun": job.rerun and job.split == "tune"})
        folder = prepare(tune).folder
        initial, importance, choice = (
            pruning_chain.stored(folder / f"{name}.json") for name in ("initial", "importance", "masks")
        )
        base = tune.vary({"method.prune_tokens": None, "method.prune_segments": None})
        links: list[Job | None] = [None] * len(points)
        if initial:
            links[0] = pruning_chain.link_of(base, initial["initial"])
        if initial and importance:
            scores = pruning.Importance.of(importance)
            masks = [pruning.prune(scores, point).options() for point in points[:-1]]
            links[1:] = [pruning_chain.link_of(base, initial["initial"], options) for options in masks]
        return [*links, pruning_chain.link_of(job, choice["initial"], choice["options"]) if choice else None]

    def _has_folder(self, job: Job) -> bool:
        """Return whether a job's data and weights are there, and any run of its task and method."""
        facts = self.needs.facts(job)
        return facts.ready and (Path(job.paths.log_dir) / facts.datamodule.task / job.method.name).is_dir()

    def stored(self, job: Job) -> Result | None:
        """Return the result of a job, or None if it is not finished or is to be run again."""
        if job.rerun or not self._has_folder(job):
            return None
        return read_result(prepare(job).folder, hashed=False)

    def add(self, job: Job, grid: str, seeds: Sequence[int], runs: Sequence[Planned]) -> None:
        """Add a line to the table, and the time and disk space of its runs to the sums."""
        steps = sorted({self._steps(run.shape)[0] for run in runs})
        left = [run.shape for run in runs if run.exact is None or self.stored(run.exact) is None]
        paces = [self._pace(each) for each in left]
        seconds = sum(self._cost(each, pace) for each, pace in zip(left, paces, strict=True))
        self.seconds += seconds
        self.limits |= {f"trainer.{key}" for key, _ in job.trainer if key.startswith("limit_")}
        for each in left:
            size = self._state(each)
            self.results += size + _OTHER_FILES
            copies = 3 if "adamw" in each.recipe.optimizer else 2  # the parameters and the optimiser's state
            self.resume = max(self.resume, copies * size)
        if pruning_chain.prunes(job):
            grid += f", {len(pruning_chain.prune_points(job))} of pruning"
        done = f"{len(runs)}, {len(runs) - len(left)} done"
        steps_of_run = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1])))
        time = "unknown" if any(pace.why for pace in paces) else in_time(seconds)
        task = self.needs.facts(job).datamodule.task
        listed_seeds = ", ".join(map(str, seeds))
        self.lines.append((task, str(job.method.name), grid, listed_seeds, done, steps_of_run, time))

    def _steps(self, job: Job) -> tuple[int, int]:
        """Return the number of optimiser steps of a run, and of the epochs that they begin."""
        rows, size, micro = self._rows(job), job.recipe.batch_size, int(job.trainer.accumulate_grad_batches)
        batches = GlobalBatches(
            num_rows=rows, batch_size=size, world=all_devices(job), accumulate=micro, training=True
        )
        of_epoch = len(batches) // micro
        steps = job.recipe.steps(of_epoch)
        return steps, math.ceil(steps / max(1, of_epoch))

    def _rows(self, job: Job) -> int:
        """Return the number of training images; nearly, because data.fraction rounds for each class."""
        sets = self.needs.facts(job).datamodule.train_sets[job.split]
        return round(sum(self._count(job, name) for name in sets) * job.data.fraction)

    def _count(self, job: Job, split_set: str) -> int:
        sizes = self.needs.facts(job).sizes
        if split_set not in sizes:
            raise self.needs.facts(job).datamodule.no_images(split_set)
        return sizes[split_set]

    def _shape(self, job: Job) -> list[Any]:
        """Return the settings that decide the time of a step."""
        head = [job.recipe.head, self.needs.facts(job).datamodule.kind]
        parts: list[Any] = [dict(job.backbone), dict(job.method), head]
        parts += [job.recipe.batch_size, job.recipe.optimizer, job.recipe.fused, job.trainer.accelerator]
        parts += [job.precision, job.matmul_precision]
        return [*parts, all_devices(job), job.trainer.accumulate_grad_batches, self._varies(job)]

    def _varies(self, job: Job) -> bool:
        """Return whether training images differ between epochs."""
        return self.needs.facts(job).datamodule.augments or job.recipe.mixes

    def numbers(self, job: Job) -> list[Any]:
        """Return the settings in which the runs of a grid can differ."""
        return [job.recipe.model_dump(), dict(job.method)]

    def _pace(self, job: Job) -> Pace:
        # the number of classes is not in the key, because the head takes almost no time
        facts, key = self.needs.facts(job), json.dumps(self._shape(job))
        if key not in self.paces:
            kind, args = facts.datamodule.kind, (all_devices(job), self._varies(job))
            self.paces[key] = measure_pace(job, facts.backbone, facts.classes, *args, kind)
        return self.paces[key]

    def _state(self, job: Job) -> int:
        facts = self.needs.facts(job)
        key = json.dumps([*self._shape(job)[:3], facts.classes])
        if key not in self.states:
            args = facts.backbone, facts.classes, facts.datamodule.kind
            self.states[key] = state_bytes(build_classifier(job, *args))
        return self.states[key]

    def seconds_alone(self, job: Job) -> float | None:
        """Return the seconds that a run takes in a separate process; None if they cannot be measured."""
        self.frozen.clear()
        pace = self._pace(job)
        return None if pace.why else self._cost(job, pace)

    def _cost(self, job: Job, pace: Pace) -> float:
        """Return the seconds that a run takes."""
        final, facts = job.split == "final", self.needs.facts(job)
        val_set = facts.datamodule.val_set  # scored after each epoch, unless the run trains on it
        tested = self._count(job, "test") if final and job.data.get("test") != "none" else 0
        outside = val_set not in facts.datamodule.train_sets[job.split]
        watched = outside * (facts.sizes.get(val_set, 0) if final else self._count(job, val_set))
        steps, epochs = self._steps(job)
        seconds = steps * pace.step
        key = json.dumps([job.task, job.split, *self._shape(job)])
        if key not in self.frozen:
            self.frozen.add(key)
            seconds += (self._rows(job) + watched) * pace.frozen
        times = epochs // job.trainer.check_val_every_n_epoch
        scored = facts.windows * (tested * pace.image + times * watched * pace.kept)
        return seconds + scored / all_devices(job)

    def say(self) -> float:
        """Print the table, the time and what is missing.

        Returns:
            nan, the score of a dry run.

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
        scaled = f", those over {PATIENCE:.0f} s scaled up from a few images"
        scaled = "" if all(pace.whole for pace in paces) else scaled
        device = next(pace.device for pace in paces if pace.device)
        estimate = (
            f"time left: about {in_time(self.seconds)}, one run after the other, by steps on random images "
            f"measured now on {device}{scaled}; reading data, start-up and communication between devices are "
            "not included"
        )
        limits = [f"{', '.join(sorted(self.limits))} would make it less"] if self.limits else []
        faster = [pace.faster for pace in paces if pace.faster][:1]
        return "; ".join([estimate, *limits, *why, *faster])

    def _disk(self) -> str:
        parts = self.needs.disk() | ({"results": self.results + self.resume} if self.results else {})
        listed = ", ".join(f"{in_bytes(size)} of {name}" for name, size in parts.items())
        return (
            f"disk: about {in_bytes(sum(parts.values()))} more: {listed}" if parts else "disk: nothing more"
        )


def _in_words(points: int, runs: int, grid: Mapping[str, Any] | None) -> str:
    """Describe a grid: "12: 4 recipe.lr x 3 recipe.weight_decay, 10 of them different".

    Args:
        points: Number of points.
        runs: Number of runs; smaller if several points mean the same run.
        grid: Lists of values by dotted key.
    """
    sizes = [f"{len(values)} {key!s}" for key, values in (grid or {}).items() if len(values) > 1]
    factors = f": {' x '.join(sizes)}" if len(sizes) > 1 else ""
    return f"{points}{factors}" + (f", {runs} of them different" if runs < points else "")
