"""The comparison with the released code of VPT: all of it that needs neither that code nor its packages."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import official
import official_page
import official_parts
from official_data import ViT, write_task, write_weights
from visprompt.errors import UserError
from visprompt.models.backbones import BackboneSpec, build_backbone
from visprompt.runs import compose

ROOT = Path(__file__).resolve().parents[1]
SMALL = ViT(width=8, mlp=16, heads=2, blocks=1, patch=112)
LOG = """\
[11/30 10:36:25][INFO] visual_prompt:  320: Inference (val):avg data time: 2.75e-02, avg batch time: 1.14
[11/30 10:36:25][INFO] visual_prompt:  113: Classification results with val_CUB: top1: 17.50\ttop5: 79.50\t
[11/30 10:36:58][INFO] visual_prompt:  113: Classification results with test_CUB: top1: 21.20\ttop5: 78.80\t
[11/30 10:37:58][INFO] visual_prompt:  113: Classification results with val_CUB: top1: 100.00\ttop5: 100.00\t
"""


@pytest.fixture
def comparison(tmp_path):
    options = official.parse(["--code", str(tmp_path), "--python", sys.executable, "--test", "5000"])
    return official.Comparison(tmp_path, options, SMALL)


def test_both_layouts_hold_the_same_files_and_classes(tmp_path):
    write_task(tmp_path / "a", {"train": 5, "test": 3}, classes=2)
    names = json.loads((tmp_path / "a" / "official" / "train.json").read_text())
    assert names == {f"train_{number:05d}.jpg": 1 + number % 2 for number in range(5)}
    for name, label in names.items():
        linked = tmp_path / "a" / "ours" / "train" / f"class_{label - 1:02d}" / name
        assert linked.samefile(tmp_path / "a" / "official" / "images" / name)
    write_task(tmp_path / "b", {"train": 5, "test": 3}, classes=2)
    first, second = (sorted((tmp_path / side / "official" / "images").iterdir()) for side in "ab")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert all(a.read_bytes() != b.read_bytes() for a, b in pairwise(first))


def test_the_weights_are_read_as_google_s(tmp_path):
    write_weights(tmp_path / "weights" / "vit.npz", SMALL)
    arrays = np.load(tmp_path / "weights" / "vit.npz")
    kwargs = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 112, "mlp_ratio": 2.0}
    weights = str(tmp_path / "weights" / "vit.npz")
    spec = BackboneSpec(name="vit_tiny_patch16_224", weights=weights, kwargs=kwargs)
    model = build_backbone(spec).module.model
    query = arrays["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"]
    assert np.array_equal(model.blocks[0].attn.qkv.weight[:8].detach(), query.reshape(8, 8).T)
    assert np.array_equal(model.pos_embed.detach(), arrays["Transformer/posembed_input/pos_embedding"])
    assert model.pos_embed.shape[1] == SMALL.tokens == 5


def test_accuracies_are_read_from_the_log_by_split_and_epoch():
    assert official.accuracies(LOG) == {"val": [17.5, 100.0], "test": [21.2]}


def test_of_equal_points_the_lower_rate_is_chosen():
    points = [{"lr": lr, "val": val} for lr, val in ((1.0, 40.0), (0.5, 50.0), (0.25, 50.0), (0.1, 49.5))]
    assert official.chosen(points)["lr"] == 0.25


def test_a_folder_without_the_released_code_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "train.py").touch()
    with pytest.raises(
        UserError, match=r"is not the released code of VPT, it lacks tune_fgvc\.py: give the folder"
    ):
        official.check_code(tmp_path)


def test_a_python_that_lacks_packages_is_refused_and_they_are_named(monkeypatch):
    monkeypatch.setattr(official, "PACKAGES", {"json": "json", "no_such_module": "no-such-package"})
    with pytest.raises(
        UserError, match="lacks packages of the released code: install them there, no-such-package"
    ):
        official.check_python(sys.executable)
    with pytest.raises(UserError, match="--python=/no/python cannot be started as a Python"):
        official.check_python("/no/python")


def test_a_process_is_measured_and_a_failure_named_by_its_last_line(tmp_path):
    code = "import os; held = bytearray(2**26); print(os.environ['GIVEN'])"
    usage = official.launch([sys.executable, "-c", code], tmp_path / "log", {"GIVEN": "value"})
    assert (tmp_path / "log").read_text() == "value\n"
    assert usage.wall > 0
    assert usage.cpu > 0
    assert usage.mib > 64
    with pytest.raises(UserError, match=r"ended with code 3, see .*: the last line"):
        official.launch([sys.executable, "-c", "print('the last line'); exit(3)"], tmp_path / "log", {})


def test_what_was_measured_in_a_folder_is_not_measured_again(comparison):
    assert comparison.step("one", lambda: {"cpu": 1.5}) == {"cpu": 1.5}
    assert comparison.step("one", pytest.fail) == {"cpu": 1.5}
    comparison.step("settings", lambda: {"epochs": 1})
    with pytest.raises(UserError, match="holds a comparison with other settings: give another"):
        official.measure(comparison)


def test_both_sides_are_given_the_same_settings(comparison):
    words = comparison.official_words("out")
    theirs = dict(zip(words[::2], words[1::2], strict=True))
    with compose.composing():
        job = compose.job(
            "tune", [*comparison.our_words(), "++recipe.grid={recipe.lr:[1.0,0.25]}", "seeds=[42]"]
        )
    assert theirs["MODEL.PROMPT.NUM_TOKENS"] == str(dict(job.method)["num_tokens"]) == "10"
    assert float(theirs["MODEL.PROMPT.DROPOUT"]) == dict(job.method)["dropout"] == 0.1
    assert theirs["DATA.BATCH_SIZE"] == str(job.recipe.batch_size) == "64"
    assert theirs["SOLVER.TOTAL_EPOCH"] == str(job.recipe.epochs)
    assert float(theirs["SOLVER.WARMUP_EPOCH"]) == job.recipe.warmup_epochs
    assert (job.recipe.optimizer, job.recipe.schedule, job.recipe.head_init) == ("sgd", "per_epoch", "vpt")
    assert job.recipe.head_lr is None
    assert comparison.points == [(1.0, 0.001), (1.0, 0.0001), (0.25, 0.001), (0.25, 0.0001)]


def figures():
    """Figures of seven runs of four epochs: 10 s a run, 6 of them for the test set, 1 ms an image."""
    process = {"wall": 1.0, "cpu": 42.0, "mib": 900.0}
    points = [
        {"lr": lr, "weight_decay": 0.001, "cpu": 10.0, "slept": 3.0, "val": 50.0} for lr in (1.0, 0.25)
    ] * 2
    seed = {"usage": process | {"cpu": 12.0}, "runs": [{"cpu": 10.0, "slept": 20.0, "test": 52.0}]}
    return {
        "grid": {"usage": process, "runs": points},
        "seeds": [seed, seed, seed],
        "ours": {"wall": 40.0, "cpu": 20.0, "mib": 600.0},
        "no_test": {"runs": [{"cpu": 4.0}]},
        "start": {"usage": {"cpu": 2.0}, "runs": []},
        "loads": {"runs": [{"cpu": 0.7, "images": 800}, {"cpu": 0.9, "images": 800}]},
        "again": {"cpu": 3.0},
        "same": {"images": 0.0, "logits": 4.1e-7},
        "alone": {"store": 1.0, "image": 0.0001, "test": 0.5, "exact": 20.0, "carried": 25.0},
    }


def test_parts_sum_to_the_whole(comparison):
    comparison.step("alone", lambda: figures()["alone"])
    found = official_parts.parts(comparison, figures())
    assert [(part.official, pytest.approx(part.ours)) for part in found[:3]] == [
        (8.0, 3.0),
        (42.0, 1.5),
        (pytest.approx(28.0), 1 + 2.8),
    ]
    whole = official_parts.total(figures())
    assert (whole.official, whole.ours) == (78.0, 20.0)
    assert sum(part.official for part in found) == pytest.approx(78.0)
    assert sum(part.ours for part in found) == pytest.approx(20.0)
    same = official_parts.elsewhere(comparison, found, comparison.options.test, comparison.options.epochs)
    assert (same.official, same.ours) == (pytest.approx(78.0), pytest.approx(20.0))
    larger = official_parts.elsewhere(
        comparison, found, 2 * comparison.options.test, comparison.options.epochs
    )
    assert larger.official == pytest.approx(78.0 + 42.0)
    assert larger.ours == pytest.approx(20.0 + 1.5 + 5 / 6)  # the passes, and five sixths of the store
    assert official_parts.carried(comparison, figures()) == pytest.approx(7 * 4 * 13 * 0.005)


def test_the_page_has_every_table(comparison, monkeypatch):
    comparison.step("alone", lambda: figures()["alone"])
    rates = {"lr": 0.25, "weight_decay": 0.001}
    # an equal point that the protocol did not choose comes first
    points = [rates | {"weight_decay": 0.0001}, rates]
    runs = [SimpleNamespace(split="tune", score=0.5, recipe=point) for point in points]
    runs += [SimpleNamespace(split="final", score=score, recipe=rates) for score in (0.50, 0.52, 0.54)]
    monkeypatch.setattr(official_page, "our_results", lambda logs: runs)
    text = official_page.page(comparison, figures())
    assert "| CPU time, s | 78 | 20 | 3.9 |" in text
    assert "| chosen rate, weight decay | 0.25, 0.001 | 0.25, 0.001 |  |" in text
    assert "| accuracy on test, % | 52.0 ± 0.0 | 52.0 ± 2.0 |  |" in text
    assert "differ by +0.0 points; the standard error of that difference, from the deviations" in text
    assert "| 28 passes over test; 3 | 42 | 2 | 70 % |" in text
    assert "to keep jobs of a cluster apart: 72 s here" in " ".join(text.split())
    assert "Released code: of unknown commit, python 3." in text
    assert "{" not in text
    committed = (ROOT / "benchmarks" / "official.md").read_text()
    assert headings(committed) == headings(text)


def headings(text):
    lines = text.splitlines()
    return [
        line for line, below in pairwise([*lines, ""]) if line.startswith("#") or below.startswith("| :--")
    ]


def test_the_command_of_the_page_is_one_that_the_script_takes():
    page = (ROOT / "benchmarks" / "official.md").read_text()
    (command,) = re.findall(r"benchmarks/official\.py (.*)", page)
    options = official.parse(command.split())
    assert options.test >= 2500
