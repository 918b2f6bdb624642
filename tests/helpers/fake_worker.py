"""A worker process that imports no torch and trains nothing: the tags of a job say what it does.

Each outcome is a failed one, whose reason says as JSON in which process and with which environment it was
made, and how many jobs that process had seen.
"""

import json
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import yaml

from visprompt.runs import ranks, signals

NAMES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def outcome(job, seen):
    tag = job["tags"][0] if job["tags"] else ""
    once = Path(job["paths"]["log_dir"]) / f"seen-{tag}"
    first = not once.exists()
    once.touch()
    if tag == "killed" or (tag == "killed-once" and first):
        os.kill(os.getpid(), 9)
    if tag == "exits":
        sys.exit(3)
    if tag == "sleeps":
        time.sleep(60)
    time.sleep(0.2)
    said = {name: os.environ.get(name) for name in NAMES}
    said |= {"pid": os.getpid(), "seen": seen, "seed": job["seed"], "task": job["task"]}
    return {"name": "", "result": None, "reason": json.dumps(said), "folder": None}


def main():
    signals.install()
    ranks.end_with_parent()
    connection = Connection(int(sys.argv[1]))
    signals.started()
    print("hello")
    connection.send_bytes(b'{"ready": true}')
    seen = 0
    while True:
        try:
            jobs = [yaml.safe_load(text) for text in json.loads(connection.recv_bytes())["jobs"]]
        except EOFError:
            return
        seen += 1
        tag, folder = (jobs[0]["tags"] or ("",))[0], Path(jobs[0]["paths"]["log_dir"]) / "theirs"
        if tag == "at-work" and not (folder / "tried").exists():
            (folder / "tried").touch()
            answer = {"at_work": {"who": "process 7 on thor", "folder": str(folder), "url": None}}
        else:
            answer = {"outcomes": [outcome(job, seen) for job in jobs]}
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
