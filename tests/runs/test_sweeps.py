"""The sweep files: every point is a job, the real W&B command line runs them, and one command is one W&B run."""

import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from test_result import make

from helpers.cli import ROOT, composed, content, frozen, tiny
from helpers.tiny import tiny_model
from helpers.wandb_server import ENTITY, PROJECT, ServedSweep, grid, serving
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.methods import build_method
from visprompt.runs import compose, run_all, unit
from visprompt.runs.result import read_result, write_result
from visprompt.runs.trainer import TunedWandbLogger, close
from visprompt.tuning import protocol

FILES = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
AXES = {
    "prompt_length": {"method", "method.num_tokens"},
    "prompt_depth": {"method.depth", "method.depth_from"},
    "location": {"method.location", "method.num_tokens"},
    "init": {"method.init"},
    "pool": {"method.pool"},
    "shared": {"method.shared"},
    "data_fraction": {"method", "data.fraction"},
    "backbone_size": {"method", "backbone"},
    "e2vpt_components": {"method.num_tokens", "method.num_kv_tokens", "method.prune"},
    "lr_wd": {"recipe.lr", "recipe.weight_decay"},
}
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file):
    return yaml.safe_load(file.read_text())


def arguments(config, point):
    """What an agent passes to the program for a point."""
    given = [f"{key}={value}" for key, value in point.items()]
    at = config["command"].index("${args_no_hyphens}")
    return [*config["command"][2:at], *given, *config["command"][at + 1 :]]


def test_there_is_a_sweep_for_every_ablation():
    assert {file.stem: set(read(file)["parameters"]) for file in FILES} == AXES


@every_file
def test_a_sweep_says_what_it_does_and_chooses_by_validation_alone(file):
    text, config = file.read_text(), read(file)
    header = [line for line in text.replace("\n#   ", " ").splitlines() if line.startswith("#")]
    assert [line[:12].strip() for line in header[:4]] == ["# command:", "# ablates:", "# time:", "# VTAB:"]
    assert f"wandb sweep configs/sweep/{file.name} " in header[0]
    assert f"{len(grid(config))} points" in header[2]
    assert (config["name"], config["program"], config["project"]) == (file.stem, "src/train.py", PROJECT)
    assert config["metric"] == {"name": "val/acc", "goal": "maximize"}
    assert config["command"][:4] == ["python", "${program}", "split=tune", "logger=wandb"]
    assert "test/" not in text
    for parameter in config["parameters"].values():
        for value in parameter.get("values", [parameter.get("value")]):
            assert isinstance(value, str | int | float), "a null is written as the word"
            assert "," not in str(value), "Hydra would take it for a sweep of its own"


@pytest.mark.slow
@every_file
def test_every_point_is_a_job_whose_method_builds(file, monkeypatch):
    config = read(file)
    backbone = tiny_model(depth=6)
    seen = set()
    for point in grid(config):
        given = arguments(config, point)
        given += compose.data_of_tasks("train", [[one] for one in given])
        with composed("train", *given) as cfg:
            (job,) = compose.jobs(cfg)
        assert (job.split, job.task) == ("tune", "digits_loc")
        options = dict(job.method)
        build_method(options.pop("name"), ViT(backbone), **options)
        seen.add(job.as_yaml())
        chosen = {key: value for key, value in point.items() if "." in key}
        assert {key: attrgetter(key)(job) for key in chosen} == chosen
    assert len(seen) == len(grid(config))


SHORT = (
    "+trainer.limit_train_batches=2",
    "+trainer.limit_val_batches=2",
    "recipe.epochs=2",
    "callbacks=none",
)
OFFLINE = ("split=tune", "logger=wandb", "logger.wandb.offline=true")


@pytest.fixture
def begun(begun, monkeypatch):
    """An agent's W&B runs that were begun: the id asked for, config, figures and how they ended."""
    monkeypatch.setenv("WANDB_RUN_ID", "agent-7")
    monkeypatch.setattr(unit.console, "_width", 300)
    return begun


def train(logs, *arguments):
    with composed("train", *tiny(logs, *SHORT, *OFFLINE, *arguments)) as cfg:
        return run_all.train(cfg)


def results(logs):
    return {path.parts[-4]: read_result(path.parent) for path in logs.rglob("result.json")}


@frozen
def test_several_tasks_under_an_agent_are_one_wandb_run(tmp_path, begun):
    score = train(tmp_path, "tasks=[digits,digits_loc]", "data='demo/digits'")
    (one,), found = begun, results(tmp_path)
    assert found.keys() == {"digits", "digits_loc"}
    assert (one.get("id"), one["exit_code"], one["job_type"]) == (None, 0, "tune")
    assert one["name"] == "2 tasks/vpt_deep"
    for task, result in found.items():
        for name, value in result.metrics.items():
            assert one["logged"][f"{task}/{name}"] == value
    assert (
        one["logged"]["val/acc"] == score == sum(result.metrics["val/acc"] for result in found.values()) / 2
    )
    assert "val/count" not in one["logged"]
    config = one["config"]
    assert config["tasks"] == ["digits", "digits_loc"]
    assert (config["method.num_tokens"], config["tuned.depth"], config["recipe.epochs"]) == (4, 2, 2)
    assert "task" not in config, "the tasks do not agree in it"
    assert train(tmp_path, "tasks=[digits,digits_loc]", "data='demo/digits'") == score
    assert begun[1]["logged"] == one["logged"], "what is finished is reported all the same"


@frozen
def test_several_tasks_under_an_agent_upload_the_state_of_each(tmp_path, begun, monkeypatch):
    uploaded = []
    monkeypatch.setattr(TunedWandbLogger, "log_state", lambda _, folder: uploaded.append(folder))
    train(tmp_path, "tasks=[digits,digits_loc]", "data='demo/digits'")
    assert sorted(uploaded) == sorted(path.parent for path in tmp_path.rglob("result.json"))


@frozen
def test_a_task_that_failed_leaves_no_mean(tmp_path, begun, monkeypatch):
    prepare = unit.prepare

    def fails(cfg):
        if cfg.task == "digits_loc":
            raise UserError("no ink: buy some")
        return prepare(cfg)

    monkeypatch.setattr(unit, "prepare", fails)
    with pytest.raises(UserError, match=r"^digits_loc/vpt_deep: no ink: buy some \(1 of 2 runs failed\)$"):
        train(tmp_path, "tasks=[digits,digits_loc]", "data='demo/digits'")
    (one,) = begun
    assert one["exit_code"] == 1
    assert one["logged"]["digits/val/acc"] == results(tmp_path)["digits"].metrics["val/acc"]
    assert "val/acc" not in one["logged"]


@pytest.mark.slow
@frozen
def test_under_an_agent_a_diverged_run_is_a_point_of_the_grid(tmp_path, begun):
    wild = ("recipe.optimizer=sgd", "recipe.lr=1e30", "recipe.head_lr=null")
    assert train(tmp_path, "tasks=[digits,digits_loc]", "data='demo/digits'", *wild) == float("-inf")
    assert [(one["exit_code"], one["logged"]) for one in begun] == [(1, {})]
    assert train(tmp_path, *wild) == float("-inf")
    assert train(tmp_path, *wild) == float("-inf")
    assert [one["exit_code"] for one in begun] == [1, 1, 1], "together, trained, stored"


def test_tune_is_no_point_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent-7")
    with (
        composed("tune", *tiny(tmp_path)) as cfg,
        pytest.raises(UserError, match=r"^src/tune\.py tries a grid and"),
    ):
        protocol.tune(cfg)


@frozen
@pytest.mark.slow
def test_chains_of_several_tasks_under_an_agent_are_one_wandb_run(tmp_path, begun):
    options = ("method=e2vpt", "method.num_tokens=4", "method.num_kv_tokens=2", "method.num_segments=8")
    masks = ("method.prune_tokens=[50]", "method.prune_segments=[50]")
    score = train(tmp_path, "tasks=[digits,digits_loc]", "data='demo/digits'", *options, *masks)
    (one,) = begun
    assert len(list(tmp_path.rglob("result.json"))) == 4
    assert one["logged"]["val/acc"] == score
    assert {"digits/val/acc", "digits_loc/val/acc"} <= one["logged"].keys()


def wandb_cli(server, folder, *arguments):
    """The installed command line of W&B, with `python` that of these tests, as an agent finds it on PATH."""
    scripts = Path(sys.executable).parent
    env = (
        os.environ | server.env(folder) | {"WANDB_SILENT": "false", "PATH": f"{scripts}:{os.environ['PATH']}"}
    )
    done = subprocess.run(
        [str(scripts / "wandb"), *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def server():
    with serving() as one:
        yield one
        assert one.unknown == []


def two_points(folder):
    """prompt_depth.yaml with two points and a tiny network, written to a folder."""
    config = read(ROOT / "configs" / "sweep" / "prompt_depth.yaml")
    config["parameters"] = {"method.depth_from": {"value": "last"}, "method.depth": {"values": [1, 2]}}
    given = [
        *config["command"][:-1],
        *tiny(folder / "logs", *SHORT, "data=demo/digits"),
        config["command"][-1],
    ]
    config["command"] = [argument for argument in given if argument != "tasks=digits_loc"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


def unlogged(folder):
    """Hashes of a run's files but those of W&B."""
    return {name: digest for name, digest in content(folder).items() if not name.startswith("wandb/")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_command_line_runs_a_sweep_and_shows_a_finished_point_to_another(server, tmp_path):
    config = two_points(tmp_path)
    said = wandb_cli(server, tmp_path, "sweep", str(tmp_path / "sweep.yaml"))
    assert server.sweeps["sweep0"].config == config
    path = re.search(r"wandb agent (\S+/sweep0)", said)[1]
    wandb_cli(server, tmp_path, "agent", "--count", "2", path)
    assert list(server.runs) == ["sweep0-1-0", "sweep0-1-1"], "the ids that the agent gave"
    folders = {read_result(path.parent).tuned["depth"]: path.parent for path in tmp_path.rglob("result.json")}
    for depth, run in zip((1, 2), server.runs.values(), strict=True):
        result = read_result(folders[depth])
        assert (run.sweep, run.exit_code) == ("sweep0", 0)
        assert run.summary["val/acc"] == result.metrics["val/acc"]
        assert [row["val/acc"] for row in run.history if "val/acc" in row][1:] == [result.metrics["val/acc"]]
        assert not any(name.startswith("test/") for name in run.summary)
        fields = (
            "method.depth",
            "method.depth_from",
            "method.num_tokens",
            "method.name",
            "depth",
            "num_tokens",
        )
        assert [run.config[name] for name in fields] == [depth, "last", 4, "vpt_deep", depth, 4]
        assert run.config["tuned.share"] == result.tuned["share"]
    states = {
        artifact.name: artifact for artifact in server.artifacts.values() if artifact.type == "tuned-state"
    }
    assert all(artifact.committed for artifact in states.values())
    for folder in folders.values():
        files = states[f"digits-vpt_deep-{folder.name}"].files
        assert files == {name: (folder / name).read_bytes() for name in STATE}
    before = unlogged(folders[1])
    server.sweeps["again"] = ServedSweep(config, [{"method.depth_from": "last", "method.depth": 1}])
    wandb_cli(server, tmp_path, "agent", "--count", "1", f"{ENTITY}/{PROJECT}/again")
    first, _, again = server.runs.values()
    assert (again.sweep, again.exit_code) == ("again", 0)
    assert again.summary["val/acc"] == first.summary["val/acc"]
    assert unlogged(folders[1]) == before


@frozen
@pytest.mark.filterwarnings("ignore:The number of training batches .* smaller than the logging")
@pytest.mark.slow
def test_an_offline_run_syncs_later_under_the_same_id(server, tmp_path):
    train(tmp_path)
    (path,) = tmp_path.rglob("result.json")
    (offline,) = path.parent.glob(f"wandb/offline-run-*-{path.parent.name}")
    wandb_cli(server, tmp_path, "sync", str(offline))
    ((name, run),) = server.runs.items()
    assert name == path.parent.name
    assert run.summary["val/acc"] == read_result(path.parent).metrics["val/acc"]
    assert run.config["method.num_tokens"] == 4


STATE = ("tuned.safetensors", "result.json", "config.yaml")


def finished(folder):
    """A run's folder with the files that go into an artifact, by name."""
    folder.mkdir(parents=True)
    for name, text in (("tuned.safetensors", b"prompts"), ("config.yaml", b"seed: 1")):
        (folder / name).write_bytes(text)
    write_result(folder, make(tuned={"bytes": len(b"prompts")}))
    return {name: (folder / name).read_bytes() for name in STATE}


def ended(folder, status="success", artifact=True, **state):
    """The artifacts that a logger uploads when it is closed."""
    taken = []
    usual = {"offline": False, "disabled": False, "log_artifact": taken.append}
    run = SimpleNamespace(**usual | state, finish=lambda exit_code: taken.append(exit_code))
    close(TunedWandbLogger(artifact=artifact, experiment=run), status, folder)
    assert taken.pop() == int(status == "failed"), "after the artifact"
    return taken


def test_the_tuned_state_is_an_artifact_while_online(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    folder = tmp_path / "my images" / "vpt_deep" / "0123"
    held = finished(folder)
    (artifact,) = ended(folder)
    assert (artifact.type, artifact.name) == ("tuned-state", "my_images-vpt_deep-0123")
    files = artifact.manifest.entries
    assert {name: Path(entry.local_path).read_bytes() for name, entry in files.items()} == held
    assert ended(folder, offline=True) == ended(folder, disabled=True) == ended(folder, artifact=False) == []
    assert ended(folder, "failed") == ended(None) == ended(tmp_path) == []


def test_a_state_that_is_not_the_result_s_is_not_uploaded(tmp_path, caplog):
    folder = tmp_path / "digits" / "vpt_deep" / "0123"
    finished(folder)
    (folder / "tuned.safetensors").write_bytes(b"cut")
    assert ended(folder) == []
    assert caplog.messages == [
        f"{folder} is not uploaded to W&B: its result and its tuned state do not belong together"
    ]


def test_a_server_that_takes_no_artifact_spoils_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    finished(tmp_path / "digits" / "vpt_deep" / "0123")

    def refuses(_):
        raise wandb.errors.CommError("no room")

    assert ended(tmp_path / "digits" / "vpt_deep" / "0123", log_artifact=refuses) == []
    assert caplog.messages[-1].endswith("/digits/vpt_deep/0123 could not be uploaded to W&B: no room")
