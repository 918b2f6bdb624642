"""Several processes at once, Hydra's launchers, and a grid whose points were made elsewhere or diverge."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hydra import compose as hydra_compose

from helpers.cli import call, composed, equal, frozen, tensors, tiny
from helpers.leases import at_work
from visprompt.errors import UserError
from visprompt.runs import compose, run, run_all
from visprompt.runs.engine import local
from visprompt.runs.result import read_result
from visprompt.tuning import protocol

pytestmark = frozen
SEEDS = (1, 2)
GRID = ("split=tune", "seed=42")


def arguments(logs, *more):
    return tiny(logs, "callbacks=none", "recipe.epochs=2", *more)


def tune(logs, *more):
    given = arguments(logs, f"table={logs}/table.md", "seeds=[1]", *more)
    with composed("tune", *given) as cfg:
        return protocol.tune(cfg)


def train(logs, *more):
    with composed("train", *arguments(logs, *more)) as cfg:
        return run_all.train(cfg)


def results(logs):
    """Results by seed and learning rate, with the folder of each."""
    found = [(read_result(path.parent), path.parent) for path in sorted(logs.rglob("result.json"))]
    return {(result.seed, result.recipe["lr"]): (result, folder) for result, folder in found}


def by_seed(logs):
    """Tuned states by seed; each says that it was made with the same number of threads."""
    found = results(logs)
    assert {result.machine["threads"] for result, _ in found.values()} == {1}
    return {seed: tensors(folder) for (seed, _), (_, folder) in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The tuned state of each seed, trained by a process that has the machine for itself."""
    logs = tmp_path_factory.mktemp("alone")
    for seed in SEEDS:
        done = call("train", *arguments(logs, f"seed={seed}"))
        assert done.returncode == 0, done.stderr
    return by_seed(logs)


def same(states, alone):
    return states.keys() == alone.keys() and all(equal(states[seed], alone[seed]) for seed in alone)


@pytest.mark.slow
def test_processes_that_share_a_device_leave_the_bits_of_each_alone(tmp_path, alone):
    def one(seed):
        return call("train", *arguments(tmp_path, f"seed={seed}"))

    arguments(tmp_path)  # writes the weights, once for both
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        for done in pool.map(one, SEEDS):
            assert done.returncode == 0, done.stderr
    assert not equal(alone[1], alone[2])
    assert same(by_seed(tmp_path), alone)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_run_jobs_of_their_own_and_leave_the_same_bits(tmp_path, alone, launcher):
    """submitit_local starts jobs as submitit_slurm does, as processes of this machine instead of a cluster's."""
    done = call("train", *arguments(tmp_path, "seed=1,2", f"hydra/launcher={launcher}"), "-m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(by_seed(tmp_path), alone)


@pytest.mark.slow
def test_a_job_that_fails_under_a_launcher_is_said_and_stops_no_other(tmp_path):
    given = arguments(tmp_path, "method.depth=3,1", "hydra/launcher=joblib")
    done = call("train", *given, "-m")
    assert done.returncode != 0
    assert (
        "error: digits/vpt_deep: method.depth=3 does not fit: give 1 to 2, the backbone's blocks"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert len(results(tmp_path)) == 1


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_launchers_compose(launcher):
    with compose.composing():
        cfg = hydra_compose("train", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.rpartition(".")[2].removesuffix(
        "Launcher"
    ).lower() in launcher.replace("_", "")


@pytest.fixture
def trained(monkeypatch):
    """Seed and learning rate of every run that is trained in this process."""
    seen, train = [], run._train

    def note(one, *rest):
        seen.append((one.job.seed, one.job.recipe.lr))
        return train(one, *rest)

    monkeypatch.setattr(run, "_train", note)
    return seen


@pytest.mark.slow
def test_points_of_a_multirun_are_those_of_the_protocol(tmp_path, trained):
    given = arguments(tmp_path, *GRID, "recipe.lr=0.2,0.4", "hydra/launcher=joblib")
    done = call("train", *given, "-m")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path).keys() == {(42, 0.2), (42, 0.4)}
    tune(tmp_path)
    ((seed, _),) = trained
    assert seed == 1, "of the grid nothing was missing"


def test_the_protocol_trains_the_points_that_are_missing(tmp_path, trained):
    train(tmp_path, *GRID, "recipe.lr=0.4")
    del trained[:]
    tune(tmp_path)
    (point, (seed, _)) = trained
    assert point == (42, 0.2)
    assert seed == 1


@pytest.mark.slow
def test_a_point_that_another_process_works_on_comes_last_and_the_table_is_whole(
    tmp_path, trained, monkeypatch, capsys
):
    with composed("train", *arguments(tmp_path, *GRID, "recipe.lr=0.2")) as cfg:
        (job,) = compose.jobs(cfg)
    folder = run.prepare(job).folder
    with at_work(folder, "process 7 on another-machine") as other:
        # it was killed
        monkeypatch.setattr(local, "time", SimpleNamespace(sleep=lambda seconds: other.release()))
        tune(tmp_path)
    assert trained == [(42, 0.4), (42, 0.2), (1, trained[-1][1])], (
        "no final run before the choice from the whole grid"
    )
    assert (
        "digits/vpt_deep: process 7 on another-machine is working on it: waiting until later\n"
        in capsys.readouterr().out
    )


def test_a_point_that_diverges_is_a_result_and_never_chosen(tmp_path, trained):
    """The paper's grid begins at 50, at which full fine-tuning by SGD does not live long."""
    wild = (
        "method=full",
        "recipe.optimizer=sgd",
        "recipe.head_lr=null",
        "++recipe.grid={recipe.lr:[50.0,0.01]}",
    )
    score = tune(tmp_path, *wild)
    assert trained == [(42, 50), (42, 0.01), (1, 0.01)]
    found = results(tmp_path)
    lost, folder = found[42, 50]
    assert (lost.status, lost.score) == ("diverged", float("-inf"))
    assert lost.diverged_step is not None
    assert not (folder / "tuned.safetensors").exists()
    assert tune(tmp_path, *wild) == score == found[1, 0.01][0].metrics["test/acc"]
    assert len(trained) == 3, "a diverged point is not run again"


def test_a_grid_of_diverged_points_has_no_final_run(tmp_path, trained):
    wild = (
        "method=full",
        "recipe.optimizer=sgd",
        "recipe.head_lr=null",
        "++recipe.grid={recipe.lr:[50.0,60.0]}",
    )
    run = r"digits/full recipe\.lr=50\.0 split=tune seed=42"
    with pytest.raises(UserError, match=rf"^{run}: the loss was not finite at step \d+: lower"):
        tune(tmp_path, *wild)
    assert [seed for seed, _ in trained] == [42, 42]
