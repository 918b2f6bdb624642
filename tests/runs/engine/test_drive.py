"""The order in which runs are given to an engine, the lines about them, and which engine a command gets."""

import json
import socket
import tempfile
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import pytest
import torch

from helpers.cli import composed, tiny, tiny_job
from helpers.written_runs import result
from visprompt.errors import UserError
from visprompt.files import temporary_folder
from visprompt.runs import compose, ranks, run_lock, unit
from visprompt.runs.engine import choose, drive, on_ray, processes, worker
from visprompt.runs.engine.local import LocalEngine
from visprompt.runs.engine.on_ray import _at_once, _fitting, gpus_per_run
from visprompt.runs.engine.progress import Shown
from visprompt.runs.unit import Outcome

LOCAL = {"name": "local"}
PROCESSES = {"name": "processes", "runs_per_gpu": 1, "max_concurrent": None, "retries": 3}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return tiny_job(tmp_path_factory.mktemp("logs"))


class Backwards:
    """An engine that finishes last what it was given first."""

    def __init__(self, at_once):
        self.at_once, self.units, self.order = at_once, [], []

    def add(self, unit, names):
        self.units.append((len(self.order) + len(self.units), names))
        return self.units[-1][0]

    def next(self):
        number, names = self.units.pop()
        self.order.append(names[0])
        return number, [Outcome("", None, f"of {name}") for name in names]


def two_steps(name, job):
    first = yield [(f"{name}1", job), (f"{name}2", job)]
    second = yield []
    third = yield [(f"{name}3", job)]
    return [(outcome.name, outcome.reason) for outcome in [*first, *second, *third]]


@pytest.mark.parametrize(
    ("at_once", "order"),
    [(False, ["a2", "a1", "a3", "b2", "b1", "b3"]), (True, ["b2", "b1", "b3", "a2", "a1", "a3"])],
)
def test_sequences_advance_and_get_their_outcomes_in_order(job, at_once, order):
    engine = Backwards(at_once)
    returned = drive.drive(engine, [two_steps(name, job) for name in "ab"])
    assert returned == [[(f"{name}{n}", f"of {name}{n}") for n in (1, 2, 3)] for name in "ab"]
    assert engine.order == order


def test_sequences_without_runs_return_too(job):
    def nothing():
        assert (yield []) == []
        return 7

    assert drive.drive(LocalEngine(), [nothing(), nothing()]) == [7, 7]


def test_an_outcome_is_sent_whole(tmp_path):
    for outcome in (Outcome("a/b", result(), "", tmp_path), Outcome("a/b", None, "no ink: buy some")):
        assert Outcome.of(json.loads(json.dumps(outcome.record()))) == outcome


def test_a_worker_answers_units_until_its_connection_ends(job, monkeypatch, tmp_path):
    asked = []

    def run_unit(jobs):
        asked.append([each.seed for each in jobs])
        if len(asked) == 1:
            raise run_lock.AtWork("process 7 on thor", tmp_path)
        return [Outcome(each.name, None, "no") for each in jobs]

    monkeypatch.setattr(unit, "run_unit", run_unit)
    ours, theirs = Pipe()
    thread = Thread(target=worker.serve, args=(theirs,))
    thread.start()
    message = json.dumps({"jobs": [job.as_yaml(), job.vary({"seed": 5}).as_yaml()]}).encode()
    answers = [json.loads(ours.recv_bytes())]
    for _ in range(2):
        ours.send_bytes(message)
        answers.append(json.loads(ours.recv_bytes()))
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    failed = Outcome("digits/vpt_deep", None, "no").record()
    assert answers == [
        {"ready": True},
        {"at_work": {"who": "process 7 on thor", "folder": str(tmp_path), "url": None}},
        {"outcomes": [failed, failed]},
    ]
    assert asked == [[0, 5], [0, 5]]


def test_a_line_says_score_failure_or_divergence(capsys):
    diverged = result(status="diverged", diverged_step=3)
    outcomes = [
        Outcome("", result(score=0.4312)),
        Outcome("", None, "no ink"),
        Outcome("", diverged, "the loss was not finite at step 3: lower recipe.lr"),
        Outcome("", result(status="unscored")),
    ]
    with Shown(240) as shown:
        shown.running(2)
        shown.finished(["dtd/lora recipe.lr=0.5", "b", "c", "d"], outcomes, 12.34)
        shown.say("a\x1b[31m")
    assert capsys.readouterr().out.splitlines() == [
        "1/240 dtd/lora recipe.lr=0.5: test/acc 43.1 % in 12.3 s",
        "2/240 b: failed (no ink) in 12.3 s",
        "3/240 c: diverged (the loss was not finite at step 3: lower recipe.lr) in 12.3 s",
        "4/240 d: not scored in 12.3 s",
        r"a\x1b[31m",
    ]


def of_trainer(job, **trainer):
    return job.vary({f"trainer.{name}": value for name, value in trainer.items()})


@pytest.mark.parametrize(
    ("gpus", "visible", "devices", "per_gpu", "most", "expected"),
    [
        (2, None, 1, 1, None, ["0", "1"]),
        (2, "2,3", 1, 1, None, ["2", "3"]),
        (2, " 5, 4,-1,3", 1, 2, None, ["5", "4", "5", "4"]),
        (4, None, 2, 1, None, ["0,1", "2,3"]),
        (3, None, 2, 1, None, ["0,1"]),
        (4, None, "auto", 1, None, ["0,1,2,3"]),
        (4, None, 1, 2, 3, ["0", "1", "2"]),
        (1, "MIG-a,MIG-b", 1, 1, None, ["MIG-a", "MIG-b"]),
        (1, "GPU-7,GPU-8", 1, 1, None, ["GPU-7"]),
    ],
)
def test_each_worker_has_gpus_of_those_that_the_command_sees(
    job, monkeypatch, gpus, visible, devices, per_gpu, most, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    slots = processes.slots_for([of_trainer(job, accelerator="gpu", devices=devices)], per_gpu, most)
    threads = str(8 // len(",".join(expected).split(",")))  # each device of a run has a process
    assert slots == [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads} for gpu in expected]


@pytest.mark.parametrize(
    ("threads", "devices", "most", "count", "each"),
    [
        (None, 1, None, 8, "1"),
        ("2", 1, None, 4, "2"),
        ("16", 1, None, 1, "16"),
        (None, 1, 2, 2, "4"),
        ("1", 2, None, 4, "1"),
        ("3", 1, 5, 5, "3"),
    ],
)
def test_without_a_gpu_the_workers_share_the_cores(job, monkeypatch, threads, devices, most, count, each):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # which trainer.accelerator=cpu does not take
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    slots = processes.slots_for([of_trainer(job, devices=devices)], 1, most)
    assert slots == [{"OMP_NUM_THREADS": each}] * count


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [
        ([2, 3], r"^trainer.devices=\[2, 3\] names GPUs, .*: give trainer.devices=2, and name GPUs in CUDA"),
        (3, r"^trainer.devices=3 asks for more GPUs than the 2 that this command sees: lower it$"),
    ],
)
def test_gpus_that_cannot_be_given_out_are_one_sentence(job, monkeypatch, devices, sentence):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=sentence):
        processes.slots_for([of_trainer(job, accelerator="gpu", devices=devices)], 1, None)


def test_no_gpu_where_one_is_asked_for_is_one_sentence_before_workers_are_started(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as error:
        processes.slots_for([of_trainer(job, accelerator="gpu")], 1, None)
    assert str(error.value) == (
        "trainer.accelerator=gpu asks for a GPU, and this command sees none (CUDA_VISIBLE_DEVICES=): give "
        "trainer=default, or start it where there is one"
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.slots_for([of_trainer(job, accelerator="gpu")], 1, 2) == [{"OMP_NUM_THREADS": "1"}] * 2


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_an_engine_that_is_named_without_its_settings_is_one_sentence(job, name):
    with pytest.raises(UserError) as error:
        choose.opened({"name": name, "stack": "auto"}, [job], 1).__enter__()
    assert str(error.value) == f"engine.name={name} lacks the settings of that engine: give engine={name}"


def test_a_temporary_folder_whose_path_would_be_too_long_is_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("long") as own, temporary_folder("long", 10) as short:
        assert own.parent == tmp_path
        assert short.parent == Path("/tmp")


def test_a_gpu_that_fails_ends_its_worker_so_that_its_other_runs_go_elsewhere(job, monkeypatch):
    def fails(job):
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(unit, "_run_chain", fails)
    ours, theirs = Pipe()
    ours.send_bytes(json.dumps({"jobs": [job.as_yaml()]}).encode())
    with pytest.raises(unit.DeviceLost, match=r"^digits/vpt_deep: the GPU failed \(CUDA error: device-side"):
        worker.serve(theirs)
    assert json.loads(ours.recv_bytes()) == {"ready": True}
    assert not ours.poll()


def test_an_engine_is_chosen_by_its_name(job):
    with choose.opened(LOCAL, [job], 1) as engine:
        assert isinstance(engine, LocalEngine)
    with choose.opened(PROCESSES | {"max_concurrent": 2}, [job], 1) as engine:
        assert (engine.most, engine.retries, engine.workers) == (2, 3, [])
        assert engine.folder.parent.name == "engine"
    with pytest.raises(UserError, match=r"^unknown engine 'rays': did you mean ray\?"):
        choose.opened({"name": "rays"}, [job], 1).__enter__()


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "7"},
            "engine=processes starts the processes of all runs itself, but the launcher has started this "
            "command as one rank of a run: leave engine=... out, or start the command without it",
        ),
        (
            {"WANDB_RUN_ID": "7"},
            "engine=processes makes several runs at the same time, but under a W&B agent this command is one "
            "run, which logs to that of the agent: leave engine=... out, or start several agents",
        ),
    ],
)
def test_commands_that_are_part_of_something_else_have_no_engine(job, monkeypatch, env, sentence):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        choose.opened(PROCESSES, [job], 1).__enter__()
    assert str(error.value) == sentence


def test_several_machines_are_refused_before_anything_is_started(job):
    with pytest.raises(UserError, match=r"^trainer.num_nodes=2 needs another program"):
        choose.opened(PROCESSES, [of_trainer(job, num_nodes=2)], 1).__enter__()


@pytest.mark.parametrize(
    ("given", "accelerator", "devices", "available", "expected"),
    [
        (None, "cpu", 1, 8, 0),
        (None, "auto", 1, 0, 0),
        (None, "auto", 1, 8, 1),
        (None, "gpu", 2, 8, 2),
        (None, "gpu", "auto", 8, 1),
        (0.25, "gpu", 1, 8, 0.25),
        (2, "gpu", 2, 8, 2),
        (2, "gpu", "auto", 8, 2),
        (0, "auto", 1, 8, 0),
    ],
)
def test_gpus_of_a_run_on_ray(job, given, accelerator, devices, available, expected):
    jobs = [of_trainer(job, accelerator=accelerator, devices=devices)]
    assert gpus_per_run(given, jobs, available) == expected


@pytest.mark.parametrize(
    ("given", "accelerator", "devices", "available", "sentence"),
    [
        (
            1,
            "cpu",
            1,
            8,
            r"^engine.gpus_per_run=1 is for GPUs, and trainer.accelerator=cpu takes none: leave",
        ),
        (
            2,
            "gpu",
            1,
            8,
            r"^engine.gpus_per_run=2 and trainer.devices=1 do not agree: give trainer.devices=2$",
        ),
        (0.5, "gpu", 2, 8, r"^engine.gpus_per_run=0.5 and trainer.devices=2 .* give trainer.devices=1$"),
        (
            None,
            "gpu",
            1,
            0,
            r"^trainer.accelerator=gpu asks for a GPU, and the Ray cluster gives none to a run",
        ),
        (1, "gpu", [0], 8, r"^trainer.devices=\[0\] names GPUs, which engine=ray gives out .*devices=1$"),
    ],
)
def test_gpus_that_do_not_agree_with_the_trainer(job, given, accelerator, devices, available, sentence):
    with pytest.raises(UserError, match=sentence):
        gpus_per_run(given, [of_trainer(job, accelerator=accelerator, devices=devices)], available)


def test_a_cluster_holds_as_many_runs_as_it_has_room_for():
    assert _fitting({"num_gpus": 0.25, "num_cpus": 1}, {"GPU": 2.0, "CPU": 64.0}) == 8
    assert _fitting({"num_gpus": 0, "num_cpus": 4}, {"CPU": 10.0}) == 2
    room = {"GPU": 2.0, "CPU": 64.0}
    shares = (0.1, 0.2, 0.4, 0.6, 1, 2)
    assert [_fitting({"num_gpus": share}, room) for share in shares] == [20, 10, 4, 2, 2, 1]
    sentence = (
        r"^a run takes 4 CPUs and 1 GPUs, and the Ray cluster has 2 and 0: lower engine.cpus_per_run or"
    )
    with pytest.raises(UserError, match=sentence):
        _fitting({"num_gpus": 1, "num_cpus": 4}, {"CPU": 2.0})


def test_more_runs_than_fit_are_for_a_cluster_that_grows():
    takes, room = {"num_gpus": 0, "num_cpus": 4}, {"CPU": 10.0}
    assert [_at_once(given, takes, room, grows=False) for given in (None, 1, 8)] == [2, 1, 2]
    assert [_at_once(given, takes, room, grows=True) for given in (None, 1, 8)] == [2, 1, 8]
    with pytest.raises(UserError, match=r"lower engine\.cpus_per_run"):
        _at_once(4, takes, {"CPU": 2.0}, grows=False)
    assert _at_once(4, takes, {"CPU": 2.0}, grows=True) == 4


def test_ray_that_is_not_installed_is_one_sentence(job, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "0")  # put back at the end
    settings = {"name": "ray", "address": "nowhere:1", "gpus_per_run": None}
    with pytest.raises(UserError) as error:
        choose.opened(settings, [job], 1).__enter__()
    assert str(error.value) == "engine=ray needs Ray: pip install '.[ray]', or give engine=processes"


def test_variables_of_a_launcher_are_those_by_which_a_rank_is_recognised(monkeypatch):
    for name in ranks.OF_A_LAUNCHER:
        monkeypatch.setenv(name, "2")
    assert ranks.started_elsewhere()
    for name in ranks.OF_A_LAUNCHER:
        monkeypatch.delenv(name)
    assert not ranks.started_elsewhere()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("engine=processes", "engine.runs_per_gpu=0"),
            "engine.runs_per_gpu=0 does not fit: give a whole number from 1 to 65536",
        ),
        (
            ("engine=ray", "engine.gpus_per_run=1.5"),
            "engine.gpus_per_run=1.5 does not fit: give 0, a share of a GPU such as 0.25, or a whole number "
            "of GPUs or null",
        ),
        (
            ("engine=ray", "engine.retries=-1"),
            "engine.retries=-1 does not fit: give a whole number from 0 to 65536",
        ),
        (("plan=yaml",), "plan=yaml does not fit: give one of json or null"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, words, sentence):
    with composed("train", *tiny(tmp_path, *words)) as cfg, pytest.raises(UserError) as error:
        compose.jobs(cfg)
    assert str(error.value) == sentence


def test_the_engine_is_no_part_of_a_run(job, tmp_path_factory):
    other = tiny_job(
        tmp_path_factory.mktemp("more"), "engine=processes", f"paths.log_dir={job.paths.log_dir}"
    )
    assert other.vary({"backbone.weights": job.backbone.weights}) == job.vary({"rerun": False}).vary({})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nowhere.invalid:99999"])
def test_an_address_without_a_cluster_is_one_sentence_at_once(address):
    with pytest.raises(UserError) as error:
        on_ray._check_reachable(address)
    start, _, end = str(error.value).partition(" (")
    assert start == f"engine=ray finds no Ray at {address}"
    assert end.endswith("): start one with `ray start --head`, or leave engine.address out")


def test_a_cluster_that_answers_is_not_refused():
    on_ray._check_reachable("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        on_ray._check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
