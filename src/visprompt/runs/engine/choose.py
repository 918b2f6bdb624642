"""Open the engine that `engine=` names."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visprompt.errors import UserError, unknown
from visprompt.machine import process_name
from visprompt.runs import ranks
from visprompt.runs.devices import local_devices
from visprompt.runs.engine.drive import Engine
from visprompt.runs.engine.local import LocalEngine
from visprompt.runs.engine.progress import Shown
from visprompt.runs.job import Job
from visprompt.runs.trainer import under_agent

# by name: settings that no other engine has
_ENGINES: dict[str, set[str]] = {
    "local": set(),
    "processes": {"runs_per_gpu"},
    "ray": {"address", "gpus_per_run"},
}


@contextmanager
def opened(
    settings: Mapping[str, Any], jobs: Sequence[Job], total: int, wait: bool = True
) -> Iterator[Engine]:
    """Open the engine of a command, and end all its workers at the end.

    Args:
        settings: The config group `engine`.
        jobs: Jobs of the command; those that it makes of them take the same devices.
        total: Number of runs, as far as it is known before the first.
        wait: Whether `engine=local` waits for runs that other processes are working on.

    Yields:
        The engine.

    Raises:
        UserError: A setting does not fit, or another program has started this process as one rank of a run.
    """
    name = settings["name"]
    if name not in _ENGINES:
        raise unknown("engine", name, _ENGINES)
    if not settings.keys() >= _ENGINES[name]:
        raise UserError(f"engine.name={name} lacks the settings of that engine: give engine={name}")
    if name == "local":
        yield LocalEngine(wait, total)
        return
    _check(name, jobs)
    shown = Shown(total)
    folder = _log_folder(jobs[0])
    if name == "ray":
        from visprompt.runs.engine.on_ray import connected  # imported late: few commands need it

        with connected(settings, jobs, shown, folder) as engine:
            yield engine
        return
    from visprompt.runs.engine.processes import Processes, slots_for

    slots = slots_for(jobs, settings["runs_per_gpu"], settings["max_concurrent"])
    shown.say(f"up to {len(slots)} runs at the same time; what they print is in {folder}")
    with Processes(shown, len(slots), settings["retries"], slots, folder) as processes:
        yield processes


def _check(name: str, jobs: Sequence[Job]) -> None:
    """Refuse an engine that cannot make the runs of a command.

    Raises:
        UserError: As in `opened`.
    """
    if ranks.started_elsewhere():
        raise UserError(
            f"engine={name} starts the processes of all runs itself, but {ranks.starter()} has started this "
            "command as one rank of a run: leave engine=... out, or start the command without it"
        )
    if under_agent() and len(jobs) == 1:
        raise UserError(
            f"engine={name} makes several runs at the same time, but under a W&B agent this command is one "
            "run, which logs to that of the agent: leave engine=... out, or start several agents"
        )
    for job in jobs:
        ranks.check_alone(job.trainer.get("plugins") or (), local_devices(job.trainer), job.trainer.num_nodes)


def _log_folder(job: Job) -> Path:
    """Make the folder for the output of a command's workers: logs/engine/<time>-<host>-<process>."""
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{process_name()}"
    folder = Path(job.paths.log_dir).absolute() / "engine" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error}; choose another folder with paths.log_dir=..."
        ) from error
    return folder
