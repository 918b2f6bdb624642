"""One grid by two machines at the same time: workers are killed, one machine stands still and is woken again."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

import psutil
import pytest

from helpers import s3_server
from helpers.cli import command, equal, frozen, tensors, tiny
from visprompt.runs import object_store
from visprompt.runs.result import read_result

pytestmark = [frozen, pytest.mark.slow, pytest.mark.timeout(3000)]
LIFE = 4.0  # seconds, of leases
# another name of the machine is another machine for leases; without the right to give one it stays the same
RENAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
CAN_RENAME = (
    shutil.which("unshare")
    and subprocess.run([*RENAMED, "thor", "true"], capture_output=True).returncode == 0
)


def arguments(logs, rates, decays, seeds, *more):
    grid = f"++recipe.grid={{recipe.lr:{list(rates)},recipe.weight_decay:{list(decays)}}}".replace(" ", "")
    words = tiny(
        logs, "recipe.epochs=2", "callbacks=none", f"seeds={list(seeds)}".replace(" ", ""), grid, *more
    )
    return [word for word in words if not word.startswith("seed=")]


def start(name, logs, words):
    prefix = [*RENAMED, name] if CAN_RENAME else []
    with (logs.parent / f"{name}.log").open("a") as log:
        return psutil.Popen(
            [*prefix, *command("tune", *words)],
            env=os.environ | {"VISPROMPT_LEASE_S": str(LIFE)},
            stdout=log,
            stderr=log,
        )


def tree(process):
    with suppress(psutil.NoSuchProcess):
        return [*process.children(recursive=True), process]
    return []


def workers(process):
    found = []
    for each in tree(process):
        with suppress(psutil.NoSuchProcess):
            if "visprompt.runs.engine.worker" in each.cmdline():
                found.append(each)
    return found


def freeze(process):
    """Stops a machine for three lives of its leases."""
    stopped = []
    for each in tree(process):
        with suppress(psutil.NoSuchProcess):
            each.suspend()
            stopped.append(each)
    time.sleep(3 * LIFE)
    for each in reversed(stopped):
        with suppress(psutil.NoSuchProcess):
            each.resume()


@contextmanager
def recorded(folder):
    """Counts how often each run's result.json below a folder is put in place."""
    seen, ended = {}, threading.Event()

    def look():
        while not ended.wait(0.05):
            for path in folder.glob("digits/*/*/result.json"):
                with suppress(FileNotFoundError):
                    seen.setdefault(path.parent.name, set()).add(
                        (path.stat().st_ino, path.stat().st_mtime_ns)
                    )

    thread = threading.Thread(target=look)
    thread.start()
    times = Counter()
    try:
        yield times
    finally:
        ended.set()
        thread.join()
        times.update({name: len(states) for name, states in seen.items()})


@contextmanager
def stored():
    """Counts how often each run's result.json is put into the bucket."""
    with s3_server.served():
        files = object_store._file_system(os.getpid())
        versioned = {"Status": "Enabled"}
        files.call_s3("put_bucket_versioning", Bucket=s3_server.BUCKET, VersioningConfiguration=versioned)
        times = Counter()
        yield times
        token = {}
        while True:
            page = files.call_s3("list_object_versions", Bucket=s3_server.BUCKET, **token)
            keys = [version["Key"] for version in page.get("Versions", [])]
            times.update(key.split("/")[-2] for key in keys if key.endswith("/result.json"))
            if not page["IsTruncated"]:
                break
            token = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}


@pytest.mark.parametrize(
    ("store", "engine", "rates", "decays", "seeds", "kills"),
    [
        ("s3", "processes", 4, 2, 2, 2),
        pytest.param("s3", "ray", 79, 3, 3, 40, marks=pytest.mark.endurance),
        pytest.param("folder", "ray", 79, 3, 3, 40, marks=pytest.mark.endurance),
    ],
)
def test_no_run_is_lost_and_none_is_recorded_twice(tmp_path, store, engine, rates, decays, seeds, kills):
    grid = [round(0.01 * (1 + n), 2) for n in range(rates)], [0.0, 0.001, 0.01][:decays], range(1, seeds + 1)
    total = rates * decays + seeds
    alone = tmp_path / "alone"
    subprocess.run(command("tune", *arguments(alone, *grid)), check=True, capture_output=True)
    weights = f"backbone.weights={alone / 'weights.safetensors'}"
    engines = [f"engine={engine}", "engine.max_concurrent=2", "engine.retries=100", weights]
    dice = random.Random(0)
    names = ("thor", "odin")
    logs = [tmp_path / ("shared" if store == "folder" else name) for name in names]
    shared = [] if store == "folder" else [f"paths.results={s3_server.URL}"]
    with recorded(logs[0]) if store == "folder" else stored() as times:
        words = [
            arguments(folder, *grid, *engines, *shared, f"table={tmp_path / name}.md")
            for name, folder in zip(names, logs, strict=True)
        ]
        machines = [start(name, folder, line) for name, folder, line in zip(names, logs, words, strict=True)]
        done = frozen_once = 0
        try:
            while any(machine.poll() is None for machine in machines):
                time.sleep(dice.uniform(0.5, 2.0))
                finished = {
                    path.parent.name for folder in logs for path in folder.glob("digits/*/*/result.json")
                }
                if not frozen_once and total / 4 < len(finished):
                    frozen_once = len(finished)
                    freeze(machines[0])
                elif (
                    done < kills and len(finished) < 0.9 * total and (alive := workers(dice.choice(machines)))
                ):
                    with suppress(psutil.NoSuchProcess):
                        dice.choice(alive).kill()
                        done += 1
        finally:
            for machine in machines:
                for each in tree(machine):
                    with suppress(psutil.NoSuchProcess):
                        each.send_signal(signal.SIGKILL)
        for name, machine in zip(names, machines, strict=True):
            assert machine.wait() == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
    print(f"{engine}, {store}: {total} runs, {done} kills, frozen after {frozen_once} runs")
    assert done > 0
    assert frozen_once
    assert len(times) == total
    assert set(times.values()) == {1}
    theirs = {path.parent.name: path.parent for path in alone.rglob("result.json")}
    assert len(theirs) == total
    for folder in logs:
        ours = {path.parent.name: path.parent for path in folder.rglob("result.json")}
        assert ours.keys() == theirs.keys()
        for name, path in ours.items():
            assert equal(tensors(path), tensors(theirs[name]))
            assert read_result(path).metrics == read_result(theirs[name]).metrics
    for name in names:
        assert (tmp_path / f"{name}.md").read_text() == (alone / "table.md").read_text()
