"""Print the commands that would make the runs of a command line, for other schedulers: `plan=json`.

Each line is a JSON object:

    {"id": "dtd/lora/point-3", "what": "grid", "after": [], "seconds": 41.2, "folder": ".../dtd/lora/0f3a...",
     "command": ["/.../python", "/.../src/tune.py", ...], "shell": "/.../python /.../src/tune.py ..."}

`what` is "grid" (a point of a grid), "seed" (a final run), "chain" (a final run with its chain of pruning),
"run" (a task of `train.py`) or "table" (the table of `tune.py`). `after` has the ids of lines that must have
ended first: a choice is made from the whole grid. `seconds` is an estimate as in `dry_run=true`, null if
the run's time could not be measured; `folder` is null if it depends on runs that are not finished. Finished
runs are left out.
"""

import json
import logging
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from visprompt.errors import UserError
from visprompt.runs import compose, paths
from visprompt.runs.job import Job
from visprompt.runs.run import prepare
from visprompt.runs.unit import Outcome
from visprompt.tuning import protocol, pruning_chain
from visprompt.tuning.dry_run import DryRun
from visprompt.tuning.dry_run.needs import offline

_DROPPED = ("plan", "dry_run", "engine")  # keys that the printed commands do not get


@dataclass(frozen=True)
class Line:
    """A command to print; the attributes are the keys of the JSON object, see the module."""

    id: str
    what: str
    after: list[str]
    seconds: float | None
    folder: str | None
    command: list[str]


def train(cfg: DictConfig) -> float:
    """Print a command for each task of a `train.py` command line that is not finished.

    Args:
        cfg: The config that `@hydra.main` composed.

    Returns:
        nan, because nothing is scored.

    Raises:
        UserError: Runs could not start, for another reason than missing files.
    """
    return _print(cfg, lambda planner: _runs(planner, compose.jobs(cfg)))


def tune(cfg: DictConfig) -> float:
    """Print the commands of the runs of the protocol that are not finished, and of the table.

    Args:
        cfg: The config that `@hydra.main` composed.

    Returns:
        nan, because nothing is scored.

    Raises:
        UserError: As in `train`.
    """
    if cfg.points is not None:
        raise UserError("points=... and plan=json ask for different things: leave one of them out")
    jobs, seeds = protocol.asked(cfg)
    return _print(cfg, lambda planner: _protocol(planner, jobs, seeds))


def _print(cfg: DictConfig, lines_of: Any) -> float:
    if compose.in_multirun():
        raise UserError("plan=json lists the runs of one command, and -m makes several: leave -m out")
    paths.expand_paths(cfg)
    with _stdout_for_lines_alone(), offline():
        planner = _Planner(cfg)
        lines = list(lines_of(planner))
    if planner.dry.failed:
        raise UserError("; ".join(planner.dry.failed))
    for sentence in planner.dry.needs.sentences():
        print(sentence, file=sys.stderr)
    for line in lines:
        print(json.dumps(asdict(line) | {"shell": shlex.join(line.command)}, ensure_ascii=False))
    return math.nan


def _runs(planner: "_Planner", jobs: Iterable[Job]) -> Iterator[Line]:
    """Yield the lines of `train.py`."""
    for job in jobs:
        with planner.dry.line(job):
            if planner.is_left(job):
                what = "chain" if pruning_chain.prunes(job) else "run"
                yield planner.line(f"{job.name}/seed-{job.seed}", what, [], job, job, {})


def _protocol(planner: "_Planner", jobs: Iterable[Job], seeds: Sequence[int]) -> Iterator[Line]:
    """Yield the lines of `tune.py`; that of the table is the last one."""
    cfg, finals = planner.cfg, []
    found: list[tuple[Job, list[Outcome]]] = []
    for job in jobs:
        with planner.dry.line(job):
            of_method = {} if cfg.methods is None else {"methods": f"[{job.method.name}]"}
            steps, outcomes = protocol.looked_up(job, seeds, planner.dry.stored)
            found.append((job, outcomes))
            points = {
                json.dumps(planner.dry.numbers(each)): n for n, each in reversed([*enumerate(steps[0])])
            }
            left = [number for number in sorted(points.values()) if planner.is_left(steps[0][number])]
            ids = [f"{job.name}/point-{number}" for number in left]
            for name, number in zip(ids, left, strict=True):
                point = steps[0][number]
                yield planner.line(name, "grid", [], job, point, of_method | {"points": f"[{number}]"})
            if len(steps) == 1 and not left and all(outcome.result for outcome in outcomes):
                continue  # all points have diverged
            what = "chain" if pruning_chain.prunes(job) else "seed"
            for place, seed in enumerate(seeds):
                final = steps[1][place] if len(steps) > 1 else None
                if final is None or planner.is_left(final):
                    finals.append(f"{job.name}/seed-{seed}")
                    words = of_method | {"seeds": f"[{seed}]", "table": "null"}
                    shape = final or job.vary({"split": "final", "seed": seed})
                    yield planner.line(finals[-1], what, ids, job, shape, words, known=final is not None)
    _, table, _ = protocol.tabulated([job for job, _ in found], seeds, [outcomes for _, outcomes in found])
    if cfg.table is not None and (finals or (table and not _holds(Path(cfg.table), table))):
        yield Line(str(cfg.table), "table", finals, 0.0, None, planner.command({}))


def _holds(file: Path, text: str) -> bool:
    """Return whether a file holds a text: another command may have written its table there."""
    return file.is_file() and file.read_text(encoding="utf-8") == text


class _Planner:
    """Makes lines, with the estimates of a dry run.

    Attributes:
        cfg: The config of the command line.
        dry: The dry run.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.dry = cfg, DryRun()

    def is_left(self, job: Job) -> bool:
        """Return whether a job is not finished; for a chain of pruning: any of its runs."""
        planned = self.dry.planned(job)
        return any(run.exact is None or self.dry.stored(run.exact) is None for run in planned)

    def line(
        self,
        name: str,
        what: str,
        after: list[str],
        job: Job,
        run: Job,
        words: Mapping[str, str],
        known: bool = True,
    ) -> Line:
        """Return the line of a run.

        Args:
            name: The line's id.
            what: The kind of the run.
            after: Ids of lines that must have ended first.
            job: The job of the task and method.
            run: The job of the run, or one that takes the same time.
            words: Settings that restrict the command to this run, by key.
            known: Whether `run` is the run's exact job.
        """
        times = [self.dry.seconds_alone(each.shape) for each in self.dry.planned(run)]
        known_times = [time for time in times if time is not None]
        seconds = round(sum(known_times), 1) if len(known_times) == len(times) else None
        ready = known and self.dry.needs.facts(run).ready and not pruning_chain.prunes(run)
        folder = str(Path(prepare(run).folder).absolute()) if ready else None
        of_task = {} if self.cfg.tasks is None else {"tasks": job.task}
        return Line(name, what, after, seconds, folder, self.command({**of_task, **words}))

    def command(self, words: Mapping[str, str]) -> list[str]:
        """Return the command line that was given, with other words for some keys and absolute paths."""
        hydra = HydraConfig.get()
        given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        kept = {compose.key_of(word): word for word in given if self._is_kept(word, words)}
        for key, value in paths.given(self.cfg):
            if not isinstance(value, str) or not value or key in words:
                continue
            # an interpolation follows from `paths.*`, and other tasks may lack it
            if key in kept or not (Path(value).is_absolute() or OmegaConf.is_interpolation(self.cfg, key)):
                prefix = kept.get(key, "").partition(key)[0]
                text = QuotedString(str(Path(value).absolute()), Quote.single).with_quotes()
                kept[key] = f"{prefix}{key}={text}"
        flags = [
            f"--config-dir={Path(source.path).absolute()}"
            for source in hydra.runtime.config_sources
            if source.provider == "command-line"
        ]
        name = str(hydra.job.config_name)
        script = "tune" if "methods" in self.cfg else "train"
        flags += [] if name == script else [f"--config-name={name}"]
        program = [sys.executable, str(paths.ROOT / "src" / f"{script}.py")]
        return [*program, *flags, *kept.values(), *(f"{key}={value}" for key, value in words.items())]

    def _is_kept(self, word: str, words: Mapping[str, str]) -> bool:
        key = compose.key_of(word)
        # `data='...'` with quotes is of `compose.data_of_tasks`, not of the user
        return not (
            key.partition(".")[0] in _DROPPED
            or key in words
            or (self.cfg.tasks is not None and word.startswith("data='"))
        )


@contextmanager
def _stdout_for_lines_alone() -> Iterator[None]:
    """Print everything else to the standard error stream, also what Hydra's log handlers write."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    with redirect_stdout(sys.stderr):
        yield
