"""A run's process group: who starts it, how it fails, that nothing of it is left behind.

The ranks here are light.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.cli import ROOT, tiny_job
from visprompt.errors import UserError
from visprompt.runs import ranks, signals

HEAD = f"import json, os, signal, subprocess, sys, time; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
SLEEP = "time.sleep(60)"
RANK = "rank = int(os.environ['LOCAL_RANK'])\n"
WATCHED = "from visprompt.runs import ranks; ranks.end_with_parent()\n"


def script(*lines):
    return [sys.executable, "-c", HEAD + RANK + "\n".join(lines)]


def note(folder):
    """A line with which a rank tells its process id and what it was given."""
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    value = f"dict({{n: os.environ[n] for n in {names}}}, pid=os.getpid(), group=os.getpgid(0))"
    write = f"open(f'{folder}/new{{rank}}', 'w').write(json.dumps({value}))"
    return f"{write}; os.rename(f'{folder}/new{{rank}}', f'{folder}/{{rank}}')"


def noted(folder, count=2):
    """What the ranks told, as soon as all have."""
    limit = time.monotonic() + 20
    while not all((folder / str(rank)).exists() for rank in range(count)):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(count)]


def gone(pids, seconds=5.0):
    """Whether processes end within some seconds."""
    limit = time.monotonic() + seconds
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    ):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def test_every_rank_runs_once_in_a_group_of_its_own(tmp_path):
    ranks.run_ranks(script(note(tmp_path)), 3)
    seen = noted(tmp_path, 3)
    assert [rank["LOCAL_RANK"] for rank in seen] == ["0", "1", "2"]
    assert {rank["WORLD_SIZE"] for rank in seen} == {"3"}
    assert {rank["NODE_RANK"] for rank in seen} == {"0"}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in seen}) == 1
    assert {rank["OMP_NUM_THREADS"] for rank in seen} == {"1"}, "what the user set stands"
    assert all(rank["group"] == rank["pid"] for rank in seen)


def test_cores_are_shared_among_the_ranks_where_no_threads_are_given(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(ranks, "cores", lambda: 7)
    ranks.run_ranks(script(note(tmp_path)), 2)
    assert {rank["OMP_NUM_THREADS"] for rank in noted(tmp_path)} == {"3"}


def test_a_failed_rank_ends_the_others_and_its_reason_is_told(tmp_path):
    fails = "if rank == 0: ranks.give_reason(ValueError('no such colour')); sys.exit(2)"
    started = time.monotonic()
    with pytest.raises(ranks.RanksFailed, match=r"^no such colour$"):
        ranks.run_ranks(script("from visprompt.runs import ranks", note(tmp_path), fails, SLEEP), 2)
    assert time.monotonic() - started < 10
    assert gone([rank["pid"] for rank in noted(tmp_path)], 0)


@pytest.mark.parametrize(
    ("rank", "end", "status"), [(1, "sys.exit(3)", 3), (0, "os.kill(os.getpid(), 9)", -9)]
)
def test_a_rank_that_cannot_say_why_is_told_by_its_status(tmp_path, rank, end, status):
    with pytest.raises(ranks.RanksFailed, match=f"^a rank ended with status {status}$"):
        ranks.run_ranks(script(note(tmp_path), f"if rank == {rank}: {end}", SLEEP), 2)
    assert gone([each["pid"] for each in noted(tmp_path)], 0)


def test_what_a_rank_started_and_what_ignores_the_request_end_too(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_GRACE", 0.5)
    child = f"child = subprocess.Popen([sys.executable, '-c', 'import time; {SLEEP}'])"
    told = f"open('{tmp_path}/child' + str(rank), 'w').write(str(child.pid))"
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    dies = f"if rank == 0:\n  while not os.path.exists('{tmp_path}/1'): time.sleep(0.02)\n  os.kill(os.getpid(), 9)"
    with pytest.raises(ranks.RanksFailed):
        ranks.run_ranks(script(deaf, child, told, note(tmp_path), dies, SLEEP), 2)
    children = [int((tmp_path / f"child{rank}").read_text()) for rank in range(2)]
    assert gone([*children, *(rank["pid"] for rank in noted(tmp_path))], 2)


def parent(folder):
    """A process that starts two ranks, which sleep."""
    watched = script(WATCHED, note(folder), SLEEP)
    code = f"{HEAD}from visprompt.runs import ranks\nranks.run_ranks({watched!r}, 2)"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_their_parent(tmp_path, number):
    process = parent(tmp_path)
    pids = [rank["pid"] for rank in noted(tmp_path)]
    process.send_signal(number)
    assert process.wait(10) != 0
    process.stderr.close()
    assert gone(pids)


def test_another_process_is_not_watched(monkeypatch):
    monkeypatch.setattr(ranks.threading, "Thread", None)  # is not started
    ranks.end_with_parent()


def test_only_rank_0_gives_a_reason(tmp_path, monkeypatch):
    ranks.give_reason(ValueError("nobody asked"))
    monkeypatch.setenv("VISPROMPT_REASON", str(tmp_path / "reason"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks.give_reason(ValueError("mine"))
    assert not (tmp_path / "reason").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    ranks.give_reason(signals.Ended(143))
    assert not (tmp_path / "reason").exists(), "it ends because another rank has failed"
    ranks.give_reason(KeyboardInterrupt())
    assert (tmp_path / "reason").read_text() == "KeyboardInterrupt"


def test_ranks_that_somebody_else_started_are_told_as_lightning_tells_them(monkeypatch):
    assert not ranks.started_elsewhere()
    for name, value in {"LOCAL_RANK": "0", "SLURM_NTASKS": "2", "TORCHELASTIC_RUN_ID": "0"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert ranks.started_elsewhere()
    for name in ("bash", "interactive"):  # a shell in a job, whose tasks nobody started
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_NTASKS", "2")
            patch.setenv("SLURM_JOB_NAME", name)
            assert not ranks.started_elsewhere()
    # as a batch script of SLURM has without srun, which starts no other rank
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not ranks.started_elsewhere()
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a job of one task starts its ranks itself
    assert not ranks.started_elsewhere()


def test_the_ranks_of_a_job_of_one_task_do_not_take_slurm_for_what_started_them(tmp_path, monkeypatch):
    for name in ("JOB_ID", "NTASKS", "NPROCS", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    seen = f"open(f'{tmp_path}/seen{{rank}}', 'w').write(' '.join(sorted(n for n in os.environ if n[:5] == 'SLURM')))"
    ranks.run_ranks(script(seen), 2)
    assert [(tmp_path / f"seen{rank}").read_text() for rank in (0, 1)] == ["SLURM_JOB_ID", "SLURM_JOB_ID"]


SLURM = [{"_target_": "lightning.pytorch.plugins.environments.SLURMEnvironment", "auto_requeue": False}]


def test_processes_that_this_one_cannot_start_are_refused(monkeypatch):
    ranks.check_alone((), 2, 1)
    with pytest.raises(UserError) as error:
        ranks.check_alone((), 2, 3)
    assert str(error.value) == (
        "trainer.num_nodes=3 needs another program to start its 6 process(es): begin the command with "
        "srun --nodes=3 --ntasks-per-node=2 or torchrun --nnodes=3 --nproc-per-node=2, or give trainer=ddp, "
        "which starts the processes of one machine itself"
    )
    with pytest.raises(
        UserError, match=r"^trainer=slurm needs .* 1 process.*: begin the command with srun --nodes=1 "
    ):
        ranks.check_alone(SLURM, 1, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    ranks.check_alone(SLURM, 1, 1)
    with pytest.raises(UserError, match=r"^trainer=slurm needs another program to start its 2 process"):
        ranks.check_alone(SLURM, 2, 1)


@pytest.mark.slow
def test_a_rank_reads_its_job_from_a_file_and_imports_what_its_parent_imports(tmp_path, monkeypatch):
    content = tiny_job(tmp_path).content() | {"lightning_module": {"_target_": "mine.Module"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "mine.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ranks.RanksFailed, match=r"nowhere"):
        ranks.run_ranks(ranks.rank_command(Path("job.yaml")), 1)
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__", "weights.safetensors", "digits"}
    assert left == {"job.yaml", "mine.py"}, "a rank makes no folder of Hydra's"
