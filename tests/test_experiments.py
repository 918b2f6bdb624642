"""Experiments of the papers: what each file says of itself is published, composes, and runs.

And the papers' grids.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from statistics import fmean
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml

from helpers.cli import ROOT, call, command, composed, tiny
from helpers.wide import case
from test_datasets_cli import MAIN
from visprompt.data.catalog import SUITES
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.methods import METHODS
from visprompt.reports.published import contents, published
from visprompt.runs import cli, compose, run
from visprompt.runs.result import read_result
from visprompt.tuning import pruning_chain
from visprompt.tuning.protocol import grid_points

EXPERIMENTS = ROOT / "configs" / "experiment"
BENCHMARKS = ("vtab_natural", "vtab_specialized", "vtab_structured", "vtab_all", "fgvc")
PAPERS = {  # an experiment's last word, and our name of the method
    **{name: name for name in ("full", "linear", "partial", "mlp", "sidetune", "bias", "adapter", "e2vpt")},
    **{"shallow": "vpt_shallow", "deep": "vpt_deep"},
}
PARTS = {  # of E^2VPT: key-value prompts, pruning
    "e2vpt_prompts": {"num_kv_tokens": 0, "prune": False},
    "e2vpt_prompts_kv": {"prune": False},
    "e2vpt_prompts_pruned": {"num_kv_tokens": 0},
}
LATENCY = {  # of a step in the paper's table, by the names there and what they were measured with
    "full": {"full": ""},
    "linear": {"linear": ""},
    "partial": {"partial_1": ""},
    "bias": {"bias": ""},
    "adapter": {"adapter_r8": ""},
    "vpt_shallow": {"vpt_shallow_p1": " with 1 prompt", "vpt_shallow_p200": " with 200"},
    "vpt_deep": {"vpt_deep_p1": " with 1 prompt", "vpt_deep_p200": " with 200"},
}
PAIRS = list(product(BENCHMARKS, PAPERS))
ADE20K = {  # an experiment's last word: our name of the method, number of prompts, tuned parameters with the head
    "full": ("full", None, 317_291_096),
    "linear": ("linear", None, 13_143_640),
    "bias": ("bias", None, 13_415_000),
    "deep": ("vpt_deep", 10, 13_389_400),
    "deep_bias": ("vpt_deep_bias", 100, 15_872_600),
}


def read(name):
    """An experiment's header, and its content."""
    text = (EXPERIMENTS / f"{name}.yaml").read_text()
    header = "\n".join(line for line in text.splitlines() if re.match(r"# [\w ]", line))
    header = re.sub(r"\n#  +", " ", header)  # lines that go on
    return dict(re.match(r"# (\w+): +(.*)", line).groups() for line in header.splitlines()), yaml.safe_load(
        text
    )


def expected(benchmark, method):
    """The published figure as a header gives it."""
    found = published(method, "vit_b16_in21k")
    if benchmark in found.means:
        figure = f"{found.means[benchmark]:.2f} %, mean of {len(SUITES[benchmark])} tasks"
    else:
        groups = ("natural", "specialized", "structured")
        figure = ", ".join(f"{group} {found.means[f'vtab_{group}']:.2f} %" for group in groups)
    return f"{figure} ({found.source}), searched per task: tune.py, grid=paper"


def took(method):
    """What a header says of time."""
    cost = contents()["cost"]
    figures = ", ".join(f"{cost[row][0]} ms{words}" for row, words in LATENCY.get(method, {}).items())
    return f"; the paper's training latency (A100, batch 64): {figures}" if figures else ""


def test_there_is_an_experiment_for_each_benchmark_and_method_of_the_papers():
    found = {path.stem for path in EXPERIMENTS.glob("*.yaml") if not path.stem.startswith("demo_")}
    assert found == {f"{b}_{m}" for b, m in PAIRS} | set(PARTS) | {f"ade20k_{word}" for word in ADE20K}


@pytest.mark.parametrize(("benchmark", "word"), PAIRS)
def test_an_experiment_is_a_recipe_on_a_benchmark_under_the_published_figure(benchmark, word):
    header, content = read(f"{benchmark}_{word}")
    method = PAPERS[word]
    assert content == {
        "defaults": [{"override /method": method}, {"override /backbone": "vit_b16_in21k"}],
        "tasks": benchmark,
        **({"method": {"drop_path": 0.0, "dropout": 0.1}} if method == "full" else {}),
    }
    assert header["command"] == f"python src/train.py experiment={benchmark}_{word}"
    beside = {"sidetune": "; method.weights=FILE with its AlexNet"}.get(method, "")
    assert header["expected"] == expected(benchmark, method) + beside
    trainings = "; eleven trainings for each task" if method == "e2vpt" else ""
    assert header["time"] == "not measured here, dry_run=true estimates it" + took(method) + trainings


@pytest.mark.parametrize("word", ADE20K)
def test_an_experiment_of_ade20k_is_the_paper_s_row_under_its_figures(word):
    header, content = read(f"ade20k_{word}")
    method, tokens, _ = ADE20K[word]
    assert content == {
        "defaults": [{"override /method": method}, {"override /backbone": "vit_l16_in21k"}],
        "tasks": "ade20k",
        "backbone": {"image_size": 512},
        **({"method": {"drop_path": 0.0}} if method == "full" else {}),
    }
    found = published(method, "vit_l16_in21k")
    several = contents()["figures"]["vpt"]["vit_l16_in21k"][method]["multi_scale"]
    assert header == {
        "command": f"python src/train.py experiment=ade20k_{word}",
        "expected": f"mean IoU {found.tasks['ade20k (mean IoU)']:.2f} % at a single scale, {several:.2f} % at "
        f"several with flips, eval.py multi_scale=true ({found.source}); its learning rate and iterations are "
        "not known",
        "time": "not measured here, dry_run=true estimates it",
    }
    with composed("train", f"experiment=ade20k_{word}", "trainer=ddp") as cfg:
        (job,) = compose.jobs(cfg)
    assert (job.task, job.method.name, job.backbone.image_size) == ("ade20k", method, 512)
    assert (job.recipe.head, job.recipe.max_steps, job.recipe.batch_size) == ("setr_pup", 160_000, 16)
    assert found.fits(dict(job.method))
    assert dict(job.method).get("num_tokens") == tokens


@pytest.mark.parametrize("word", ADE20K)
def test_an_experiment_of_ade20k_tunes_about_as_many_parameters_as_the_paper_s(word):
    """Its head has 0.04 M more than ours, and its 100 prompts 0.13 M fewer: docs/segmentation.md."""
    with composed("train", f"experiment=ade20k_{word}") as cfg, torch.device("meta"):
        (job,) = compose.jobs(cfg)
        model = timm.create_model("vit_large_patch16_224", img_size=512, num_classes=0)
        built = run.build_classifier(job, SimpleNamespace(module=ViT(model)), 150, "segmentation")
    counted = sum(parameter.numel() for _, parameter in built.tuned_parameters())
    method, _, ours = ADE20K[word]
    assert counted == ours
    papers = contents()["figures"]["vpt"]["vit_l16_in21k"][method]["tuned_millions"]
    assert counted / 1e6 == pytest.approx(papers, abs=1.1 if method == "full" else 0.085)


@pytest.mark.parametrize("script", ["train", "tune"])
def test_a_segmentation_task_may_be_named_by_tasks_too(script):
    with composed(script, "tasks=[ade20k,dtd]", "backbone.image_size=64") as cfg:
        both = [(job.task, job.recipe.head, job.recipe.schedule) for job in compose.jobs(cfg)]
    assert both == [("ade20k", "setr_pup", "poly"), ("dtd", "linear", "per_epoch")]
    with composed(script, "data=segmentation/ade20k", "backbone.image_size=64") as cfg:
        (alone,) = compose.jobs(cfg)
    with composed(script, "tasks=segmentation", "backbone.image_size=64") as cfg:
        assert compose.jobs(cfg) == [alone]


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_e2vpt_are_runs_of_their_own(name):
    header, content = read(name)
    assert content["method"] == PARTS[name]
    assert "no figure is recorded" in header["expected"]
    with composed("train", f"experiment={name}", "tasks=dtd") as cfg:
        (job,) = compose.jobs(cfg)
    assert (job.method.name, job.method.num_tokens, job.method.num_kv_tokens) == (
        "e2vpt",
        10,
        PARTS[name].get("num_kv_tokens", 5),
    )
    trainings = len(pruning_chain.prune_points(job)) + 1 if pruning_chain.prunes(job) else 1
    assert trainings == (11 if "eleven trainings" in header["time"] else 1)


def test_an_experiment_gives_each_of_its_tasks_the_recipe_s_row():
    with composed("train", "experiment=vtab_natural_deep", "trainer=ddp") as cfg:
        found = compose.jobs(cfg)
    assert [job.task for job in found] == list(SUITES["vtab_natural"])
    assert [job.method.num_tokens for job in found] == [10, 10, 10, 1, 1, 50, 5]
    assert [job.recipe.lr for job in found] == [5, 5, 5, 5, 5, 5, 25]
    assert {(job.method.name, job.backbone.name, job.recipe.epochs, job.split) for job in found} == {
        ("vpt_deep", "vit_base_patch16_224.orig_in21k", 100, "final")
    }
    assert {(job.trainer.strategy, job.trainer.devices) for job in found} == {("ddp", "auto")}


def test_other_tasks_methods_and_numbers_can_be_had_of_an_experiment(monkeypatch):
    given = (
        "experiment=fgvc_shallow",
        "tasks=[cub200,dtd]",
        "method=vpt_deep",
        "backbone=demo",
        "recipe.lr=0.5",
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    cli.check_words("train")
    with composed("train", *sys.argv[1:]) as cfg:
        found = compose.jobs(cfg)
    assert [(job.task, job.method.name, job.recipe.lr) for job in found] == [
        ("cub200", "vpt_deep", 0.5),
        ("dtd", "vpt_deep", 0.5),
    ]
    assert found[0].backbone.name == "vit64_tiny_imagenet_100"


@pytest.mark.parametrize("script", ["train", "tune"])
def test_the_command_of_an_experiment_is_accepted(monkeypatch, capsys, script):
    monkeypatch.setattr(
        sys, "argv", ["x.py", "experiment=vtab_natural_deep", "trainer=ddp", "data.source=prepared"]
    )
    cli.check_words(script)
    assert capsys.readouterr() == ("", "")


RATES = [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
SMALL = [0.025, 0.005, 0.0025]
LENGTHS = {"method.num_tokens": [1, 5, 10, 50, 100, 200]}
SHALLOW = [1000, 500, 250, 100]
KINDS = {  # rates on VTAB-1k and on FGVC, lengths, and the number of points
    "head": (RATES, RATES, {}, 40, 40),
    "adamw": ([0.005, 0.001, 0.0005, 0.0001],) * 2 + ({}, 16, 16),
    "prompts": (RATES, RATES[:-1], LENGTHS, 240, 216),
    "shallow": ([*SHALLOW, *RATES], [*SHALLOW, *RATES[:-1]], LENGTHS, 336, 312),
    "e2vpt": (RATES, RATES[:-1], {}, 40, 36),
}
KIND = {
    **dict.fromkeys(("linear", "mlp", "sidetune"), "head"),
    **dict.fromkeys(("vpt_shallow", "vpt_shallow_bias", "vpt_gated"), "shallow"),
    **dict.fromkeys(("vpt_deep", "vpt_deep_bias", "vfpt", "vapt", "cvpt", "vpt_low_rank", "pae"), "prompts"),
    "e2vpt": "e2vpt",
}


def grid_of(task, *arguments):
    with compose.composing():
        return compose.job("tune", [f"data={task}", *arguments]).grid


def kind_of(method):
    """The kind of grid that a method has."""
    named = yaml.safe_load((ROOT / "configs" / "grid" / "paper.yaml").read_text())["kinds"]
    return KIND.get(method, named.get(method, "adamw"))


# fast: the first method of each kind of grid
FIRST_OF_KIND = {kind_of(method): method for method in sorted(METHODS, reverse=True)}.values()


@pytest.mark.parametrize(
    "method", [case(method, fast=method in FIRST_OF_KIND, id=method) for method in sorted(METHODS)]
)
def test_grid_paper_is_the_paper_s_grid_of_each_method(method):
    vtab, fgvc, lengths, on_vtab, on_fgvc = KINDS[kind_of(method)]
    for task, rates, points in (("vtab/cifar", vtab, on_vtab), ("fgvc/cub200", fgvc, on_fgvc)):
        found = grid_of(task, f"method={method}", "grid=paper")
        assert found == {"recipe.lr": rates, "recipe.weight_decay": [0.01, 0.001, 0.0001, 0], **lengths}
        assert len(grid_points(found)) == points


@pytest.mark.parametrize(
    ("task", "arguments", "rates", "lengths", "points"),
    [
        ("vtab/dtd", ("grid=paper_swin", "method=vpt_deep"), RATES, [1, 5, 10, 50], 160),
        ("fgvc/cub200", ("grid=paper_swin", "method=vpt_deep"), RATES[:-1], [1, 5, 10, 50], 144),
        ("vtab/dtd", ("grid=paper_mae", "method=linear"), [*RATES, *SMALL], None, 52),
        ("fgvc/cub200", ("grid=paper_mae", "method=linear"), [*RATES, *SMALL], None, 52),
        *(
            (task, ("grid=paper_convnet", "method=vpt_shallow", "method.location=pad"),
             [5, 2.5, 1, 0.5, 0.25, 0.1, 0.05, 0.025, 0.01], [1, 3, 5, 7, 9, 11], 216)
            for task in ("vtab/dtd", "fgvc/cub200")
        ),
        ("vtab/dtd", ("grid=paper_convnet", "method=full"),
         [0.5, 0.25, 0.05, 0.025, 0.005, 0.0025, 0.0005, 0.00025], None, 32),
        ("fgvc/cub200", ("grid=paper_convnet", "method=full"), [0.05, 0.025, 0.005, 0.0025], None, 16),
    ],
)  # fmt: skip
def test_grids_of_other_backbones(task, arguments, rates, lengths, points):
    found = grid_of(task, *arguments)
    assert found["recipe.lr"] == rates
    assert found.get("method.num_tokens") == lengths
    assert len(grid_points(found)) == points


def test_without_a_grid_of_the_papers_the_recipe_s_is_tried():
    assert grid_of("vtab/dtd") == {"recipe.lr": [0.25, 1, 5, 25]}


@pytest.mark.parametrize(
    ("task", "different"), [("vtab/cifar", 5 * 8), ("vtab/patch_camelyon", 9 * 8), ("vtab/caltech101", 9 * 8)]
)
def test_grid_paper_prunes_9_by_9_and_of_equal_masks_one_run_is_made(task, different):
    """Of 5 tokens 10 and 30 % are as many as 0 and 20; of 16 segments at least 4 stay."""
    with compose.composing():
        job = compose.job("tune", [f"data={task}", "method=e2vpt", "grid=paper"])
    assert len(job.method.prune_tokens) * len(job.method.prune_segments) == 81
    points = set(pruning_chain.prune_points(job))
    assert len(points) == len(pruning_chain.prune_points(job))
    assert len({point for point in points if point.kept_segments < 16}) == different


def test_a_grid_of_ones_own_stands_beside_that_of_the_task_and_in_place_of_the_same_keys():
    own = "++recipe.grid={method.dropout:[0.0,0.1]}"
    assert grid_of("vtab/cifar", own) == {"recipe.lr": [0.25, 1, 5, 25], "method.dropout": [0, 0.1]}
    papers = grid_of("vtab/cifar", "grid=paper")
    assert grid_of("vtab/cifar", own, "grid=paper") == papers | {"method.dropout": [0, 0.1]}
    assert grid_of("vtab/dtd", "grid=paper", "++recipe.grid={recipe.lr:[9.0]}")["recipe.lr"] == [9]
    assert grid_of("demo/digits", own, "grid=paper") == {"method.dropout": [0, 0.1]}
    assert grid_of("vtab/cifar", "recipe.grid=null") is None


def test_what_the_user_gives_is_not_tried():
    whole = grid_of("vtab/dtd", "grid=paper")
    given = grid_of("vtab/dtd", "grid=paper", "recipe.lr=0.3", "method.num_tokens=7")
    assert given == whole | {"recipe.lr": [0.3], "method.num_tokens": [7]}
    own = "++recipe.grid={method.num_kv_tokens:[0,5]}"
    assert grid_of("vtab/dtd", "experiment=e2vpt_prompts", own)["method.num_kv_tokens"] == [0, 5]


@pytest.mark.parametrize("task", SUITES["demo"])
@pytest.mark.parametrize("method", ["vpt_deep", "linear"])  # whose recipes have grids for some of them
def test_the_papers_have_no_grid_for_other_tasks(task, method):
    with pytest.raises(
        UserError, match=r"recipe\.grid=paper \(which is for the tasks of VTAB-1k and FGVC\) is not a grid"
    ):
        grid_points(grid_of(f"demo/{task}", "grid=paper", f"method={method}"))


@pytest.fixture(scope="module")
def natural(tmp_path_factory):
    """The seven natural tasks, prepared from tiny copies of their files, and the options of a run on them."""
    folder = tmp_path_factory.mktemp("natural")
    tasks = ",".join(SUITES["vtab_natural"])
    prepare = ("prepare.py", "tasks=vtab_natural", "image_size=64", f"paths.data_dir={folder}")
    done = subprocess.run(
        [sys.executable, str(MAIN), str(folder), "raw", tasks, *prepare],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    given = (
        "experiment=vtab_natural_deep",
        "trainer=ddp_sim",
        "backbone=demo",
        "callbacks=none",
        "recipe.epochs=1",
    )
    where = (f"paths.data_dir={folder}", "recipe.warmup_epochs=0")
    return folder, tiny(folder / "logs", *given, *where)


def finished(folder):
    return {path.parts[-4]: read_result(path.parent) for path in (folder / "logs").glob("*/*/*/result.json")}


def killed_behind(folder, arguments, count):
    """Starts a command and kills it when some tasks are finished."""
    with (folder / "killed.txt").open("w") as out:
        process = subprocess.Popen(command("train", *arguments), stdout=out, stderr=out, process_group=0)
        deadline = time.monotonic() + 200
        while len(finished(folder)) < count and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def reported(folder):
    """The report of all runs: its table of accuracies and that of means, and the page."""
    done = call("report", f"runs={folder / 'logs'}", f"output={folder / 'report'}", "formats=[html,csv]")
    assert done.returncode == 0, done.stderr
    tables = []
    for name in ("accuracy_vtab_natural", "means"):
        with (folder / "report" / "tables" / f"{name}.csv").open(newline="") as file:
            tables += csv.DictReader(file)
    return (*tables, (folder / "report" / "index.html").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_suite_goes_on_where_it_was_killed_and_a_broken_task_stops_no_other(natural):
    folder, arguments = natural
    killed_behind(folder, arguments, 2)
    before = finished(folder)
    assert 2 <= len(before) < 6
    (pixels,) = (folder / "stores" / "svhn").rglob("pixels.bin")  # behind those that were finished
    shutil.copy(pixels, folder / "whole")
    os.truncate(pixels, 100)
    done = call("train", *arguments, timeout=300)
    assert done.returncode == 2
    assert done.stdout.count("finished before") == len(before)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: svhn/vpt_deep: ")
    assert error.endswith(" (1 of 7 runs failed)")
    # the reason: what the store could be made of anew is not SVHN's own file
    assert "train_32x32.mat" in error
    assert set(finished(folder)) == set(SUITES["vtab_natural"]) - {"svhn"}
    accuracy, means, page = reported(folder)
    assert [task for task in SUITES["vtab_natural"] if not accuracy[task]] == ["svhn"]
    assert (accuracy["mean"], means["vtab_natural"]) == ("", "")
    assert page.count('<td style="text-align: right">missing (6 of 7)</td>') == 2
    shutil.copy(folder / "whole", pixels)
    # what is finished is so for any number of devices
    done = call("train", *arguments, "trainer=cpu", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before") == 6
    found = finished(folder)
    assert set(found) == set(SUITES["vtab_natural"])
    assert {result.status for result in found.values()} == {"finished"}
    assert [task for task, result in found.items() if result.machine["devices"] == 1] == ["svhn"]
    assert {task: found[task] for task in before} == before
    accuracy, means, page = reported(folder)
    scores = {task: 100 * result.score for task, result in found.items()}
    assert {task: float(accuracy[task]) for task in scores} == pytest.approx(scores)
    assert float(accuracy["mean"]) == pytest.approx(fmean(scores.values())) == float(means["vtab_natural"])
    assert means["vtab, mean of 19 tasks"] == ""
    shown = "".join(
        rf'<td style="text-align: right">{scores[task]:.1f} \([\d.]+ to [\d.]+\)</td>'
        for task in SUITES["vtab_natural"]
    )
    assert re.search(f'<th scope="row">vpt_deep</th>{shown}', page)
    assert "missing (7 of 19)" in page
