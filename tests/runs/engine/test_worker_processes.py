"""engine=processes with workers that train nothing: who gets what, and what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from filelock import FileLock

from helpers.cli import ROOT, tiny_job
from visprompt.errors import UserError
from visprompt.runs.engine import pool, process, processes
from visprompt.runs.engine.progress import Shown

TWO = [{"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": "1"} for name in ("2", "MIG-a")]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(process, "_MODULE", "helpers.fake_worker")
    monkeypatch.setattr(pool, "_POLL", 0.1)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("logs"))


def engine(folder, slots=TWO, retries=3, total=9):
    return processes.Processes(Shown(total), len(slots), retries, slots, folder)


def made(opened, jobs):
    """Gives jobs to an engine, a unit for each; what the workers said of each, or why it failed."""
    numbers = [opened.add((job,), [f"run {place}"]) for place, job in enumerate(jobs)]
    ended = dict(opened.next() for _ in jobs)
    assert sorted(ended) == numbers
    reasons = [ended[number][0].reason for number in numbers]
    return [json.loads(reason) if reason.startswith("{") else reason for reason in reasons]


def tagged(job, folder, *tags):
    return [job.vary({"tags": [tag] if tag else [], "paths.log_dir": str(folder)}) for tag in tags]


def alive(pids):
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def test_runs_are_made_at_once_on_devices_of_their_own_and_each_is_a_line(tmp_path, job, capsys):
    jobs = [job.vary({"seed": seed}) for seed in range(5)]
    with engine(tmp_path, total=5) as opened:
        said = made(opened, jobs)
    assert [each["seed"] for each in said] == [0, 1, 2, 3, 4]
    by_pid = {each["pid"]: (each["CUDA_VISIBLE_DEVICES"], each["OMP_NUM_THREADS"]) for each in said}
    assert sorted(by_pid.values()) == [("2", "1"), ("MIG-a", "1")]
    assert not alive(by_pid)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" run ")[0] for line in lines] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert all(": failed (" in line and line.endswith(" s") for line in lines)
    assert (tmp_path / "worker-1.log").read_text() == "hello\n"


def test_no_more_workers_are_started_than_there_are_units(tmp_path, job):
    with engine(tmp_path) as opened:
        made(opened, [job])
        made(opened, [job])
        assert len(opened.workers) == 1


def test_a_worker_gets_what_it_has_in_memory_and_other_tasks_go_to_others(tmp_path, job):
    others = job.vary({"task": "digits_loc"})
    with engine(tmp_path) as opened:
        said = made(opened, [job, job, job, others, others, others])
    pids = [{each["pid"] for each in said if each["task"] == task} for task in ("digits", "digits_loc")]
    assert [len(each) for each in pids] == [1, 1]
    assert pids[0] != pids[1]


def test_a_unit_of_several_jobs_is_sent_whole(tmp_path, job):
    with engine(tmp_path) as opened:
        number = opened.add((job, job.vary({"seed": 7})), ["a", "b"])
        ended, outcomes = opened.next()
    assert ended == number
    assert [json.loads(outcome.reason)["seed"] for outcome in outcomes] == [0, 7]


def test_the_run_of_a_killed_worker_is_started_again(tmp_path, job, capsys):
    with engine(tmp_path) as opened:
        said = made(opened, tagged(job, tmp_path, "killed-once", ""))
    assert [each["seed"] for each in said] == [0, 0]
    killed = "run 0: its worker was killed by SIGKILL (the system does this when memory runs out)"
    assert f"{killed}: started again, 1 of 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tag", "how"),
    [
        ("killed", "was killed by SIGKILL (the system does this when memory runs out)"),
        ("exits", "ended with status 3"),
    ],
)
def test_a_run_whose_workers_all_die_has_failed_and_stops_no_other(tmp_path, job, tag, how):
    with engine(tmp_path, TWO[:1], retries=1) as opened:
        bad, good = made(opened, tagged(job, tmp_path, tag, ""))
    assert good["seed"] == 0
    log = tmp_path / "worker-2.log"
    advice = f"{log} has its output; if memory ran out give engine.max_concurrent=1"
    assert bad == f"its worker {how}, as 1 before it: {advice}"


def test_workers_that_cannot_begin_are_one_sentence(tmp_path, job, monkeypatch):
    monkeypatch.setattr(process, "_MODULE", "helpers.nowhere")
    log = tmp_path / "worker-2.log"
    sentence = f"^workers cannot be started: the last one ended with status 1: {log} has its output"
    with engine(tmp_path, TWO[:1], retries=1) as opened, pytest.raises(UserError, match=sentence):
        made(opened, [job])
    assert "No module named helpers.nowhere" in log.read_text()


def test_a_run_that_another_command_works_on_comes_when_it_is_free(tmp_path, job, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    lock = FileLock(theirs / "lock", thread_local=False)
    lock.acquire()
    timer = threading.Timer(1.0, lock.release)
    timer.start()
    started = time.monotonic()
    with engine(tmp_path) as opened:
        said = made(opened, tagged(job, tmp_path, "at-work", ""))
    timer.join()
    assert time.monotonic() - started > 1
    assert [each["seed"] for each in said] == [0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run 0: process 7 on thor is working on it: waiting until later"
    assert [line.partition(":")[0] for line in lines[1:]] == ["1/9 run 1", "2/9 run 0"]


COMMAND = """
import sys
sys.path[:0] = {path!r}
from visprompt.runs import signals
signals.install()
from pathlib import Path
from visprompt.runs.engine import process
process._MODULE = "helpers.fake_worker"
worker = process.WorkerProcess({{}}, Path({log!r}), sys.path)
signals.started()
worker.receive()
worker.send([Path({job!r}).read_text()])
print(worker.process.pid, flush=True)
try:
    worker.receive()
finally:
    process.end([worker])
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_workers_end_with_their_command(tmp_path, job, number, status):
    file = tmp_path / "job.yaml"
    file.write_text(tagged(job, tmp_path, "sleeps")[0].as_yaml())
    path = [str(ROOT / "src"), str(ROOT / "tests")]
    code = COMMAND.format(path=path, log=str(tmp_path / "log"), job=str(file))
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pid = int(command.stdout.readline())
    assert alive([pid])
    command.send_signal(number)
    _, errors = command.communicate(timeout=20)
    assert command.returncode == status, errors
    assert errors.count("run the same command again") == (number != signal.SIGKILL)
    limit = time.monotonic() + 5
    while alive([pid]) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive([pid])


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "ended with status 0"), (-15, "was killed by SIGTERM"), (-63, "was killed by signal 63")],
)
def test_how_a_process_ended(status, words):
    assert process.how(status) == words


def test_a_worker_has_the_paths_of_the_command(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(process.subprocess, "Popen", lambda command, **given: started.append(given))
    process.WorkerProcess({"OMP_NUM_THREADS": "3"}, tmp_path / "log", ["", "/code"])
    env = started[0]["env"]
    assert (env["PYTHONPATH"], env["OMP_NUM_THREADS"]) == ("/code", "3")
    assert env["VISPROMPT_PARENT"] == str(os.getpid())
