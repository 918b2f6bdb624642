"""A real grid by each engine: the same bits as in one process, with workers killed and the command interrupted."""

import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from helpers.cli import command, composed, equal, frozen, tensors, tiny
from helpers.leases import holder
from visprompt.runs.result import read_result
from visprompt.tuning import protocol

pytestmark = [frozen, pytest.mark.slow, pytest.mark.timeout(600)]
GRID = ("recipe.epochs=12", "method.dropout=0.1", "seeds=[1]", "callbacks=none")


def arguments(logs, *more):
    return [word for word in tiny(logs, *GRID, *more) if not word.startswith("seed=")]


def tune(logs, *more):
    with composed("tune", *arguments(logs, *more)) as cfg:
        protocol.tune(cfg)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the grid made in one process."""
    logs = tmp_path_factory.mktemp("alone")
    tune(logs)
    return logs


def states(logs):
    """Tuned states by the name of the run's folder; each was made with one thread."""
    folders = [path.parent for path in logs.rglob("result.json")]
    assert {read_result(folder).machine["threads"] for folder in folders} == {1}
    return {folder.name: tensors(folder) for folder in folders}


def assert_same(logs, alone):
    ours, theirs = states(logs), states(alone)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3
    assert all(equal(ours[name], theirs[name]) for name in theirs)
    assert (logs / "table.md").read_text() == (alone / "table.md").read_text()


def started(logs, *more, **env):
    return subprocess.Popen(
        command("tune", *arguments(logs, *more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env or None,
    )


def training(logs, process=None):
    """Waits until some runs have left a resume state; the ids of the processes that are working on them."""
    limit = time.monotonic() + 200
    while time.monotonic() < limit:
        assert process is None or process.poll() is None, process.communicate()
        pids = []
        for state in logs.rglob("state.safetensors"):
            pids += re.findall(r"process (\d+) on", holder(state.parents[1]) or "")
        if pids:
            return [psutil.Process(int(pid)) for pid in pids]
        time.sleep(0.1)
    raise AssertionError("no run was begun")


def left(processes):
    """Those of some processes that do not end within some seconds."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    return [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_processes_that_are_interrupted_and_killed_reach_the_bits_of_one(tmp_path, alone, capsys):
    process = started(tmp_path, "engine=processes", "engine.max_concurrent=1")
    training(tmp_path, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted: run the same command again to go on where it stopped\n"
    assert left(workers) == []
    assert not [path for path in tmp_path.rglob("lock") if holder(path.parent)]
    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(lambda: training(tmp_path)[0].kill())
        tune(tmp_path, "engine=processes", "engine.max_concurrent=2")
        killed.result()
    out = capsys.readouterr().out
    assert out.count("its worker was killed by SIGKILL") == out.count("started again, 1 of 3") == 1
    assert re.findall(r"^\d/3 ", out, re.MULTILINE) == ["1/3 ", "2/3 ", "3/3 "]
    assert_same(tmp_path, alone)


def test_ray_reaches_the_bits_of_one_process_and_leaves_nothing(tmp_path, alone, monkeypatch):
    logs, home = tmp_path / "logs", tmp_path / "home"
    home.mkdir()
    for name, folder in (("HOME", home), ("TMPDIR", Path("/tmp"))):
        monkeypatch.setenv(name, str(folder))
    process = started(logs, "engine=ray", "engine.max_concurrent=1")
    working = training(logs, process)
    children = psutil.Process(process.pid).children(recursive=True)
    working[0].kill()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.count("its worker was killed by SIGKILL") == 1
    assert_same(logs, alone)
    assert left(children) == []
    assert list(home.rglob("auth_token")) == []
