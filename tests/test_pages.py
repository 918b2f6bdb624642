"""Every command that a page shows is taken by its entry point.

Trained ones as dry runs, the others for real.
"""

import re
import shlex
import subprocess

import numpy as np
import pytest
from PIL import Image

from helpers.cli import ROOT, call_all, composed, frozen, tiny
from helpers.miniatures.masks import write_masks
from visprompt.data.sources import digits
from visprompt.runs import compose
from visprompt.tuning import dry_run
from visprompt.tuning.dry_run.pace import Pace

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "notebooks" / "README.md"]
SHOWN = [
    (
        page.name,
        line.partition("  #")[0].partition(" > ")[0].strip().removeprefix("srun "),
    )  # which starts a process for each device
    for page in PAGES
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
# of the pages that add a method and a dataset, which tests/test_walkthroughs.py follows
OTHERS = {"method=vpt_residual", "tasks=tf_flowers", "data=other/tf_flowers"}
OTHERS |= {"data.dataset=USER/NAME"}  # which would be downloaded; see tests/data/sources/test_hf_own.py


def shown(start):
    return sorted({line for _, line in SHOWN if line.startswith(start) and not OTHERS & set(line.split())})


def arguments(line, folder):
    """Arguments of a shown command, with the first of several values and a place for each word in capitals."""
    own = "masked" if "data=segmentation/folder" in line else "images"
    places = {"PATH": folder / own, "FILE": folder / "labels.csv", "FILE_OR_FOLDER": folder / "none.pth"}
    given = [argument for argument in shlex.split(line)[2:] if argument != "-m"]
    for word, place in places.items():
        given = [re.sub(rf"={word}$", f"={place}", argument) for argument in given]
    return [argument if "[" in argument else argument.partition(",")[0] for argument in given]


@pytest.fixture
def folder(tmp_path):
    for number in range(8):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    write_masks(tmp_path / "masked")
    lines = [f"class{number % 2}/{number}.png,class{number % 2}" for number in range(8)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    return tmp_path


# each takes a while, and tests/tuning/test_dry_run.py counts too
@pytest.mark.slow
@pytest.mark.parametrize("line", [*shown("python src/train.py"), *shown("python src/tune.py")])
def test_what_trains_composes_and_is_counted(line, folder, monkeypatch, capsys):
    monkeypatch.setattr(
        dry_run, "measure_pace", lambda *_: Pace(device="a machine", step=1.0, image=0.01, kept=0.01)
    )
    script = "train" if "src/train.py" in line else "tune"
    paths = [f"paths.{name}={folder / 'new'}" for name in ("log_dir", "data_dir")]
    with composed(script, *arguments(line, folder), *paths, "dry_run=true") as cfg:
        getattr(dry_run, script)(cfg)
    printed = capsys.readouterr().out
    assert "time left" in printed
    assert not (folder / "new").exists()


@pytest.mark.parametrize("line", shown("python src/prepare.py"))
def test_what_prepares_is_planned(line, folder):
    with composed("prepare", *arguments(line, folder)) as cfg:
        assert compose.plans(cfg)


@frozen
@pytest.mark.slow
@pytest.mark.timeout(900)  # some two minutes on an idle core
def test_what_reads_a_run_runs(folder):
    logs = folder / "logs"
    short = ("callbacks=none", "recipe.epochs=1", "recipe.warmup_epochs=0")
    masks = ("data=demo/digits_masks", "method=linear", "data.fraction=0.1")
    trained = call_all([("train", tiny(logs, *short, *more)) for more in ((), masks)])
    assert trained.returncode == 0, trained.stderr
    runs = {path.parents[2].name: path.parent for path in logs.rglob("result.json")}
    lines = [
        line
        for start in ("eval", "predict", "report", "export")
        for line in shown(f"python src/{start}.py")
        if "s3://" not in line  # see tests/runs/test_results_store.py
    ]
    assert len(lines) >= 3
    calls = []
    for line in lines:
        script = line.split("/")[1].partition(".py")[0]
        run = runs["digits_masks" if "multi_scale" in line or "MASKS" in line else "digits"]
        words = [re.sub(r"=logs/\S*HASH$|='?\[A,B,C\]'?$", f"={run}", word) for word in line.split()[2:]]
        if script == "export":  # onto a new folder; no hub is reached, and deep prompts cannot be merged
            words = [word.replace("=FOLDER", f"={folder / 'exported'}") for word in words]
            words = [word for word in words if not word.startswith("push=")]
            words = ["to=torch" if word == "to=timm" else word for word in words]
        words = [word.replace("=FOLDER", f"={folder / 'images'}") for word in words]
        words = [word.replace("=MASKS", f"={folder / 'masks'}") for word in words]
        extra = {
            "predict": [*([] if "MASKS" in line else [f"output={folder / 'labels.csv'}"]), "overwrite=true"],
            "report": [f"paths.log_dir={logs}", "formats=[html]"],
            "export": [f"paths.log_dir={logs}", "overwrite=true"],
        }
        state = [f"weights={logs / 'weights.safetensors'}"] if script != "report" else []
        calls.append((script, [*words, *extra.get(script, []), *state]))
    ran = call_all(calls)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("\n# ") + ran.stderr.startswith("# ") == len(calls)


@pytest.mark.parametrize("line", shown("make "))
def test_what_is_made_is_a_target(line):
    target = line.split()[1]
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target} " in listed


@pytest.mark.parametrize(("task", "place"), [("digits", 4), ("digits_crowded", 4), ("digits_loc", 7)])
def test_the_demo_s_pictures_are_test_images(task, place):
    shown = np.asarray(Image.open(ROOT / "docs" / "figures" / f"demo_{task}.png").convert("RGB"))
    assert (shown == digits.compose(task, "test")[0][place].transpose(1, 2, 0)).all()


def test_every_other_command_is_known():
    others = {
        "wandb sweep configs/sweep/prompt_depth.yaml",  # tests/test_sweeps.py runs it
        ".uv/bin/uv run --no-sync --with jupyterlab jupyter lab",  # fetches a program, and opens it
    }
    commands = {
        line
        for _, line in SHOWN
        if re.match(r"(\S*/)?(python|make|wandb|pip|conda|pytest|uv|source|srun) ", line)
    }
    assert {line for line in commands if not line.startswith(("python src/", "make "))} == others
