"""Hold a worker process on a node of a Ray cluster.

Ray runs an actor in a process that it set up for itself: its signal handlers, output and threads. The runs
are made in a child process instead, which is the same as that of engine=processes. Only light modules are
imported here, because each actor imports them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from visprompt.runs import ranks
from visprompt.runs.engine.process import WorkerDied, WorkerProcess, end


class Supervisor:
    """A Ray actor that starts a worker process, passes units to it, and ends it.

    Args:
        folder: The working directory of the command.
        path: `sys.path` of the command.
        env: Environment variables for the worker process.
        log: The file for its output.
    """

    def __init__(self, folder: str, path: Sequence[str], env: Mapping[str, str], log: str) -> None:
        self._folder, self._path, self._env, self._log = folder, path, env, log
        self._worker: WorkerProcess | None = None
        for name in ranks.OF_A_LAUNCHER:  # if srun has started Ray on this node
            os.environ.pop(name, None)

    def start(self) -> str:
        """Start the worker process and return its first message as JSON, `{"died": how}` if it failed."""
        try:
            os.chdir(self._folder)
            self._worker = WorkerProcess(self._env, Path(self._log), self._path)
        except OSError as error:
            return json.dumps({"died": f"could not be started ({error}): every node needs the same folders"})
        return self._answer()

    def run(self, jobs: Sequence[str]) -> str:
        """Pass a unit's jobs, as YAML, to the worker process, and return its answer, as in `start`."""
        assert self._worker is not None  # `start` is called first
        self._worker.send(jobs)
        return self._answer()

    def end(self) -> None:
        """End the worker process; may be called while `run` waits for its answer."""
        if self._worker is not None:
            end([self._worker])

    def _answer(self) -> str:
        assert self._worker is not None  # `start` is called first
        try:
            return json.dumps(self._worker.receive())
        except WorkerDied as death:
            return json.dumps({"died": str(death)})
