"""The Dockerfile's steps, as far as they can be run without Docker: docs/serving.md says what that leaves out."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import requests

from helpers.cli import ROOT, composed
from helpers.service import until, write_state

TEXT = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", "")
STEPS = [tuple(line.split(None, 1)) for line in TEXT.splitlines() if line]
LOCK = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}


def given(kind):
    return [words for name, words in STEPS if name == kind]


def copied():
    return [tuple(words.split()) for words in given("COPY")]


def command():
    """What a container runs: python and its arguments."""
    return [*json.loads(given("ENTRYPOINT")[0]), *json.loads(given("CMD")[0])]


def the_run_with(words):
    (found,) = (step for step in given("RUN") if words in step)
    return found


def make_serve():
    """The two commands of `make serve`."""
    recipe = re.search(r"^serve: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    return [
        shlex.split(line.replace("$(RUN)", "python").replace("$(ARGS)", "")) for line in recipe.splitlines()
    ]


def test_what_is_copied_exists_and_nothing_else_is_sent_to_docker():
    sources = [source for *names, _ in copied() for source in names]
    assert all((ROOT / source).exists() for source in sources)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line[0] == "!"} == set(sources)
    assert ignored[-2:] == ["configs/local/*", "**/__pycache__"], "settings of this machine stay on it"


def test_it_serves_what_make_serve_does_for_others_too_and_not_as_root():
    train, serve = make_serve()
    assert the_run_with("src/train.py") == shlex.join([*train, "trainer=cpu"])
    assert command() == [*serve, "host=0.0.0.0"]
    order = [name for name, _ in STEPS]
    assert order.index("USER") < STEPS.index(("RUN", the_run_with("src/train.py"))) < order.index("CMD")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", given("USER")[0])
    for script, words in (("train", train[2:]), ("serve", command()[2:])):
        with composed(script, *words) as cfg:
            assert script == "train" or (cfg.host, str(cfg.port)) == ("0.0.0.0", given("EXPOSE")[0])
    assert f"127.0.0.1:{given('EXPOSE')[0]}/health/ready" in given("HEALTHCHECK")[0]


@pytest.mark.parametrize("torch", ["cpu", "cuda", "gpu"])
def test_one_argument_chooses_the_build_of_torch(tmp_path, torch):
    uv = tmp_path / ".uv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    listed = "".join(
        f"{name}=={version} ; sys_platform == 'linux'\n    # via x\n" for name, version in LOCK.items()
    )
    (tmp_path / "listed").write_text(listed)
    uv.write_text('#!/bin/sh\nif [ "$1" = export ]; then cat listed; else echo "$@" >> asked; fi\n')
    uv.chmod(0o755)
    shell = json.loads(given("SHELL")[0])
    done = subprocess.run(
        [*shell, the_run_with("uv sync")],
        cwd=tmp_path,
        env=os.environ | {"TORCH": torch},
        capture_output=True,
        text=True,
        check=False,
    )
    if torch == "gpu":
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("TORCH=gpu is not cpu or cuda: ")
        return
    assert done.returncode == 0, done.stderr
    sync, *rest = (tmp_path / "asked").read_text().splitlines()
    assert sync.startswith("sync --frozen --no-dev --extra serve --no-install-project")
    left_out = set(re.findall(r"--no-install-package=(\S+)", sync))
    if torch == "cuda":
        assert (rest, left_out) == ([], set())
    else:
        assert left_out == {
            name
            for name in LOCK
            if name in ("torch", "torchvision", "triton") or name.startswith(("nvidia-", "cuda-"))
        }
        versions = f"torch=={LOCK['torch']} torchvision=={LOCK['torchvision']}"
        assert rest == [f"pip install --no-deps --torch-backend cpu {versions}"]


@pytest.mark.slow
def test_what_is_copied_is_enough_to_serve(tmp_path):
    for *sources, _ in copied():
        for source in sources:
            if (ROOT / source).is_dir():
                left_out = shutil.ignore_patterns("__pycache__", "local")
                shutil.copytree(ROOT / source, tmp_path / source, ignore=left_out)
            else:
                shutil.copy(ROOT / source, tmp_path)
    run = tmp_path / "logs" / "serve" / "digits" / "vpt_deep" / ("0" * 12)
    run.mkdir(parents=True)
    write_state(run / "tuned.safetensors", 1, 10)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command()[1:], "port=0"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        said = (tmp_path / "log").read_text
        until(lambda: "1 tasks on http://0.0.0.0:" in said() or process.poll() is not None, 120)
        port = re.search(r"http://0\.0\.0\.0:(\d+),", said())[1]
        words = given("HEALTHCHECK")[0].partition("CMD ")[2].replace("8000", port)
        assert subprocess.run([sys.executable, *json.loads(words)[1:]], check=False).returncode == 0
        assert (
            requests.get(f"http://127.0.0.1:{port}/", timeout=60)
            .headers["content-type"]
            .startswith("text/html")
        )
        assert [
            task["name"] for task in requests.get(f"http://127.0.0.1:{port}/v1/tasks", timeout=60).json()
        ] == ["digits"]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
