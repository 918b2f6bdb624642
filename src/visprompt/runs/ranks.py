"""Start the ranks of a run on several devices of one machine, and end them with their parent process.

Lightning's script launcher starts rank 1 only at the first fit, and kills rank 0 when another rank fails.
Here a parent process starts all ranks of a run, so that the parent alone decides which runs are made, and
the failure of one run does not stop the others.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from visprompt.errors import UserError
from visprompt.files import temporary_folder
from visprompt.machine import cores
from visprompt.runs import signals
from visprompt.runs.signals import PARENT

_REASON = "VISPROMPT_REASON"
# variables that SLURM sets for the only task of a job; in a rank that this process starts, Lightning would
# conclude from them that SLURM had started it
_SLURM_TASK = frozenset({"SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"})
OF_A_LAUNCHER = _SLURM_TASK | {"LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"}
"""Variables by which `started_elsewhere` takes a process for a rank that srun or torchrun has started."""
_POLL = 0.2  # seconds between two checks of the ranks
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


class RanksFailed(Exception):
    """A run's process group ended with an error; the message is the reason that rank 0 gave."""


def started_elsewhere() -> bool:
    """Return whether srun, torchrun or the like started this process as one rank of a run.

    The answer is the one that Lightning's trainer would give, except for a SLURM job with a single task (a
    notebook, a batch script): such a process starts its ranks itself with `run_ranks`.
    """
    # imported late: it takes seconds
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    tasks = os.environ.get("SLURM_NTASKS", "1")
    return (
        "LOCAL_RANK" in os.environ
        or TorchElasticEnvironment.detect()
        or (tasks.isdecimal() and int(tasks) > 1 and SLURMEnvironment.detect())
    )


def starter() -> str:
    """Return the name of the program that started this process, for a message."""
    return "SLURM" if "SLURM_NTASKS" in os.environ else "the launcher"


def remedy(devices: int, nodes: int) -> str:
    """Return the command that starts one process per device, for a message."""
    if "SLURM_NTASKS" in os.environ:
        return f"srun --nodes={nodes} --ntasks-per-node={devices}"
    return f"torchrun --nnodes={nodes} --nproc-per-node={devices}"


def check_alone(plugins: Iterable[Mapping[str, Any]], devices: int, nodes: int) -> None:
    """Refuse a trainer whose ranks another program (srun, torchrun) has to start.

    Args:
        plugins: Configs of the trainer's plugins.
        devices: Number of devices of each machine.
        nodes: Number of machines.

    Raises:
        UserError: The trainer asks for several machines, or for SLURM.
    """
    slurm = any(str(plugin.get("_target_")).endswith("SLURMEnvironment") for plugin in plugins)
    if nodes > 1 or (slurm and devices > 1) or (slurm and "SLURM_NTASKS" not in os.environ):
        what = "trainer=slurm" if slurm else f"trainer.num_nodes={nodes}"
        program = f"srun --nodes={nodes} --ntasks-per-node={devices}"
        program += "" if slurm else f" or torchrun --nnodes={nodes} --nproc-per-node={devices}"
        raise UserError(
            f"{what} needs another program to start its {devices * nodes} process(es): begin the command "
            f"with {program}, or give trainer=ddp, which starts the processes of one machine itself"
        )


def run_ranks(command: Sequence[str], world: int) -> None:
    """Run a command once for each rank and wait for all of them.

    Args:
        command: Program and arguments.
        world: Number of ranks.

    Raises:
        RanksFailed: A rank failed; all others have been ended.
    """
    with temporary_folder("ranks") as folder:
        reason = folder / "reason"
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            inherited = {name: value for name, value in os.environ.items() if name not in _SLURM_TASK}
            base = {**inherited, **_group_env(world), _REASON: str(reason)}
            for rank in range(world):
                ranks.append(subprocess.Popen(command, env=base | {"LOCAL_RANK": str(rank)}, process_group=0))
            code = _wait(ranks)
        except BaseException:  # Ctrl-C included: no rank outlives this process
            end(ranks)
            raise
        if code:
            raise RanksFailed(reason.read_text() if reason.exists() else f"a rank ended with status {code}")


def _group_env(world: int) -> Mapping[str, str]:
    """Return the environment variables that all ranks of a process group share."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // world)))
    return {
        "WORLD_SIZE": str(world),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for the ranks and return their exit status; once a rank has failed, end the others.

    Returns:
        0, or the exit status of the first rank that failed.
    """
    while True:
        signals.check()
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            time.sleep(1.0)  # others may be failing for the same reason: let them report it
            end(ranks)
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL)


def end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send processes SIGTERM, and after a grace period SIGKILL to them and all their child processes."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
        with suppress(ProcessLookupError):  # no process of the group is left
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def end_with_parent() -> None:
    """In a rank, end the process when its parent is gone; in any other process, do nothing."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch(pid: int) -> None:
        while os.getppid() == pid:
            time.sleep(_POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, args=(int(parent),), daemon=True).start()


def give_reason(error: BaseException) -> None:
    """In rank 0, write the reason of a failure to the file from which the parent reads it."""
    path = os.environ.get(_REASON)
    if isinstance(error, signals.Ended):
        return  # ended because another rank has failed
    if path is not None and os.environ.get("LOCAL_RANK") == "0":
        Path(path).write_text(str(error) or type(error).__name__)


def rank_command(job_file: Path) -> list[str]:
    """Return the command of a rank that runs the job in a file."""
    # -P: do not put the current folder before PYTHONPATH, so that a rank imports the same code as its parent
    return [sys.executable, "-P", "-m", "visprompt.runs.rank", str(job_file.resolve())]
