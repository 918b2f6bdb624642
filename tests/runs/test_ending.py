"""SIGTERM and Ctrl-C at many moments of the real commands.

One sentence, the exit code, nothing left behind.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from test_processes import alive, folder_of, wait_for

from helpers.cli import call, command, equal, tensors, tiny
from helpers.leases import holder
from visprompt.runs.result import read_result

TWO = ("tasks=[digits,digits_loc]", "recipe.epochs=4")
LONG = ("recipe.epochs=200",)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def imported(library):
    return lambda logs, process: library in Path(f"/proc/{process.pid}/maps").read_text()


def handles_signals(logs, process):
    """Whether the process has come to its first import, which is that of its own handlers."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = int(next(line.split()[1] for line in lines if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def exists(pattern):
    return lambda logs, process: any(logs.glob(pattern))


MOMENTS = {
    "the first imports": (handles_signals, LONG),
    "composing": (imported("_yaml."), LONG),
    "Hydra's folder is made": (exists("hydra/*"), LONG),
    "torch is imported": (imported("libtorch_cpu"), LONG),
    "preparing": (exists("digits/*/*/lock"), LONG),
    "the first epoch": (exists("digits/*/*/resume/config.yaml"), LONG),
    "after an epoch": (exists("digits/*/*/resume/state.safetensors"), LONG),
    "between the runs of a loop": (exists("digits/*/*/result.json"), TWO),
    "the second run of a loop": (exists("digits_loc/*/*/lock"), TWO),
}


def started(script, arguments, temporary):
    temporary.mkdir()
    return subprocess.Popen(
        command(script, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )


def end(process, number, logs, temporary):
    """Sends a signal and checks how the command ends; returns its errors' text."""
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (
        128 + number,
        f"{WORDS[number]}: run the same command again to go on where it stopped\n",
    )
    assert wait_for(lambda: not alive(children), 10)
    left = [
        path
        for path in logs.rglob("*")
        if path.name.startswith((".result", ".state")) or (path.name == "lock" and holder(path.parent))
    ]
    assert [*left, *logs.rglob(".*.????????"), *temporary.iterdir()] == []


def check_moment(tmp_path, moment, number, script="train", *more):
    condition, options = moment
    arguments = tiny(tmp_path / "logs", "callbacks=none", *options, *more)
    # tune.py sets seeds itself
    arguments = [a for a in arguments if script == "train" or not a.startswith("seed=")]
    process = started(script, arguments, tmp_path / "tmp")
    try:
        assert wait_for(lambda: process.poll() is not None or condition(tmp_path / "logs", process), 400)
        end(process, number, tmp_path / "logs", tmp_path / "tmp")
    finally:
        process.kill()
        process.communicate()
    return arguments


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", MOMENTS)
def test_one_process_ends_in_order_at_any_moment(tmp_path, moment):
    number = list(WORDS)[list(MOMENTS).index(moment) % 2]
    check_moment(tmp_path, MOMENTS[moment], number)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_terminated_run_goes_on_to_the_same_bits(tmp_path):
    options = ("callbacks=none", "recipe.epochs=40")
    moment = (exists("digits/*/*/resume/state.safetensors"), ("recipe.epochs=40",))
    killed = check_moment(tmp_path, moment, signal.SIGTERM)
    for arguments in (killed, tiny(tmp_path / "whole", *options)):
        done = call("train", *arguments)
        assert done.returncode == 0, done.stderr
    assert equal(tensors(folder_of(tmp_path / "logs")), tensors(folder_of(tmp_path / "whole")))
    assert read_result(folder_of(tmp_path / "logs")).attempt == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("moment", "number"), [("preparing", signal.SIGTERM), ("after an epoch", signal.SIGINT)]
)
def test_the_ranks_of_a_run_end_with_their_parent_and_one_sentence(tmp_path, moment, number):
    check_moment(tmp_path, MOMENTS[moment], number, "train", "trainer=ddp_sim")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_grid_ends_in_order(tmp_path):
    moment = (
        exists("digits/linear/*/result.json"),
        ("recipe.epochs=30", "methods=[linear]", "tasks=[digits]"),
    )
    check_moment(tmp_path, moment, signal.SIGTERM, "tune", f"table={tmp_path}/table.md")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_on_one_grid_share_its_runs_and_write_one_table(tmp_path):
    grid = "++recipe.grid={recipe.lr:[0.1,0.2,0.4]}"
    options = tiny(
        tmp_path / "logs", "callbacks=none", "recipe.epochs=20", "methods=[linear]", "tasks=[digits]", grid
    )
    seeded = [option for option in options if not option.startswith("seed=")]
    both = [
        subprocess.Popen(
            command("tune", *seeded, "seeds=[1,2]", f"table={tmp_path}/{name}.md"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "a.md").read_text() == (tmp_path / "b.md").read_text()
    results = [read_result(path.parent) for path in (tmp_path / "logs").rglob("result.json")]
    assert len(results) == 5
    assert {result.attempt for result in results} == {0}


@pytest.mark.endurance
@pytest.mark.timeout(3 * 3600)
def test_a_hundred_signals_at_random_moments(tmp_path):
    draw = random.Random(0)
    for count in range(100):
        folder = tmp_path / str(count)
        folder.mkdir()
        arguments = tiny(folder / "logs", "callbacks=none", "recipe.epochs=30")
        process = started("train", arguments, folder / "tmp")
        assert wait_for(lambda process=process: handles_signals(None, process))
        time.sleep(draw.uniform(0, 15))
        if process.poll() is None:
            end(process, draw.choice(list(WORDS)), folder / "logs", folder / "tmp")
        else:
            process.communicate()
