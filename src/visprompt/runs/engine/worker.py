"""Make the runs that another process sends: `python -P -m visprompt.runs.engine.worker FD`.

FD is the file descriptor of a connection. Each message on it is JSON: `{"jobs": [YAML, ...]}` arrives,
`{"outcomes": [...]}` or `{"at_work": {"who": ..., "folder": ..., "url": ...}}` is the answer. The first
message, `{"ready": true}`, says that everything has been imported. The backbone and the decoded images of a
run stay in memory for the next one.
"""

from visprompt.runs import signals

if __name__ == "__main__":
    signals.install()  # before the imports below, which take seconds

import atexit
import json
import os
import sys
from multiprocessing.connection import Connection

from visprompt.runs import ranks


def serve(connection: Connection) -> None:
    """Answer messages until the other side closes the connection."""
    # imported late: torch takes seconds, in which the parent may end
    from visprompt.runs.job import Job
    from visprompt.runs.run_lock import AtWork
    from visprompt.runs.unit import run_unit

    signals.started()
    _send(connection, {"ready": True})
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            outcomes = run_unit(tuple(Job.from_yaml(text) for text in message["jobs"]))
        except AtWork as error:
            url = error.remote and error.remote.url
            _send(connection, {"at_work": {"who": error.who, "folder": str(error.folder), "url": url}})
        else:
            _send(connection, {"outcomes": [outcome.record() for outcome in outcomes]})


def _send(connection: Connection, message: object) -> None:
    sys.stdout.flush()  # the log of a run is complete when its outcome arrives
    connection.send_bytes(json.dumps(message).encode())


def main(descriptor: int) -> int:
    """Serve on a connection; return the exit status, 128 plus the signal's number after a signal."""
    ranks.end_with_parent()
    try:
        serve(Connection(descriptor))
    except signals.Ended as end:
        return int(str(end.code))
    return 0


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    # all is cleaned up; Python's own end would collect the garbage of torch first, which takes seconds
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
