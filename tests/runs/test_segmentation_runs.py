"""Runs that give each pixel a class: their figures and files, what they skip, and where they end."""

import csv

import pytest
import torch

from helpers.cli import equal, frozen, tensors, tiny_job, tiny_run
from helpers.epochs import trained
from helpers.miniatures.masks import write_masks
from visprompt.errors import UserError
from visprompt.models.tuned_state import load_state
from visprompt.runs import run
from visprompt.runs.result import load_result

pytestmark = frozen
TASK = "data=demo/digits_masks"
SHORT = ("recipe.epochs=2", "recipe.warmup_epochs=0")


def made(logs, *words):
    one = tiny_run(logs, TASK, *SHORT, *words)
    return one, run.run_job(one)


def test_a_run_is_scored_by_mean_iou_and_writes_counts_of_pixels(tmp_path):
    one, result = made(tmp_path)
    assert result.score == result.metrics["test/miou"]
    assert {"test/mean_acc", "test/pixel_acc", "train/pixel_acc", "train/loss"} <= result.metrics.keys()
    assert (result.kind, result.metrics["test/count"], result.interval) == ("segmentation", 797, None)
    assert list(result.per_class) == ["background", *map(str, range(10))]
    known = [share for share in result.per_class.values() if share is not None]
    assert result.score == pytest.approx(sum(known) / len(known))
    assert load_result(one.folder) == result
    rows = list(csv.DictReader((one.folder / "classes.csv").read_text().splitlines()))
    assert sum(int(row["pixels"]) for row in rows) == 797 * 64 * 64
    state = load_state(one.folder)
    assert (state.kind, state.head, state.temperature) == ("segmentation", "linear", None)
    assert "head" not in result.recipe, "the default is not part of the identity"


def test_a_frozen_backbone_is_run_once_and_changes_no_bit(tmp_path, monkeypatch):
    words = (TASK, *SHORT, "method=linear", "split=tune")
    one = tiny_run(tmp_path, *words)
    kept = run.run_job(one)
    monkeypatch.setattr("visprompt.models.classifier.Classifier.has_frozen_part", False)
    other = run.prepare(tiny_job(tmp_path / "other", *words))
    every = run.run_job(other)
    assert kept.metrics["val/loss"] == pytest.approx(every.metrics["val/loss"], rel=1e-5)
    assert kept.metrics["val/miou"] == pytest.approx(every.metrics["val/miou"], abs=1e-4)


def test_training_ends_after_max_steps_and_goes_on_at_the_end_of_a_pass(tmp_path):
    length = ("recipe.epochs=9", "recipe.warmup_epochs=0", "recipe.schedule=poly", "recipe.max_steps=40")
    words = (TASK, *length, "recipe.batch_size=64")
    whole = tiny_run(tmp_path / "whole", *words)
    begun = trained(whole)
    assert [begun.count(epoch) for epoch in range(4)] == [16, 16, 8, 0]
    assert load_result(whole.folder).recipe["max_steps"] == 40
    killed = tiny_run(tmp_path / "killed", *words)
    trained(killed, die_in=2)
    assert trained(killed) == [2] * 8
    assert equal(tensors(whole.folder), tensors(killed.folder))
    assert load_result(whole.folder).metrics == load_result(killed.folder).metrics


def test_the_published_head_is_trained_with_its_batch_statistics(tmp_path):
    words = ("recipe.head_init=normal", "data.fraction=0.02", "split=tune", "+trainer.limit_val_batches=1")
    one, result = made(tmp_path, "recipe.head=setr_pup", *words)
    state = load_state(one.folder)
    assert (state.head, result.recipe["head"]) == ("setr_pup", "setr_pup")
    counted = state.tensors["head.main.norms.0.num_batches_tracked"]
    assert int(counted) == 2
    assert not torch.equal(state.tensors["head.main.norms.0.running_mean"], torch.zeros(256))


def test_the_published_head_is_refused_over_several_cpu_processes_and_on_other_tasks(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.head=setr_pup is the head of segmentation tasks"):
        run.run_job(tiny_run(tmp_path, "recipe.head=setr_pup"))


def own(tmp_path, *words):
    """A run on own images of 48 x 64 pixels with masks, in windows of the tiny backbone's 64 pixels."""
    root = write_masks(tmp_path / "gardens", 10, splits=("train", "val", "test"), size=(70, 100))
    words = (f"data.root={root}", f"paths.data_dir={tmp_path}/data", "recipe.batch_size=5", *SHORT, *words)
    return tiny_run(tmp_path, "data=segmentation/folder", *words)


def test_own_images_with_masks_are_trained_in_crops_and_scored_whole(tmp_path):
    one = own(tmp_path)
    result = run.run_job(one)
    assert (result.task, result.kind, result.metrics["test/count"]) == ("gardens", "segmentation", 10)
    rows = list(csv.DictReader((one.folder / "classes.csv").read_text().splitlines()))
    assert sum(int(row["pixels"]) for row in rows) == 10 * 70 * (100 - 4)  # a stripe is ignored
    assert {"val/miou", "val/loss"} <= result.metrics.keys()
    state = load_state(one.folder)
    assert (state.class_names, state.preprocessing["resize"]) == (("ground", "tree", "sky"), "windows")


def test_without_changes_images_of_several_sizes_are_not_cached(tmp_path):
    words = ("data.scale=null", "data.flip=0", "data.jitter=false", "method=linear", "split=tune")
    one = own(tmp_path, *words)
    assert not one.datamodule.augments
    assert run.run_job(one).metrics["val/count"] == 10


def test_initial_values_come_from_the_middle_of_images(tmp_path):
    one = own(tmp_path, "split=tune", "method.init=patch_sample")
    assert run.run_job(one).status == "finished"


def test_operations_are_counted_for_each_head(tmp_path):
    words = ("split=tune", "data.fraction=0.02", "+trainer.limit_val_batches=1", "method=linear")
    macs = {}
    for head in ("linear", "setr_pup"):
        one = tiny_run(tmp_path, TASK, *SHORT, *words, f"recipe.head={head}", "recipe.epochs=1")
        macs[head] = run.run_job(one).tuned["macs"]
    assert macs["setr_pup"] > 10 * macs["linear"]
