"""The benchmarks run and print what their documentation shows; how long anything takes is never asserted."""

import argparse
import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.cli import TINY as TINY_RUN
from helpers.cli import frozen
from visprompt.models.api import build
from visprompt.models.methods import METHODS
from visprompt.runs import compose

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--backbone", "test_vit", "--batch", "4", "--pairs", "1", "--lengths", "1", "50"]
HEAD = [
    "exact, {}",
    "carried, {}",
    "promptless, {}",
    "carried / exact",
    "exact / promptless",
    "carried / promptless",
]


@pytest.fixture
def step_time(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("step_time")


def tables(text):
    """Tables of a Markdown text: cells by row and column name."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.M):
        head, _, *rows = (
            [cell.strip() for cell in line.strip("| \n").split(" | ")] for line in block.splitlines()
        )
        found.append({row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows})
    return found


def options(**given):
    defaults = {"backbone": "test_vit", "device": "cpu", "precision": "fp32", "batch": 2, "compile": False}
    return argparse.Namespace(**defaults | given)


@pytest.mark.slow
def test_it_prints_time_and_memory_of_every_length_with_finite_ratios(step_time, capsys):
    step_time.main(TINY)
    out = capsys.readouterr().out
    assert out.startswith("test_vit on cpu, batch 4, fp32, 1 pairs; ")
    assert f"1 thread(s), {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}; " in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    times, memory = tables(out)
    for table, unit in ((times, "ms"), (memory, "MiB")):
        assert list(table) == ["1", "50", "50, dropout 0.1"]
        for row in table.values():
            assert list(row) == [column.format(unit) for column in HEAD]
            numbers = [float(number) for cell in row.values() for number in re.findall(r"[^\s\[\],]+", cell)]
            assert all(math.isfinite(number) and number > 0 for number in numbers)
    for row in times.values():
        exact, carried = float(row["exact, ms"]), float(row["carried, ms"])
        assert [float(n) for n in re.findall(r"[\d.]+", row["carried / exact"])] == pytest.approx(
            [carried / exact] * 3, abs=0.05
        )


def test_longer_carried_prompts_take_more_memory_than_exact_ones(step_time):
    ((label, exact, carried, *_),) = step_time.memory_rows([step_time.Variant(200)], options(batch=8))
    assert label == "200"
    assert float(carried) > 1.2 * float(exact)


def test_the_promptless_pass_reaches_the_first_block_and_no_weight(step_time, monkeypatch):
    reached = []
    monkeypatch.setattr(step_time.Classifier, "zero_grad", lambda self: reached.append(self))
    vit, side = step_time.make_vit(options())
    step_time.make_step(step_time.Variant(), vit, side, options())()
    grads = {
        name for name, p in reached[0].named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert grads == {"head.weight", "head.bias", "backbone.model.blocks.0.attn.qkv.bias"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_exact_and_carried_steps_compute_the_same_loss(step_time, dropout):
    given, (vit, side) = options(), step_time.make_vit(options())
    ways = [
        step_time.make_step(step_time.Variant(50, dropout, exact), vit, side, given)
        for exact in (True, False)
    ]
    exact, carried = (way().item() for way in ways)
    assert exact == pytest.approx(carried, rel=1e-5)


def test_a_backbone_that_takes_no_exact_path_is_refused(step_time):
    with pytest.raises(step_time.UserError, match="blocks that take no exact path: choose a plain ViT"):
        step_time.make_vit(options(backbone="vit_pwee_patch16_reg1_gap_256"))


def test_the_committed_tables_are_of_this_form():
    committed = tables((ROOT / "benchmarks" / "README.md").read_text().partition("## Loading images")[0])
    assert len(committed) == 6  # time, memory and counted operations of two backbones
    for table in committed:
        assert list(table) == ["1", "10", "50", "100", "200", "50, dropout 0.1"]


def test_loading_is_measured_in_every_way(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    loading = importlib.import_module("loading")
    monkeypatch.setattr(
        "sys.argv", ["loading.py", "--images", "64", "--batch", "16", "--workers", "1", "--rounds", "1"]
    )
    loading.main()
    (table,) = tables(capsys.readouterr().out)
    assert list(table) == ["copy", "loader", "workers", "decode"]
    rates = {way: float(cells["images/s"].partition(" ")[0].replace(",", "")) for way, cells in table.items()}
    shares = {way: float(cells["share of copy"].partition(" ")[0]) for way, cells in table.items()}
    assert all(rate > 0 for rate in rates.values())
    assert shares["loader"] == pytest.approx(100 * rates["loader"] / rates["copy"], abs=0.2)
    page = (ROOT / "benchmarks" / "README.md").read_text()
    (committed, *_) = tables(page.partition("## Loading images")[2].partition("\n## ")[0])  # of this section
    assert list(committed) == list(table)


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("methods")


def result(**options):
    return SimpleNamespace(recipe={"lr": 0.4}, method={"num_tokens": 2} | options)


def test_what_was_chosen_is_told_with_what_was_tried(methods):
    assert methods.chosen([result()], {}) == "-"
    assert methods.chosen([result()], {"recipe.lr": [0.1, 0.4]}) == "lr 0.4 (an edge) of 0.1, 0.4"
    assert methods.chosen([result()], {"recipe.lr": [0.1, 0.4, 1.6]}) == "lr 0.4 of 0.1, 0.4, 1.6"
    assert methods.chosen([result(init="zero")], {"method.init": ["zero", None]}) == "init zero of zero, None"
    both = methods.chosen([result(share=0.5)], {"recipe.lr": [0.4], "method.share": [0.5, 1.0]})
    assert both == "lr 0.4 of 0.4; share 0.5 (an edge) of 0.5, 1"


def test_what_pruning_left_is_told_seed_by_seed(methods):
    kept = result(prune=True, num_segments=2, token_mask=[1, 0], segment_mask=[[1, 0], [0, 0]])
    whole = result(prune=True, num_segments=2, token_mask=None, segment_mask=None)
    told = methods.chosen([kept, whole], {})
    assert told == "tokens and their segments left 50% and 50%; 100% and 100%"


@frozen
@pytest.mark.slow
def test_methods_are_scored_and_measured_side_by_side(methods, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))  # of the fresh processes
    words = "trainer=cpu callbacks=none recipe.epochs=1 recipe.warmup_epochs=0 recipe.grid=null data.fraction=0.05"
    words = [*words.split(), "seeds=[1, 2]", f"paths.log_dir={tmp_path}"]
    methods.main(["--methods", "full", "vpt_deep", "--rounds", "2", *words])
    out = capsys.readouterr().out
    assert re.match(r"batch of the recipe, float32 on cpu, 2 rounds; .*commit", out)
    (table,) = tables(out)
    assert list(table) == ["full", "vpt_deep"]
    assert list(table["full"]) == list(methods.HEADER)
    assert len(list(tmp_path.glob("digits_loc/*/*/result.json"))) == 6  # the grid's only point, and two seeds
    assert table["full"]["tuned parameters + head"] == "2,719,296 + 3,088"
    assert table["full"]["of full"] == r"1.00 \[1.00, 1.00\]"  # of a Markdown table
    assert table["vpt_deep"]["tuned parameters + head"] == f"{6 * 50 * 192:,} + 3,088"
    assert table["vpt_deep"]["chosen on val200"] == "-"
    assert all(
        row["epochs"] == "1" and 0 <= float(row["training accuracy, %"]) <= 100 for row in table.values()
    )
    assert all(float(row["step, ms"]) > 0 and float(row["added, MiB"]) > 0 for row in table.values())
    methods.main(["--methods", "full", "vpt_deep", "--rounds", "1", *words])  # what is finished is read
    (again,) = tables(capsys.readouterr().out)
    assert [row["test accuracy, %"] for row in again.values()] == [
        row["test accuracy, %"] for row in table.values()
    ]


@pytest.mark.slow
def test_the_committed_table_of_methods_is_whole_and_its_counts_are_the_codes(methods):
    page = (ROOT / "docs" / "methods-on-the-demo.md").read_text()
    (table,) = tables(page)
    assert list(table) == [method for method in METHODS if method in table], (
        "in their order; a new one has no row yet"
    )
    assert len(table) > 20
    for method, row in table.items():
        assert list(row) == list(methods.HEADER)
        assert re.fullmatch(r"\d+\.\d ± \d+\.\d", row["test accuracy, %"])
        if method != "e2vpt":  # pruned
            with compose.composing():
                job = compose.job("tune", ["experiment=demo_methods", "tasks=null", f"method={method}"])
            options = {name: value for name, value in job.method if name != "name"}
            counted = build("vit64_tiny_imagenet_100", method, 16, **options).summary()
            assert row["tuned parameters + head"] == f"{counted.tuned:,} + {counted.head:,}", method


@pytest.fixture
def bank(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bank")


def test_the_bank_is_compared_with_a_single_classifier_of_the_same_mean_length(bank, capsys):
    bank.main(
        [
            "--backbone",
            "test_vit",
            "--batch",
            "6",
            "--tasks",
            "1",
            "3",
            "--models",
            "3",
            "--longest",
            "9",
            "--rounds",
            "1",
            "--states",
            "4",
        ]
    )
    text = capsys.readouterr().out
    assert text.startswith("test_vit on cpu, batch 6, torch.float32, 1 rounds; ")
    (table,) = tables(text)
    assert list(table) == ["single", "promptless", "bank 1", "bank 3", "passes 3", "models 3"]
    page = (ROOT / "benchmarks" / "README.md").read_text()
    (committed, *_) = tables(page.partition("## Many tasks on one backbone")[2].partition("\n## ")[0])
    assert list(committed["single"]) == list(table["single"])
    for row in table.values():
        figures = [float(number) for cell in row.values() for number in re.findall(r"[\d.]+", cell)]
        assert all(math.isfinite(number) and number > 0 for number in figures)
    assert table["single"]["throughput / single"] == "1.000 [1.000, 1.000]"
    # lengths 1, 4, 6, 9 and classes 397, 265, 134, 2 in 4 bytes a number: keys, values, and the head
    backbone = bank.built(argparse.Namespace(backbone="test_vit"))
    width, blocks = backbone.module.width, backbone.module.num_blocks
    own = 4 * (2 * blocks * width * (1 + 4 + 6 + 9) + (width + 1) * (397 + 265 + 134 + 2)) / 4 / 1e6
    assert f"4 states: {own:.2f} MB each in the bank" in text


def test_lengths_and_classes_are_spread_evenly(bank):
    assert bank.spread(1, 100, 1) == [50]
    assert bank.spread(1, 100, 4) == [1, 34, 67, 100]
    lengths = bank.spread(1, 100, 64)
    assert (lengths[0], lengths[-1], len(lengths)) == (1, 100, 64)
    assert sum(lengths) / 64 == pytest.approx(50.5, abs=0.01)


SMALL = ["--device", "cpu", "--backbones", "vit_tiny_patch16_224", "--batches", "2", "--lengths", "1", "10"]
SMALL += ["--pairs", "1", "--images", "40", "--epochs", "1", "--requests", "32"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        ["rate", "step", "task"],
        pytest.param(["bank", "service", "loader", "compiled"], marks=pytest.mark.endurance),
    ],
    ids=["short", "long"],
)
def test_the_parts_of_the_gpu_s_page_are_measured(gpu, tmp_path, parts):
    gpu.main([*SMALL, "--parts", *parts, "--output", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        gpu.PARTS[p][0] for p in parts
    ]
    assert "Not measured" not in text
    found = tables(text)
    if "step" in parts:
        rate, times, memory, task = found
        assert list(times) == list(memory) == ["1", "10"]
        assert float(rate["float32"]["TFLOP/s"]) > 0
        assert all(row["exact's share of the matrix rate"].endswith(" %") for row in times.values())
        assert float(task["training"]["measured"].rstrip(" s")) > 0
        assert task["device"]["measured"] == "cpu"


def test_a_part_that_fails_or_comes_too_late_does_not_stop_the_others(gpu, tmp_path, monkeypatch, capsys):
    def fail(options):
        raise gpu.UserError("no memory is\nleft")

    monkeypatch.setattr(gpu, "rates", lambda options: {"bf16": 1.0})
    monkeypatch.setitem(gpu.PARTS, "step", ("A training step", fail))
    given = [*SMALL, "--parts", "step", "rate", "--output", str(tmp_path / "gpu.md")]
    gpu.main(given)
    assert "Not measured: no memory is left" in (tmp_path / "gpu.md").read_text()
    assert "| bf16 | 1 |" in (tmp_path / "gpu.md").read_text()
    gpu.main([*given, "--minutes", "-1"])
    assert (tmp_path / "gpu.md").read_text().count("Not measured: -1.0 minutes were over.") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_s_benchmark_says_so(gpu):
    with pytest.raises(gpu.UserError, match="measures a GPU, and this machine has none"):
        gpu.main([])


@pytest.mark.slow
@frozen
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_what_a_run_adds_is_measured_next_to_a_bare_module(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    overhead = importlib.import_module("overhead")
    words = [word for word in TINY_RUN if word.startswith(("++backbone", "recipe.warmup"))]
    overhead.main([*words, "backbone.pretrained=false", "--rounds", "1", "--epochs", "3"])
    text = capsys.readouterr().out
    assert (
        "linear on 1000 x 24 features on cpu, split=final, 3 epochs of 16 steps, batch 64, 1 rounds; " in text
    )
    (table,) = tables(text)
    page = (ROOT / "benchmarks" / "README.md").read_text()
    committed = tables(page.partition("## Around the step")[2].partition("\n## ")[0])[0]
    assert list(table) == ["bare", "loader", "run", "run - bare"]
    for way, row in table.items():
        assert all(math.isfinite(float(cell.partition(" ")[0])) for cell in row.values()), way
    assert list(table["run"]) == list(committed["bare"])
