"""engine=ray: make runs on a Ray cluster, or on this machine with a Ray that is started and ended here.

Ray's core is used, not Tune: a run has its own folder, resumes itself and may be started again anywhere. All
nodes need the same folders for the code and the data, and share the results: a file system, or a store that
paths.results names.
"""

import json
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visprompt.errors import UserError, in_one_line
from visprompt.files import temporary_folder
from visprompt.machine import cores
from visprompt.runs import signals
from visprompt.runs.engine.pool import Died, Pool, Worker
from visprompt.runs.engine.processes import uses_gpus
from visprompt.runs.engine.progress import Shown
from visprompt.runs.engine.supervisor import Supervisor
from visprompt.runs.job import Job, Trainer

# what a Ray that is started here is told: to listen on 127.0.0.1 alone (the name is historical, it holds for
# Linux too), to accept this command alone (else Ray writes a token into the home folder), to report nothing
_PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# of the command's environment
_PASSED_ON = ("HF_HUB_OFFLINE", "WANDB_MODE", "OMP_NUM_THREADS", "VISPROMPT_LEASE_S")
_ANSWER = 5.0  # seconds in which a cluster must answer
_LONGEST = 20  # bytes of TMPDIR: below it the paths of Ray's sockets, which may have 107, take up to 87
_GRACE = 12.0  # seconds in which workers clean up; `ranks` kills them after ten


@dataclass
class OnRay(Pool):
    """Runs units in Ray actors.

    Attributes:
        ray: The module.
        options: What an actor takes: num_gpus and num_cpus.
        env: Environment variables of the workers.
        folder: Where the output of the workers is written.
    """

    ray: Any
    options: Mapping[str, float]
    env: Mapping[str, str]
    folder: Path
    _started: int = field(default=0, init=False)

    def start(self) -> "_Actor":
        """Start an actor; it is ready when the cluster has room for it."""
        self._started += 1
        log = str(self.folder / f"worker-{self._started}.log")
        # two calls at a time: `end` is called while `run` waits
        actor_class = self.ray.remote(Supervisor).options(max_concurrency=2, **self.options)
        actor = actor_class.remote(str(Path.cwd()), [path for path in sys.path if path], dict(self.env), log)
        return _Actor(actor, actor.start.remote(), log)

    def send(self, handle: "_Actor", jobs: Sequence[str]) -> None:
        """Send a unit's jobs to an actor."""
        handle.answer = handle.actor.run.remote(list(jobs))

    def messages(self, seconds: float) -> list[tuple[Worker, dict[str, Any] | Died]]:
        """Wait for answers of the actors, see `Pool`."""
        asked = {w.handle.answer: w for w in self.workers if w.unit is not None or not w.ready}
        if not asked:  # all units wait for other commands
            time.sleep(seconds)
            return []
        answers, _ = self.ray.wait(list(asked), timeout=seconds)
        return [(asked[answer], self._message(asked[answer], answer)) for answer in answers]

    def _message(self, worker: Worker, answer: Any) -> dict[str, Any] | Died:
        try:
            message: dict[str, Any] = json.loads(self.ray.get(answer))
        except self.ray.exceptions.RayError as error:
            lost = isinstance(error, self.ray.exceptions.RayActorError)
            message = {"died": "was lost with its Ray actor" if lost else in_one_line(error)}
        if "died" not in message:
            return message
        self.ray.kill(worker.handle.actor)  # frees what it took of the cluster
        return Died(message["died"])

    def advice(self, worker: Worker) -> str:
        """Return what to do about a worker that has died."""
        return f"{worker.handle.log} has its output; if memory ran out give a smaller engine.max_concurrent"

    def end(self) -> None:
        """End the workers, which clean up, and then the actors."""
        ends = [worker.handle.actor.end.remote() for worker in self.workers if worker.ready]
        if ends:
            self.ray.wait(ends, num_returns=len(ends), timeout=_GRACE)
        for worker in self.workers:
            self.ray.kill(worker.handle.actor)


@dataclass(eq=False)
class _Actor:
    """An actor, the reference to its next answer, and the file with its worker's output."""

    actor: Any
    answer: Any
    log: str


@contextmanager
def connected(
    settings: Mapping[str, Any], jobs: Sequence[Job], shown: Shown, folder: Path
) -> Iterator[OnRay]:
    """Connect to a cluster, or start one on this machine, and end what was started at the end.

    Args:
        settings: The config group `engine`.
        jobs: The jobs of a command.
        shown: Where finished runs are shown.
        folder: Where the output of the workers is written.

    Yields:
        The engine.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it has no room for a single run.
    """
    address = settings["address"]
    with _endings(), ExitStack() as stack:
        ray = _imported(address)
        path = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
        options: dict[str, Any] = {"address": address, "runtime_env": path, "log_to_driver": False}
        if address is None:
            shown.say("starting Ray on this machine: this takes up to half a minute")
            temporary = stack.enter_context(temporary_folder("ray", _LONGEST))  # removed after Ray has ended
            options |= {"address": "local", "num_cpus": cores(), "include_dashboard": False}
            options |= {"_node_ip_address": "127.0.0.1", "_temp_dir": str(temporary)}
        else:
            _check_reachable(address)
        stack.callback(ray.shutdown)
        _connect(ray, options)
        room = ray.cluster_resources()
        takes = {
            "num_gpus": gpus_per_run(settings["gpus_per_run"], jobs, room.get("GPU", 0.0)),
            "num_cpus": settings["cpus_per_run"],
        }
        most = _at_once(settings["max_concurrent"], takes, room, grows=address is not None)
        threads = max(1, settings["cpus_per_run"] // (_devices(jobs[0].trainer) or 1))
        env = {"OMP_NUM_THREADS": str(threads)}
        env |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        if not takes["num_gpus"]:  # Ray leaves all GPUs visible to an actor that asks for none
            env["CUDA_VISIBLE_DEVICES"] = ""
        shown.say(f"up to {most} runs at the same time; what they print is in {folder}")
        stack.enter_context(shown)
        engine = OnRay(shown, most, settings["retries"], ray, takes, env, folder)
        stack.callback(engine.end)
        yield engine


@contextmanager
def _endings() -> Iterator[None]:
    """Raise `signals.Ended` in place of the `SystemExit(1)` that Ray makes of it while it waits."""
    try:
        yield
    except SystemExit:
        signals.check()
        raise


def _imported(address: str | None) -> Any:
    """Import Ray, after the environment variables that it reads when it is imported."""
    if address is None:
        token = secrets.token_hex(32)
        for name, value in _PRIVATE.items():
            os.environ.setdefault(name, value or token)
    try:
        import ray  # imported late: it is an extra
    except ImportError:
        raise UserError("engine=ray needs Ray: pip install '.[ray]', or give engine=processes") from None
    return ray


def _check_reachable(address: str) -> None:
    """Refuse an address at which nothing answers: Ray itself would try for four minutes.

    Raises:
        UserError: Nothing answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # `auto`, which Ray looks up on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(f"at {address}", error) from error


def _no_cluster(where: str, error: Exception) -> UserError:
    return UserError(
        f"engine=ray finds no Ray {where} ({in_one_line(error)}): start one with `ray start --head`, or "
        "leave engine.address out"
    )


def _connect(ray: Any, options: Mapping[str, Any]) -> None:
    """Connect to a cluster, and keep this project's signal handlers.

    Raises:
        UserError: No cluster answers.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(configure_logging=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        signals.check()
        where = "on this machine" if options["address"] in ("local", "auto") else f"at {options['address']}"
        raise _no_cluster(where, error) from error
    finally:
        for number, handler in handlers.items():
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)


def gpus_per_run(given: float | None, jobs: Sequence[Job], available: float) -> float:
    """Return the number of GPUs that a run takes of the cluster.

    Args:
        given: engine.gpus_per_run; None takes trainer.devices, and 0 if the cluster has no GPU.
        jobs: The jobs of a command.
        available: Number of GPUs of the cluster.

    Raises:
        UserError: The number does not agree with the trainer.
    """
    trainer = jobs[0].trainer
    if not uses_gpus(trainer):
        if given:
            raise UserError(
                f"engine.gpus_per_run={given} is for GPUs, and trainer.accelerator={trainer.accelerator} "
                "takes none: leave it out, or give trainer=gpu"
            )
        return 0
    devices = _devices(trainer)
    if given is None:
        given = (devices or 1) if available else 0
    if trainer.accelerator == "gpu" and not given:
        raise UserError(
            "trainer.accelerator=gpu asks for a GPU, and the Ray cluster gives none to a run: give "
            "trainer.accelerator=auto, or engine.gpus_per_run=1 on a cluster that has GPUs"
        )
    if given and devices not in (None, math.ceil(given)):
        raise UserError(
            f"engine.gpus_per_run={given} and trainer.devices={devices} do not agree: give "
            f"trainer.devices={math.ceil(given)}"
        )
    return given


def _devices(trainer: Trainer) -> int | None:
    """Return the number of devices that a trainer asks for, or None for all that it sees."""
    if isinstance(trainer.devices, list):
        raise UserError(
            f"trainer.devices={trainer.devices} names GPUs, which engine=ray gives out itself: give "
            f"trainer.devices={len(trainer.devices)}"
        )
    return None if str(trainer.devices) in ("auto", "-1") else int(trainer.devices)


def _at_once(given: int | None, takes: Mapping[str, float], room: Mapping[str, float], *, grows: bool) -> int:
    """Return how many runs are made at the same time: as many as fit, or as given on a cluster that grows.

    Raises:
        UserError: There is no room for one.
    """
    if given and grows:
        return given
    fitting = _fitting(takes, room)
    return min(given or fitting, fitting)


def _fitting(takes: Mapping[str, float], room: Mapping[str, float]) -> int:
    """Return how many runs the cluster has room for.

    Raises:
        UserError: It has no room for one.
    """
    has = {"num_gpus": room.get("GPU", 0.0), "num_cpus": room.get("CPU", 0.0)}
    most = min(_times(has[name], count) for name, count in takes.items() if count)
    if most < 1:
        raise UserError(
            f"a run takes {takes['num_cpus']} CPUs and {takes['num_gpus']} GPUs, and the Ray cluster has "
            f"{has['num_cpus']:.0f} and {has['num_gpus']:.0f}: lower engine.cpus_per_run or "
            "engine.gpus_per_run"
        )
    return most


def _times(has: float, count: float) -> int:
    """Return how often a run's share fits; Ray divides single GPUs, so that a share lies on one."""
    rounding = 1e-6
    return int(has) * int(1 / count + rounding) if count < 1 else int(has / count + rounding)
