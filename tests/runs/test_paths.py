"""What users' paths stand for: `~`, relative ones under Hydra's chdir, places that cannot be written to."""

import os
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, read_write
from test_compose import said
from test_words import became

from helpers.cli import composed
from visprompt.runs import compose
from visprompt.runs.paths import PATHS, expand_paths


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def config(value):
    """A config with a value at every path."""
    cfg = OmegaConf.create()
    for key in PATHS:
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def values(cfg):
    return [OmegaConf.select(cfg, key) for key in PATHS]


def test_a_tilde_is_written_out_in_every_path_of_a_config(home):
    cfg = config("~/birds")
    expand_paths(cfg)
    assert set(values(cfg)) == {f"{home}/birds"}
    cfg = config(["~/a", "b"])
    expand_paths(cfg)
    assert all(list(value) == [f"{home}/a", "b"] for value in values(cfg))


@pytest.mark.parametrize("value", ["birds", "a/~", "auto", None, ""])
def test_other_values_stay_as_they_are(value):
    cfg = config(value)
    expand_paths(cfg)
    assert set(values(cfg)) == {value}


def test_relative_paths_stay_where_the_command_was_typed_under_chdir(home):
    with composed("train", "hydra.job.chdir=true", "paths.data_dir=data", "paths.log_dir='~/logs'") as cfg:
        hydra = HydraConfig.get()
        with read_write(hydra):
            hydra.runtime.cwd = "/typed/here"
        (job,) = compose.jobs(cfg)
        assert (job.paths.data_dir, job.paths.log_dir) == ("/typed/here/data", f"{home}/logs")
        assert job.backbone.weights is None
        (job,) = compose.jobs(cfg, ["data=folder", "data.root=birds"])
        assert (job.data.root, job.data.store_dir) == ("/typed/here/birds", "/typed/here/data/stores")


def test_a_relative_path_is_left_relative_without_chdir():
    with composed("train", "data=folder", "data.root=birds") as cfg:
        assert compose.jobs(cfg)[0].data.root == "birds"


def test_hydras_folder_lies_below_the_log_dir_that_a_tilde_names(home, monkeypatch):
    (argument,) = became(monkeypatch, "report", "paths.log_dir=~/logs")
    assert argument == f"paths.log_dir={home}/logs"
    with composed("report", "paths.log_dir='~/logs'"):
        assert Path(HydraConfig.get().run.dir).parent == home / "logs" / "hydra"
        assert Path(HydraConfig.get().sweep.dir).parent == home / "logs" / "hydra"


@pytest.mark.parametrize("script", ["train", "tune", "report"])
@pytest.mark.parametrize("more", [(), ("-m",)])
def test_a_log_dir_that_is_a_file_or_below_one_is_said_before_anything_is_made(
    capsys, monkeypatch, home, script, more
):
    (home / "file").write_text("x")
    for name in ("file", "file/below"):
        assert said(capsys, monkeypatch, script, f"paths.log_dir={home}/{name}", *more) == (
            f"error: paths.log_dir={home}/{name} cannot hold what is written: {home}/file is a file; give "
            "paths.log_dir= a folder that you may write to\n"
        )
    assert [path.name for path in home.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_to_is_said(capsys, monkeypatch, home):
    assert said(capsys, monkeypatch, "train", "paths.log_dir=/proc/logs") == (
        "error: paths.log_dir=/proc/logs cannot hold what is written: /proc/logs/hydra cannot be made (No "
        "such file or directory); give paths.log_dir= a folder that you may write to\n"
    )
    assert said(capsys, monkeypatch, "train", "hydra.run.dir=/proc/logs/x").startswith(
        "error: hydra.run.dir=/proc/logs/x cannot hold what is written: /proc/logs cannot be made ("
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert said(capsys, monkeypatch, "train", f"paths.log_dir={home}/logs") == (
        f"error: paths.log_dir={home}/logs cannot hold what is written: {home}/logs/hydra cannot be written "
        "to; give paths.log_dir= a folder that you may write to\n"
    )


def test_nothing_is_made_to_show_something(monkeypatch, home):
    with pytest.raises(SystemExit):
        became(monkeypatch, "train", f"paths.log_dir={home}/logs", "--help")
    assert not list(home.iterdir())
    became(monkeypatch, "train", f"paths.log_dir={home}/logs")
    assert [path.name for path in home.iterdir()] == ["logs"]
