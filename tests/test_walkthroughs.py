"""The pages that add a method and a dataset, followed to the letter in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest

from helpers.cli import ROOT, tiny

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def steps(page):
    """What a page says to do: for each of its code blocks the kind, the file it is for, and its text."""
    text = (ROOT / "docs" / page).read_text()
    file = None
    blocks = list(BLOCK.finditer(text))
    for before, block in pairwise([None, *blocks]):
        told = text[before.end() if before else 0 : block.start()]
        for word, name in re.findall(r"\b(Write|In) `([\w./-]+)`", told):
            assert (ROOT / name).exists() == (word != "Write"), name
            file = name
        yield block[1], file, block[2]


def copy(folder):
    """Copy the repository's files, also those that are not committed yet."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def patch(path, diff):
    """Put the lines without - in the place of those without +, which must be in one place of the file only."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


def follow(page, folder):
    """Do what a page says, and return the commands that it shows."""
    commands = []
    for kind, file, text in steps(page):
        if kind == "diff":
            patch(folder / file, text)
        elif kind:
            assert not (folder / file).exists()
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        else:
            commands += text.splitlines()
    return commands


def run(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def make_docs(folder, only=""):
    """Run the commands of `make docs` with this Python, or only those whose page has a word in its name."""
    printed = ""
    rule = (folder / "Makefile").read_text().partition("\ndocs:")[2].partition("\n\n")[0]
    for line in rule.splitlines()[1:]:
        command, _, target = line.strip().removeprefix("$(RUN) ").removesuffix(" $(ARGS)").partition(" > ")
        if only in target:
            printed = run(folder, *command.split())
            if target:
                (folder / target).write_text(printed)
    return printed


def check(folder):
    """Run what is quick of `make check`: mypy takes minutes where it has no cache."""
    run(folder, "-m", "ruff", "check")
    run(folder, "-m", "ruff", "format", "--check")


OF_ALL_METHODS = ("tests/test_docs.py", "tests/test_benchmarks.py")
OF_EACH_METHOD = (
    *(
        "tests/models/methods/test_battery.py",
        "tests/models/methods/test_families.py",
        "tests/models/test_ensemble.py",
    ),
    *(
        "tests/models/backbones/test_eva.py",
        "tests/models/backbones/test_swin.py",
        "tests/runs/test_identity.py",
    ),
    *("tests/models/backbones/test_convnets.py", "tests/runs/test_values.py", "tests/test_configs.py"),
    *("tests/test_experiments.py", "tests/tuning/test_dry_run.py"),
)
OF_ALL_TASKS = (
    "tests/test_docs.py",
    "tests/data/catalog/test_catalog.py",
    "tests/data/catalog/test_records.py",
)
OF_EACH_TASK = ("tests/data/test_miniature.py", "tests/data/test_datamodules.py", "tests/test_configs.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some three minutes on an idle core
def test_a_method_is_added_as_its_page_says(tmp_path):
    folder = copy(tmp_path / "copy")
    commands = follow("add-a-method.md", folder)
    assert commands[:3] == ["make docs", "make check", "make test"]
    make_docs(folder)
    check(folder)
    run(
        folder,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "tests/models/methods/test_residual.py",
        *OF_ALL_METHODS,
    )
    run(folder, "-m", "pytest", "-q", "-x", "-k", "vpt_residual", *OF_EACH_METHOD)
    shown = run(folder, *commands[3].split()[1:], "dry_run=true", f"paths.log_dir={tmp_path}", "trainer=cpu")
    assert "vpt_residual" in shown


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some three minutes on an idle core
def test_a_dataset_is_added_as_its_page_says(tmp_path):
    folder = copy(tmp_path / "copy")
    commands = follow("add-a-dataset.md", folder)
    assert commands[:3] == ["make docs", "make check", "make test"]
    assert "tf_flowers" in make_docs(folder, "datasets")
    check(folder)
    run(folder, "-m", "pytest", "-q", "-x", "-m", "not slow", *OF_ALL_TASKS)
    run(folder, "-m", "pytest", "-q", "-x", "-k", "tf_flowers", *OF_EACH_TASK)
    main, data = "tests/helpers/miniature_main.py", str(tmp_path / "data")
    words = tiny(tmp_path / "logs", *commands[4].split()[2:], "recipe.epochs=1", "recipe.warmup_epochs=0")
    run(folder, main, data, "raw", "tf_flowers", "train.py", *words, f"paths.data_dir={data}")
    assert list((tmp_path / "logs").glob("tf_flowers/*/*/result.json"))
