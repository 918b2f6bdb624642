"""`pip install .` in a bare environment: the package with all its files, at work outside the repository."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOWEST = re.search(
    r">=([\d.]+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"][0]
)[1]
PROGRAM = """
import pathlib, sys, torch, visprompt
from visprompt.data.catalog import TASKS
from visprompt.reports import page, published
classifier = visprompt.build("vit64_tiny_imagenet_100", "vpt_deep", 7, num_tokens=2)
print(tuple(classifier(torch.zeros(1, 3, 64, 64)).shape))
print(pathlib.Path(visprompt.__file__).parent)
"""


def run(*command, **options):
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=200, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("build", ["newest", "lowest"])
def test_pip_installs_all_of_the_package(tmp_path, build):
    """With the newest build backend that pip finds, and with the oldest that pyproject.toml allows."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path / 'env/bin'}:{environment['PATH']}"
    made = run(sys.executable, "-m", "venv", tmp_path / "env")
    assert made.returncode == 0, made.stderr
    pip = (tmp_path / "env/bin/python", "-m", "pip", "install", "--quiet")
    steps = [(*pip, "--no-deps", ROOT)]
    if build == "lowest":
        steps = [(*pip, f"uv_build=={LOWEST}"), (*pip, "--no-deps", "--no-build-isolation", ROOT)]
    for step in steps:
        done = run(*step, env=environment, cwd=tmp_path)
        assert done.returncode == 0, f"pip could not install: it needs a package index. {done.stderr}"
    # the dependencies alone: no .pth file is read there
    environment["PYTHONPATH"] = sysconfig.get_path("purelib")
    done = run(tmp_path / "env/bin/python", "-c", PROGRAM, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shape, folder = done.stdout.splitlines()
    assert shape == "(1, 7)"
    assert Path(folder).is_relative_to(tmp_path)
    installed = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    tracked = run(
        "git", "ls-files", "-co", "--exclude-standard", "src/visprompt", cwd=ROOT
    ).stdout.splitlines()
    expected = {name.removeprefix("src/visprompt/") for name in tracked}
    assert {name for name in installed if "__pycache__" not in name} == expected
