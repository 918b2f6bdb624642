"""A finished run opened again: what it says of its images is what it scored, before and after tuning."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm import create_model

from helpers import miniatures
from helpers.cli import NET, content, frozen, tiny_run
from helpers.damage import rewrite
from helpers.wide import case, slow
from visprompt.data.sources import digits
from visprompt.errors import UserError
from visprompt.models.tensors import hash_tensors
from visprompt.models.tuned_state import load_state, save_state
from visprompt.reports import inspection
from visprompt.reports.scored import scored
from visprompt.runs import run

pytestmark = frozen
RUNS = {
    "vpt_deep": (),
    "vpt_shallow": ("method=vpt_shallow",),
    "linear": ("method=linear", "recipe.lr=0.4"),
    "full": ("method=full", "recipe.lr=0.02"),
    "sidetune": ("method=sidetune", "data.fraction=0.1"),
    "tune": ("split=tune",),
    "tune, linear": ("split=tune", "method=linear"),
    "e2vpt": ("method=e2vpt", "method.prune=false", "method.num_tokens=3", "method.num_kv_tokens=2"),
    "mixed": ("precision=bf16-mixed",),
    "half": ("precision=bf16-true",),
}
QUICK = ("vpt_deep", "tune", "e2vpt")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def opened(logs):
    """A finished run, opened; each is made once."""
    done = {}

    def get(name):
        if name not in done:
            one = tiny_run(logs, "recipe.epochs=2", *RUNS[name])
            run.run_job(one)
            before = content(one.folder)
            done[name] = inspection.open_run(one.folder)
            assert content(one.folder) == before
        return done[name]

    return get


def pixels(one):
    """Images of the scored set as the network reads them, before normalisation, [N, 3, H, W] in 0..1, and labels."""
    images, labels, _ = digits.compose("digits", "test" if one.result.split == "final" else "val200")
    return torch.from_numpy(images) / 255, torch.from_numpy(np.asarray(labels))


@pytest.mark.parametrize("name", [case(n, fast=n in QUICK) for n in RUNS])
def test_counts_are_those_that_the_run_scored(opened, name):
    one = opened(name)
    found = scored(one)
    metric, size = ("val", 200) if name.startswith("tune") else ("test", 797)
    assert found.set_name == one.set_name == {"val": "val200", "test": "test"}[metric]
    assert found.class_names == tuple(map(str, range(10)))
    assert found.counts.dtype == np.int64
    assert found.counts.sum() == size
    assert np.trace(found.counts) / size == one.result.metrics[f"{metric}/acc"]
    assert found.counts.sum(1).tolist() == np.bincount(pixels(one)[1]).tolist()
    shares = found.counts.diagonal() / found.counts.sum(1)
    assert shares.tolist() == pytest.approx(list(one.result.per_class.values()), abs=1e-6)
    assert found.counts.sum(0).tolist() != found.counts.sum(1).tolist(), (
        "else rows and columns could be confused"
    )


def test_columns_are_predicted_classes(opened):
    one = opened("linear")
    images, labels = pixels(one)
    with torch.no_grad():
        predicted = one.classifier((images - 0.5) / 0.5).argmax(1)
    assert scored(one).counts[3].tolist() == np.bincount(predicted[labels == 3], minlength=10).tolist()


def test_counts_that_give_another_score_than_the_record_are_refused(opened):
    one = opened("linear")
    metrics = one.result.metrics | {"test/acc": one.result.metrics["test/acc"] + 8 / 797}
    recorded, found = f"{100 * metrics['test/acc']:.2f} %", f"{100 * one.result.score:.2f} %"
    message = f"^{one.folder} recorded {recorded} on test, and this machine finds {found}: use the kind of device it "
    with pytest.raises(UserError, match=message + r"ran on \(cpu\), and the versions it names$"):
        scored(replace(one, result=one.result.model_copy(update={"metrics": metrics})))


@pytest.mark.parametrize("name", ["vpt_deep", slow("full"), slow("sidetune"), "tune"])
def test_features_are_those_the_head_reads_and_those_of_timms_own_model(opened, logs, name):
    one = opened(name)
    found = inspection.features(one)
    images, labels = pixels(one)
    assert found.rows.tolist() == list(range(len(images)))
    assert found.labels.tolist() == labels.tolist()
    assert found.after.dtype == found.before.dtype == np.float32
    with torch.no_grad():
        logits = one.classifier.head(torch.from_numpy(found.after))
        assert float((logits.argmax(1) == labels).double().mean()) == one.result.score
        model = create_model(
            "vit_tiny_patch16_224", num_classes=0, **NET | {"img_size": images.shape[-1]}
        ).eval()
        model.load_state_dict(load_file(logs / "weights.safetensors"))
        expected = model((images - 0.5) / 0.5).numpy()
    assert np.abs(found.before - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found.after - found.before).max() > 1e-3
    assert hash_tensors(one.backbone.module.model.state_dict()) == one.backbone.sha256
    assert not one.backbone.module.training


def test_features_before_and_after_are_equal_where_the_head_alone_is_tuned(opened):
    found = inspection.features(opened("linear"))
    assert np.array_equal(found.after, found.before)


def test_some_images_are_drawn_by_the_seed_and_are_rows_of_all(opened):
    one = opened("vpt_deep")
    some, same, other = (inspection.features(one, limit=70, seed=seed) for seed in (1, 1, 2))
    whole = inspection.features(one)
    assert len(set(some.rows)) == 70
    assert some.rows.tolist() == sorted(some.rows)
    assert np.array_equal(some.after, same.after)
    assert not np.array_equal(some.rows, other.rows)
    assert np.allclose(some.after, whole.after[some.rows], rtol=1e-4, atol=1e-5)
    assert np.array_equal(some.labels, whole.labels[some.rows])


def test_the_plane_keeps_groups_apart_and_is_the_same_each_time():
    centers = np.repeat(10 * np.eye(3, 8), 40, axis=0)
    points = (centers + np.random.default_rng(0).normal(size=(120, 8))).astype(np.float32)
    placed = inspection.embed(points, seed=3)
    assert placed.shape == (120, 2)
    assert placed.dtype == np.float32
    assert np.array_equal(placed, inspection.embed(points, seed=3))
    groups = placed.reshape(3, 40, 2)
    spread = np.linalg.norm(groups - groups.mean(1, keepdims=True), axis=-1).max()
    nearest = min(np.linalg.norm(groups[a].mean(0) - groups[b].mean(0)) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert nearest > spread


@pytest.mark.parametrize("count", [4, 5, 31])
def test_few_images_have_a_place_too(count):
    points = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    placed = inspection.embed(points)
    assert placed.shape == (count, 2)
    assert np.isfinite(placed).all()
    assert len(np.unique(placed, axis=0)) == count


def test_equal_images_have_one_place_and_three_have_none():
    assert not inspection.embed(np.ones((9, 6), np.float32)).any()
    with pytest.raises(
        UserError, match=r"^t-SNE needs at least 4 images, and there are 3: take a larger set$"
    ):
        inspection.embed(np.zeros((3, 6), np.float32))


@pytest.mark.parametrize(
    "name", ["vpt_deep", "vpt_shallow", "linear", "e2vpt", "tune", slow("mixed"), slow("half")]
)
def test_attention_comes_with_its_images(opened, name):
    one = opened(name)
    rows = [150, 3, 3]
    found = inspection.attention(one, rows)
    images, labels = pixels(one)
    side = images.shape[-1] // NET["patch_size"]
    assert found.asking == "the class token"
    assert found.block == NET["depth"] - 1
    assert found.images.shape == (3, *images.shape[2:], 3)
    tolerance = 0.01 if name == "half" else 1e-6
    assert np.abs(found.images - images[rows].permute(0, 2, 3, 1).numpy()).max() < tolerance
    assert found.labels.tolist() == labels[rows].tolist()
    total = (
        found.prefix.sum(-1) + found.patches.sum((-1, -2)) + found.prompts.sum(-1) + found.keys_values.sum(-1)
    )
    assert np.abs(total - 1).max() < 1e-6
    assert found.patches.shape == (3, 2, side, side)
    assert found.prompts.shape == (3, 2, {"linear": 0, "e2vpt": 3}.get(name, 4))
    assert found.keys_values.shape == (3, 2, 2 if name == "e2vpt" else 0)
    assert np.array_equal(found.patches[1], found.patches[2])
    assert not np.allclose(found.patches[0], found.patches[1], atol=1e-3)


def test_predictions_beside_attention_are_those_of_the_counts(opened):
    one = opened("full")
    found = inspection.attention(one, range(797))
    assert float((found.predicted == found.labels).mean()) == one.result.score


@pytest.mark.parametrize(("rows", "asked"), [([0, 797], "image 797"), ([-1], "image -1"), ([], "no image")])
def test_images_that_are_not_there_are_named(opened, rows, asked):
    with pytest.raises(UserError, match=rf"^{asked} was asked for, of test in .*linear/\w+: give 0 to 796$"):
        inspection.attention(opened("linear"), rows)


def test_latency_is_a_median_with_its_spread(opened):
    one = opened("mixed")
    found = inspection.latency(one, (1, 8), repeats=4)
    assert [latency.batch_size for latency in found] == [1, 8]
    for latency in found:
        assert 0 < latency.low <= latency.seconds <= latency.high
        assert 3 <= latency.repeats <= 4
        assert (latency.device, latency.threads) == ("cpu", torch.get_num_threads())
        assert latency.precision == "bf16-mixed"
    assert inspection.latency(one, (1,), repeats=50, seconds=0.0)[0].repeats == 3
    assert inspection.latency(one, (1,), repeats=1)[0].repeats == 1


def test_own_images_scored_in_tune(tmp_path):
    root = miniatures.write_folder(tmp_path / "pets", per_class=5, splits=("train", "val", "test"))
    options = ("data=folder", f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=4")
    one = tiny_run(tmp_path / "logs", *options, "split=tune")
    result = run.run_job(one)
    opened = inspection.open_run(one.folder, data_dir=f"{tmp_path}/data")
    counts = scored(opened)
    assert counts.set_name == "val"
    assert np.trace(counts.counts) / counts.counts.sum() == result.score
    placed = inspection.embed(inspection.features(opened).after)
    assert placed.shape == (counts.counts.sum(), 2)
    # the same run where the data folder is another one
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = inspection.open_run(one.folder, data_dir=str(tmp_path / "elsewhere"))
    assert np.array_equal(scored(moved).counts, counts.counts)


def test_what_cannot_be_opened_is_said_in_one_sentence(opened, logs, tmp_path):
    folder = opened("linear").folder
    with pytest.raises(
        UserError, match=r"holds no finished run: give the folder that was printed below its table$"
    ):
        inspection.open_run(tmp_path)
    with pytest.raises(
        UserError, match=r"^device=gpu is not a device of this machine: choose auto, cpu or cuda$"
    ):
        inspection.open_run(folder, "gpu")
    with pytest.raises(
        UserError, match=r"^there is no file of backbone weights at /nowhere: give weights=FILE$"
    ):
        inspection.open_run(folder, weights="/nowhere")
    half = shutil.copytree(folder, tmp_path / "half")
    stored = json.loads((half / "result.json").read_text())
    rewrite(half / "result.json", data=stored["data"] | {"fingerprint": "0" * 64})
    with pytest.raises(
        UserError, match=r"half have changed since it was trained: restore them, or train again$"
    ):
        inspection.open_run(half)
    (half / "config.yaml").write_text("data: [")
    with pytest.raises(
        UserError,
        match=r"half/config\.yaml cannot be read \(it is cut off or not YAML\): copy the whole folder of the run$",
    ):
        inspection.open_run(half)
    (half / "config.yaml").unlink()
    with pytest.raises(
        UserError, match=r"cannot be read \(.*No such file.*\): copy the whole folder of the run$"
    ):
        inspection.open_run(half)
    (half / "result.json").unlink()
    with pytest.raises(
        UserError, match=r"half holds no finished run: give the folder that was printed below its table$"
    ):
        inspection.open_run(half)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"decode": None},
            "old is of an older version, which did not record its decode: run its command again$",
        ),
        (
            {"flip": 0.5},
            "old was tuned with other preprocessing than .*config.yaml: give runs with the same one$",
        ),
    ],
)
def test_other_preprocessing_than_the_record_is_named(opened, tmp_path, changes, sentence):
    old = shutil.copytree(opened("linear").folder, tmp_path / "old")
    state = load_state(old)
    preprocessing = {
        key: value for key, value in (state.preprocessing | changes).items() if key != "decode" or value
    }
    checksum = save_state(old / "tuned.safetensors", replace(state, preprocessing=preprocessing))
    tuned = json.loads((old / "result.json").read_text())["tuned"]
    size = (old / "tuned.safetensors").stat().st_size
    rewrite(old / "result.json", tuned=tuned | {"bytes": size, "sha256": checksum})
    with pytest.raises(UserError, match=sentence):
        inspection.open_run(old)
