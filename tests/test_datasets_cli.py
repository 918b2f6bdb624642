"""Training and prepare.py through the command line, on miniatures in every kind of container."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli import call, tiny
from visprompt.data.catalog import SUITES, TASKS

MAIN = Path(__file__).parent / "helpers" / "miniature_main.py"
# tar with a zip around it, tar, .mat, PNG and JPEG in tar, gzipped HDF5, zip, TFRecords, HDF5, smallNORB's
# binary
CONTAINERS = "caltech101,dtd,oxford_flowers102,svhn,sun397,patch_camelyon,eurosat,kitti,dmlab,dsprites_ori,smallnorb_ele"


def on_miniatures(folder, source, tasks, script, *arguments):
    command = [
        sys.executable,
        str(MAIN),
        str(folder),
        source,
        tasks,
        script,
        *arguments,
        f"paths.data_dir={folder}",
    ]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=250, check=False)


def train(folder, source, tasks, *arguments):
    options = tiny(
        folder / "logs", f"tasks=[{tasks}]", "recipe.epochs=1", "recipe.warmup_epochs=0", *arguments
    )
    done = on_miniatures(
        folder, source, tasks, "train.py", f"data.source={source}", "callbacks=none", *options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {
        path.parts[-4]: json.loads(path.read_text()) for path in (folder / "logs").glob("*/*/*/result.json")
    }
    assert set(results) == set(tasks.split(","))
    return results, done


@pytest.mark.slow
def test_an_epoch_on_each_kind_of_container(tmp_path):
    results, _ = train(tmp_path, "raw", CONTAINERS)
    for task, result in results.items():
        assert result["status"] == "finished"
        assert (result["data"]["source"], result["data"]["form"]) == ("raw", "lossless")
        assert result["data"]["sizes"]["train800"] == 24
        # the side that the tiny network reads
        kept = TASKS[task].native if (TASKS[task].native or 0) <= 64 else None
        assert result["data"]["preprocessing"]["native"] == kept
        assert 0 <= result["metrics"]["test/acc"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("source", ["prepared", "hf"])
def test_an_epoch_on_copies_of_cifar(tmp_path, source):
    root = [f"data.root={tmp_path / 'mirror'}"] if source == "hf" else []
    results, done = train(tmp_path, source, "cifar", *root)
    lossy = source == "prepared"
    assert results["cifar"]["data"]["form"] == ("lossy" if lossy else "lossless")
    assert done.stderr.count("is read from JPEG files") + done.stdout.count("is read from JPEG files") == int(
        lossy
    )


@pytest.mark.slow
def test_an_epoch_on_a_fine_grained_dataset(tmp_path):
    results, _ = train(tmp_path, "raw", "cub200", "data.fraction=0.5")
    data = results["cub200"]["data"]
    assert data["fraction"] == 0.5
    assert data["preprocessing"]["short_side"] == 73
    assert data["sizes"]["test"] == 24


@pytest.mark.slow
def test_prepare_says_terms_first_and_does_not_stop_at_a_failure(tmp_path):
    done = on_miniatures(tmp_path, "raw", "svhn", "prepare.py", "tasks=[nabirds,svhn]")
    assert done.returncode == 2
    assert done.stdout.index("terms and sizes") < done.stdout.index("nabirds: left undone")
    assert "svhn: ready after" in done.stdout
    assert "CC0" in done.stdout or "non-commercial" in done.stdout
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 2 tasks are not prepared: nabirds: ")
    assert "https://dl.allaboutbirds.org/nabirds" in error


@pytest.mark.slow
def test_verify_lists_what_is_missing_without_a_download(tmp_path):
    done = call("prepare", "tasks=vtab_all", "verify=true", f"paths.data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "0 of 19 tasks are prepared" in done.stdout
    for task in SUITES["vtab_all"]:
        assert f"then: python src/prepare.py tasks={task}" in done.stdout
        for file in TASKS[task].files:
            assert file.name in done.stdout
            assert all(url in done.stdout for url in file.urls)
            assert file.sha256 in done.stdout
    assert "kaggle competitions download" in done.stdout
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: tasks has no default: give tasks=..."),
        (("tasks=cifar101",), "error: unknown task 'cifar101': did you mean cifar"),
        (("tasks=dtd", "source=tfds"), "error: unknown source 'tfds': choose one of hf, prepared, raw"),
        (
            ("tasks=dtd", "image_size=big"),
            "error: image_size=big does not fit: give a whole number from 1 to 16384",
        ),
        (
            ("tasks=cub200", "source=prepared"),
            "error: cub200 has no source 'prepared': FGVC datasets are read with",
        ),
        (("tasks=demo",), "error: digits needs no preparation: nothing to do"),
        (("tasks=dtd", "imagesize=224"), "error: unknown key 'imagesize': did you mean image_size"),
    ],
)
def test_wrong_words_of_prepare(arguments, message, tmp_path):
    done = call("prepare", *arguments, f"paths.data_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.strip().startswith(message)
