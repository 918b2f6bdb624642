"""Every file of every config group composes, and the debug modes really run."""

import re

import pytest
import yaml
from omegaconf import OmegaConf

from helpers.cli import ROOT, composed, frozen, tiny
from helpers.wide import case
from test_experiments import BENCHMARKS, PAPERS
from visprompt.data import catalog
from visprompt.data.catalog import SUITES, TASKS
from visprompt.models.methods import METHODS
from visprompt.models.tuning_module import TuningModule
from visprompt.runs import compose, run
from visprompt.runs.job import OWN_DATA
from visprompt.tuning import protocol
from visprompt.tuning.protocol import grid_points

CONFIGS = ROOT / "configs"
# a method takes its recipe
GROUPS = (
    "backbone",
    "callbacks",
    "data",
    "debug",
    "logger",
    "method",
    "trainer",
)
NEEDS = {
    "data/folder": ["data.root=x"],
    "data/hf": ["data.dataset=x/y"],
    "data/segmentation/folder": ["data.root=x"],
    "backbone/timm": ["backbone.name=vit_tiny_patch16_224"],
}
PARTS = {"debug/base"}  # other files are built on them


def options(group):
    found = (
        path.relative_to(CONFIGS / group).with_suffix("").as_posix()
        for path in (CONFIGS / group).rglob("*.yaml")
    )
    return [(group, option) for option in sorted(found) if f"{group}/{option}" not in PARTS]


# Of two groups other fast tests compose options: test_datamodules.py tasks of each family,
# test_backbone_configs.py the backbones. Here those that they leave out are fast.
ELSEWHERE = {("data", spec.config) for spec in TASKS.values()} | {
    pair for pair in options("backbone") if pair[1] not in ("timm", "moco_v3_b16")
}


@pytest.mark.parametrize(
    ("group", "option"),
    [
        case(*pair, fast=pair not in ELSEWHERE, id="-".join(pair))
        for group in GROUPS
        for pair in options(group)
    ],
)
def test_every_option_composes_into_a_job(group, option):
    with compose.composing():
        job = compose.job("train", [f"{group}={option}", *NEEDS.get(f"{group}/{option}", [])])
    assert job.task
    assert "rows" not in job.recipe


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_lines_are_short(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 110] == []


@pytest.mark.parametrize("option", [option for _, option in options("experiment")])
def test_every_experiment_is_short(option):
    text = (CONFIGS / "experiment" / f"{option}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert len(text.splitlines()) - len(header) <= 8
    assert header[0] == "# @package _global_"
    assert re.findall(r"^# (\w+):", text, re.MULTILINE) == ["command", "expected", "time"]
    assert f"experiment={option}" in header[1]


# of benchmark and method: fast are all methods on one benchmark, and one method on all (helpers/wide.py)
CROSSED = {
    f"{benchmark}_{method}": benchmark == "vtab_natural" or method == "deep"
    for benchmark in BENCHMARKS
    for method in PAPERS
}


@pytest.mark.parametrize(
    "option",
    [case(option, fast=CROSSED.get(option, True), id=option) for _, option in options("experiment")],
)
def test_every_experiment_composes(option):
    text = (CONFIGS / "experiment" / f"{option}.yaml").read_text()
    script = re.search(r"python src/(\w+)\.py", text)[1]
    first = catalog.resolve(yaml.safe_load(text)["tasks"])[0]  # one is enough
    with compose.composing():
        job = compose.job(script, [f"experiment={option}", f"data={first.config}", "tasks=null"])
    assert job.task == first.id


def test_the_table_of_the_readme_is_of_its_methods_on_all_demo_tasks():
    readme = (ROOT / "README.md").read_text().partition("## What the demo shows")[2].partition("## ")[0]
    with composed("tune", "experiment=demo_table") as cfg:
        assert list(cfg.methods) == re.findall(r"^\| (\w+) \| \d", readme, re.MULTILINE)
        assert [job.task for job in compose.jobs(cfg)] == list(SUITES["demo"])


@pytest.mark.slow
def test_every_method_is_measured_by_one_command():
    with composed("tune", "experiment=demo_methods") as cfg:
        jobs, _ = protocol.asked(cfg)
    assert [job.method.name for job in jobs] == list(METHODS)
    assert {job.task for job in jobs} == {"digits_loc"}
    assert max(len(grid_points(job.grid)) for job in jobs) <= 5


def test_methods_configs_and_recipes_have_the_same_names():
    names = {path.stem for path in (CONFIGS / "method").glob("*.yaml")}
    assert names == set(METHODS)
    assert names == {path.stem for path in (CONFIGS / "recipe").glob("*.yaml")} - {"base"}


def test_every_task_of_the_catalog_has_a_config_and_no_config_is_without_a_task():
    found = {
        path.relative_to(CONFIGS / "data").with_suffix("").as_posix()
        for path in (CONFIGS / "data").rglob("*.yaml")
    }
    assert found == {spec.config for spec in TASKS.values()} | {*OWN_DATA.values()}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_row_of_a_recipe_names_its_source(method):
    rows = OmegaConf.load(CONFIGS / "recipe" / f"{method}.yaml").rows
    kinds = ("published: ", "from the paper's text", "recalled from", "own choice")
    assert [row.source for row in rows.values() if not row.source.startswith(kinds)] == []
    assert set(rows) <= {*TASKS, "default", "vtab", "fgvc", "demo", "segmentation"}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_value_of_a_recipe_s_rows_is_read(method):
    configs = (CONFIGS / "recipe" / "base.yaml", CONFIGS / "method" / f"{method}.yaml")
    read = {key for path in configs for key in re.findall(r"\$\{row:(\w+)\}", path.read_text())}
    for name, row in OmegaConf.load(CONFIGS / "recipe" / f"{method}.yaml").rows.items():
        assert set(row) <= {*read, "grid", "source"}, name


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_task_of_the_benchmarks_falls_back_to_the_demo_s_row(method):
    with composed(
        "train", f"method={method}", "tasks=[cifar,smallnorb_ele,cub200]", "data='vtab/cifar'"
    ) as cfg:
        for job in compose.jobs(cfg):
            assert job.recipe.epochs == 100, job.task
            assert len(grid_points(job.grid)) <= 4


def test_published_lengths_and_settings_are_in_the_recipes():
    """Those of shared tables of the papers, VPT (Jia et al., ECCV 2022)."""
    lengths = {
        "vpt_deep": [
            10,
            10,
            10,
            1,
            1,
            50,
            5,
            100,
            100,
            10,
            1,
            50,
            200,
            100,
            50,
            10,
            50,
            200,
            200,
            10,
            50,
            5,
            100,
            200,
        ],
        "vpt_shallow": [100, 5, 1, 200, 50, 200, 1, 5, 50, 50, 10, 100, 200, 100, 100, 100, 100, 200, 200],
    }
    tasks = [*SUITES["vtab_all"], *SUITES["fgvc"]]
    for method, expected in lengths.items():
        rows = OmegaConf.load(CONFIGS / "recipe" / f"{method}.yaml").rows
        assert [rows[task].num_tokens for task in tasks[: len(expected)]] == expected
    rows = OmegaConf.load(CONFIGS / "recipe" / "vpt_deep.yaml").rows
    given = {
        task: (rows[task].lr, rows[task].weight_decay, rows[task].batch_size)
        for task in ("dmlab", "eurosat", "sun397")
    }
    assert given == {"dmlab": (1.0, 0.001, 64), "eurosat": (1.0, 0.001, 64), "sun397": (25.0, 0.0001, 128)}


def value(method, task, name):
    """A value of a recipe's rows: of the task's, else its family's."""
    rows = OmegaConf.load(CONFIGS / "recipe" / f"{method}.yaml").rows
    return next(
        rows[row][name] for row in (task, TASKS[task].family, "default") if row in rows and name in rows[row]
    )


def values(method, *names):
    """Values on all tasks of both benchmarks, each with the tasks that have it."""
    found = {}
    for task in (*SUITES["vtab_all"], *SUITES["fgvc"]):
        found.setdefault(tuple(value(method, task, name) for name in names), []).append(task)
    return {key if len(names) > 1 else key[0]: tasks for key, tasks in found.items()}


LIKE_VPT = {  # its released code and its descendants
    *("linear", "mlp", "sidetune", "full", "partial", "bias", "adapter"),
    *("vpt_shallow", "vpt_deep", "vpt_shallow_bias", "vpt_deep_bias", "e2vpt", "vfpt", "vapt", "pae"),
}


PER_STEP = {"cvpt", "ssf", "convpass", "adapter_plus"}  # as docs/fidelity.md says


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_of_vpt_s_code_change_the_rate_per_epoch(method):
    if method in LIKE_VPT | PER_STEP:
        assert values(method, "schedule").keys() == {"per_epoch" if method in LIKE_VPT else "per_step"}
    rows = OmegaConf.load(CONFIGS / "recipe" / f"{method}.yaml").rows
    assert rows.default.schedule == "per_step", "the demo and own images"
    if method in LIKE_VPT:
        adamw = "vpt_adamw" if method in ("full", "partial", "bias", "adapter") else "adamw"
        assert values(method, "optimizer").keys() <= {"sgd", adamw}


@pytest.mark.parametrize(
    ("method", "batch", "warmup"),
    [
        *((method, 1024, 10) for method in ("linear", "mlp", "sidetune")),
        ("full", 384, 5),
        ("partial", 384, 5),
    ],
)
def test_rows_have_the_batch_and_warm_up_of_the_released_code(method, batch, warmup):
    assert values(method, "batch_size", "warmup_epochs").keys() == {(batch, warmup)}


def test_e2vpt_has_the_lengths_of_the_released_commands():
    found = values("e2vpt", "num_tokens", "num_kv_tokens", "batch_size", "dropout")
    others = {
        (32, 5, 64, 0.1): ["caltech101"],
        (5, 5, 64, 0.1): ["cifar", "dsprites_loc", "dsprites_ori"],
        (1, 1, 64, 0.1): ["oxford_flowers102"],
        (10, 10, 64, 0.1): ["patch_camelyon"],
        (5, 5, 128, 0.1): list(SUITES["fgvc"]),
    }
    named = {task for tasks in others.values() for task in tasks}
    assert found == others | {(10, 5, 64, 0.1): [task for task in SUITES["vtab_all"] if task not in named]}


def test_convpass_has_the_scale_and_initialisation_of_the_released_configs():
    identity = [0.1, 1, None, None, None, None, 0.1, 10, 10, 10, 1, 1, None, 10, None, None, None, None, None]
    xavier = [
        None,
        None,
        0.01,
        0.1,
        1,
        100,
        None,
        None,
        None,
        None,
        None,
        None,
        0.1,
        None,
        10,
        100,
        0.1,
        100,
        1,
    ]
    expected = {
        task: (a, "identity") if b is None else (b, "xavier")
        for task, a, b in zip(SUITES["vtab_all"], identity, xavier, strict=True)
    }
    found = {task: (value("convpass", task, "scale"), value("convpass", task, "init")) for task in expected}
    assert found == expected
    with composed("train", "method=convpass", "data=vtab/svhn") as cfg:
        (job,) = compose.jobs(cfg)
    assert (job.method.scale, job.method.init) == (100, "xavier")


DEBUG = {  # epochs, batches of an epoch, test images
    "fdr": (1, 1, 64),
    "limit": (3, 2, 128),
    "overfit": (20, 3, 797),
    "profiler": (1, 16, 797),
}


@frozen
@pytest.mark.parametrize("mode", DEBUG)
def test_debug_modes_run_in_a_folder_of_their_own(tmp_path, mode, monkeypatch):
    epochs, batches, tested = DEBUG[mode]
    seen, original = [], TuningModule.training_step

    def note(self, batch, index):
        seen.append((self.current_epoch, tuple(batch.rows.tolist())))
        return original(self, batch, index)

    monkeypatch.setattr(TuningModule, "training_step", note)
    given = [a for a in tiny(tmp_path, "callbacks=none") if not a.startswith(("recipe.", "paths."))]
    with composed("train", *given, f"debug={mode}", f"paths.root_dir={tmp_path}", "tags=[mine]") as cfg:
        (job,) = compose.jobs(cfg)
    assert job.paths.log_dir == f"{tmp_path}/logs/debug"
    assert job.rerun
    one = run.prepare(job)
    result = run.run_job(one)
    assert result.status == "finished"
    assert result.tags == ("mine", "debug")
    assert result.metrics["test/count"] == tested
    assert [epoch for epoch, _ in seen] == [epoch for epoch in range(epochs) for _ in range(batches)]
    if mode == "profiler":
        assert "run_training_epoch" in (tmp_path / "logs" / "debug" / "fit-profile.txt").read_text()
    else:
        assert list((tmp_path / "logs").iterdir()) == [tmp_path / "logs" / "debug"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "blocks", "total"), [("vpt_deep", 12, 1.18), ("vpt_shallow", 1, 1.04)])
def test_the_lengths_give_the_papers_total_over_24_tasks_as_a_multiple_of_one_vit_b(method, blocks, total):
    """Jia et al., Visual Prompt Tuning, table 1: one backbone, and for each task its prompts and head."""
    tasks = [*SUITES["vtab_all"], *SUITES["fgvc"]]
    with composed("train", f"method={method}", f"tasks=[{','.join(tasks)}]", "data='vtab/cifar'") as cfg:
        lengths = {job.task: job.method.num_tokens for job in compose.jobs(cfg)}
    tuned = sum(768 * blocks * lengths[task] + 769 * TASKS[task].num_classes for task in tasks)
    assert round(1 + tuned / 85_798_656, 2) == total


def test_the_demo_report_writes_its_table_beside_the_folder_that_the_report_fills():
    with composed("tune", "experiment=demo_report", "paths.log_dir=/runs") as tuned:
        assert tuned.table == "/runs/table_report.md"
    with composed("report", "paths.log_dir=/runs") as cfg:
        assert cfg.output == "/runs/report", "which must hold nothing else"
