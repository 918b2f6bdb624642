"""A worker process and the connection to it, from the side of the process that starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from visprompt.runs import ranks, signals
from visprompt.runs.signals import PARENT

_EXIT = 5.0  # seconds between the end of a worker's connection and that of its process
_MODULE = "visprompt.runs.engine.worker"


class WorkerDied(Exception):
    """A worker process ended before it answered; the message says how: "was killed by SIGKILL"."""


class WorkerProcess:
    """A process that makes the runs that it is sent, see `worker`.

    It ends with the process that started it, also if that is killed.

    Args:
        env: Environment variables that it gets in addition to those of this process.
        log: The file to which its output is appended.
        path: The folders from which it imports, `sys.path` of the command.
    """

    def __init__(self, env: Mapping[str, str], log: Path, path: Sequence[str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)  # on another node of a Ray cluster
        self.connection, theirs = Pipe()
        # -P: do not put the current folder before PYTHONPATH, so that it imports the same code as the command
        command = [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())]
        own = {PARENT: str(os.getpid()), "PYTHONPATH": os.pathsep.join(filter(None, path))}
        with signals.deferred(), log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **own, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                process_group=0,  # so that Ctrl-C in a terminal reaches the command alone
            )
            theirs.close()

    def send(self, jobs: Sequence[str]) -> None:
        """Send the jobs of a unit as YAML; of a process that has died `receive` will say so."""
        try:
            self.connection.send_bytes(json.dumps({"jobs": list(jobs)}).encode())
        except OSError:
            return

    def receive(self) -> dict[str, Any]:
        """Wait for the next message, and return it.

        Raises:
            WorkerDied: The process has ended.
        """
        try:
            message: dict[str, Any] = json.loads(self.connection.recv_bytes())
            return message
        except (EOFError, OSError, ValueError):
            with suppress(subprocess.TimeoutExpired):  # its own exit status is the better one
                self.process.wait(_EXIT)
            end([self])
            raise WorkerDied(how(self.process.returncode)) from None


def end(workers: Sequence[WorkerProcess]) -> None:
    """End processes with SIGTERM, on which they clean up, and after a grace period with SIGKILL."""
    for worker in workers:
        worker.connection.close()
    ranks.end([worker.process for worker in workers])


def how(status: int) -> str:
    """Return how a process ended, by its exit status."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (the system does this when memory runs out)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
