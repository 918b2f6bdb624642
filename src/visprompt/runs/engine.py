"""Processes of one machine: a run on several devices as a process group, and ranks that end with their parent.

Lightning's own launcher starts rank 1 only at the first fit, and its observer kills rank 0 when a child
fails; here the parent starts every rank of one run, so that it alone decides which runs there are and a
failure takes no other along.
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
from visprompt.runs import signals
from visprompt.runs.signals import PARENT

_REASON = "VISPROMPT_REASON"
# what SLURM tells the one task of a job, from which the trainer of a rank would take SLURM for what started
# it
_TASK = frozenset({"SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"})
_POLL = 0.2  # seconds between two looks at the ranks
_GRACE = 10.0  # seconds that ranks get to end by themselves


class RanksFailed(Exception):
    """A run's process group ended with an error; the message is the reason its rank gave."""


def started_elsewhere() -> bool:
    """Return whether srun, torchrun or the like started this process, one rank of a run, by the trainer's own judgement.

    A job of one task, as SLURM gives it to a notebook or a batch script, starts its ranks itself:
    `run_ranks`.
    """
    from lightning.fabric.plugins.environments import (
        SLURMEnvironment,
        TorchElasticEnvironment,
    )  # late: takes seconds

    tasks = os.environ.get("SLURM_NTASKS", "1")
    return (
        "LOCAL_RANK" in os.environ
        or TorchElasticEnvironment.detect()
        or (tasks.isdecimal() and int(tasks) > 1 and SLURMEnvironment.detect())
    )


def starter() -> str:
    """Return what started this process, for a message."""
    return "SLURM" if "SLURM_NTASKS" in os.environ else "the launcher"


def remedy(devices: int, nodes: int) -> str:
    """Return how to have as many processes started from outside, for a message."""
    if "SLURM_NTASKS" in os.environ:
        return f"srun --nodes={nodes} --ntasks-per-node={devices}"
    return f"torchrun --nnodes={nodes} --nproc-per-node={devices}"


def check_alone(plugins: Iterable[Mapping[str, Any]], devices: int, nodes: int) -> None:
    """Refuse a trainer whose processes this one cannot start by itself.

    Args:
        plugins: Configs of the trainer's plugins.
        devices: Of each machine.
        nodes: Machines.

    Raises:
        UserError: It names several machines, or an environment in which SLURM starts the processes.
    """
    slurm = any(str(plugin.get("_target_")).endswith("SLURMEnvironment") for plugin in plugins)
    if nodes > 1 or (slurm and devices > 1) or (slurm and "SLURM_NTASKS" not in os.environ):
        what = "trainer=slurm" if slurm else f"trainer.num_nodes={nodes}"
        program = f"srun --nodes={nodes} --ntasks-per-node={devices}"
        program += "" if slurm else f" or torchrun --nnodes={nodes} --nproc-per-node={devices}"
        raise UserError(
            f"{what} leaves it to another program to start {devices * nodes} process(es), and none did: "
            "begin the "
            f"command with {program}, or take trainer=ddp, which starts those of one machine itself"
        )


def run_ranks(command: Sequence[str], world: int) -> None:
    """Run a command once for each rank and waits for all of them.

    Args:
        command: Program and arguments.
        world: Number of ranks.

    Raises:
        RanksFailed: A rank failed; all others are ended then.
    """
    with temporary_folder("ranks") as folder:
        reason = folder / "reason"
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            outer = {name: value for name, value in os.environ.items() if name not in _TASK}
            base = {**outer, **_group_env(world), _REASON: str(reason)}
            for rank in range(world):
                ranks.append(subprocess.Popen(command, env=base | {"LOCAL_RANK": str(rank)}, process_group=0))
            code = _wait(ranks)
        except BaseException:  # Ctrl-C too: no rank outlives this process
            _end(ranks)
            raise
        if code:
            raise RanksFailed(reason.read_text() if reason.exists() else f"a rank ended with status {code}")


def _group_env(world: int) -> Mapping[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
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
    """Wait until all have ended well or one has failed.

    Ends the others then and returns the failed one's status.
    """
    while True:
        signals.check()
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            # ranks that fail together should all say why before they are ended
            time.sleep(1.0)
            _end(ranks)
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the ranks to end, then ends them with everything they started."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
        with suppress(ProcessLookupError):  # nothing of its group is left
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def end_with_parent() -> None:
    """End this process when the parent that started it as a rank is gone.

    Does nothing in any other process.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch(pid: int) -> None:
        while os.getppid() == pid:
            time.sleep(_POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, args=(int(parent),), daemon=True).start()


def give_reason(error: BaseException) -> None:
    """Tell the parent, where there is one, in one sentence why this rank failed."""
    path = os.environ.get(_REASON)
    if path is not None and os.environ.get("LOCAL_RANK") == "0":
        Path(path).write_text(str(error) or type(error).__name__)


def rank_command(job_file: Path) -> list[str]:
    """Return the command of a rank, which runs the job of a file."""
    # -P: no folder is put before those of PYTHONPATH, by which a rank imports what its parent imports
    return [sys.executable, "-P", "-m", "visprompt.runs.rank", str(job_file.resolve())]
