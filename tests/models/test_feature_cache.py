import logging
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from helpers.cli import frozen as frozen_backbone
from helpers.cli import tiny_run
from helpers.tiny import tiny_classifier
from helpers.wide import slow
from visprompt.data.datasets import ArrayDataset, DeviceDataset, Ticket
from visprompt.errors import UserError
from visprompt.models import feature_cache
from visprompt.models.classifier import Classifier
from visprompt.models.feature_cache import keep
from visprompt.models.fit_checks import check_batch_norm
from visprompt.models.methods import inits
from visprompt.models.tuned_state import load_state
from visprompt.runs import run

pytestmark = frozen_backbone
Usage = namedtuple("Usage", "total used free")


def parts():
    yield from torch.arange(30, dtype=torch.float32).view(10, 3).split(4)


@pytest.mark.parametrize("memory", [1000, 100])
def test_rows_are_put_together_in_memory_or_in_a_file(monkeypatch, memory):
    mapped, original = [], np.memmap

    def note(*arguments, **options):
        mapped.append(original(*arguments, **options))
        return mapped[-1]

    monkeypatch.setattr(feature_cache, "free_memory", lambda: memory)
    monkeypatch.setattr(np, "memmap", note)
    kept = keep(parts(), 10)
    assert kept.tolist() == np.arange(30).reshape(10, 3).tolist()
    assert len(mapped) == (memory == 100)
    if mapped:
        assert kept.data_ptr() == mapped[0].ctypes.data
        assert mapped[0].filename is None, "the file has no name, and goes with the process"


def test_rows_stay_on_a_device_that_has_room(monkeypatch):
    """As on a GPU; here the device is the CPU, and its rows are told by where they were allocated."""
    places, original = [], torch.empty

    def note(shape, device=None):
        places.append(device)
        return original(shape, device=device)

    monkeypatch.setattr(feature_cache, "has_own_memory", lambda device: True)
    monkeypatch.setattr(torch, "empty", note)
    monkeypatch.setattr(feature_cache, "free_on", lambda device: 4 * 120 + 1)
    kept = keep(parts(), 10, key=("a task", "train"))
    monkeypatch.setattr(feature_cache, "free_on", lambda device: 4 * 120)
    keep(parts(), 10, key=("a task", "val"))
    assert places == [torch.device("cpu"), None], "in host memory, if they take a quarter of the device's"
    assert kept.tolist() == np.arange(30).reshape(10, 3).tolist()
    feature_cache.release("a task")
    assert keep(parts(), 10, key=("a task", "train")) is kept
    feature_cache.release("another")
    assert keep(parts(), 10, key=("a task", "train")) is not kept


def test_no_room_is_said(monkeypatch, caplog):
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 100)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: Usage(1, 1, 100))
    caplog.set_level(logging.INFO)
    assert keep(parts(), 10) is None
    assert "the frozen blocks run in every epoch: their output, 0.0 GB, has no room" in caplog.text


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    for name in ("_outputs", "_pixels"):
        monkeypatch.setattr(feature_cache, name, OrderedDict())


def test_what_begins_with_the_same_bits_is_not_computed_again():
    first = keep(parts(), 10, key=("a",))
    again = parts()
    assert keep(again, 10, key=("a",)) is first
    assert len(list(again)) == 2, "one of three batches was looked at"
    assert keep(parts(), 10, key=("b",)) is not first
    assert keep((part + 1 for part in parts()), 10, key=("a",))[0].tolist() == [1, 2, 3], "other weights"
    assert keep(parts(), 10) is not keep(parts(), 10)


def test_only_the_last_two_sets_are_kept():
    for key in "abc":
        keep(parts(), 10, key=(key,))
    assert list(feature_cache._outputs) == [("b",), ("c",)]


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", ()), slow("partial", ()), ("vpt_deep", ("method.depth=1", "method.depth_from=last"))],
)
def test_a_grid_computes_what_is_frozen_once(tmp_path, monkeypatch, method, options):
    seen, original = [], Classifier.frozen

    def count(self, images):
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Classifier, "frozen", count)
    given = (f"method={method}", "split=tune", "recipe.epochs=1", "recipe.warmup_epochs=0", *options)
    run.run_job(tiny_run(tmp_path / "grid", *given, "recipe.lr=0.1"))
    assert sum(seen) == 1000
    seen.clear()
    second = run.run_job(tiny_run(tmp_path / "grid", *given, "recipe.lr=0.2"))
    assert seen == [64, 64], "the first batch of either set shows that nothing has changed"
    monkeypatch.setattr(feature_cache, "_outputs", OrderedDict())
    alone = run.run_job(tiny_run(tmp_path / "alone", *given, "recipe.lr=0.2"))
    assert second.tuned["sha256"] == alone.tuned["sha256"]
    assert second.metrics == alone.metrics


@pytest.mark.slow
def test_pixels_that_lie_on_a_device_change_nothing(tmp_path, monkeypatch):
    """As on a GPU; here the device is the CPU."""
    given = ("method=vpt_deep", "split=tune", "recipe.epochs=1", "recipe.warmup_epochs=0")
    plain = run.run_job(tiny_run(tmp_path / "plain", *given))
    sets, original = [], feature_cache.on_device

    def note(dataset, device, key):
        sets.append(original(dataset, device, key))
        return sets[-1]

    monkeypatch.setattr("visprompt.models.tuning_module.has_own_memory", lambda device: True)
    monkeypatch.setattr("visprompt.models.tuning_module.on_device", note)
    monkeypatch.setattr(feature_cache, "free_on", lambda device: 2**30)
    given += ("data.num_workers=1", "data.pin_memory=true")  # of no use to what lies there
    there = [run.run_job(tiny_run(tmp_path / f"there{i}", *given)) for i in range(2)]
    assert [type(dataset) for dataset in sets] == [DeviceDataset] * 4
    assert sets[0].images is sets[2].images, "from run to run"
    assert {one.tuned["sha256"] for one in there} == {plain.tuned["sha256"]}
    assert there[0].metrics == plain.metrics
    run.run_job(tiny_run(tmp_path / "there", "method=linear", *given[1:4]))
    assert not feature_cache._pixels, "a run that reads none of them holds none"


def test_pixels_without_room_on_the_device_stay_where_they_are(monkeypatch):
    dataset = ArrayDataset(
        np.arange(24, dtype=np.uint8).reshape(4, 3, 1, 2), np.array([0, 1, 1, 0]), list("abcd")
    )
    cpu = torch.device("cpu")
    monkeypatch.setattr(feature_cache, "free_on", lambda device: 95)
    assert feature_cache.on_device(dataset, cpu, ("a task", 1)) is dataset
    monkeypatch.setattr(feature_cache, "free_on", lambda device: 96)
    there = feature_cache.on_device(dataset, cpu, ("a task", 1))
    feature_cache.release("a task")
    assert feature_cache.on_device(dataset, cpu, ("a task", 1)).images is there.images
    feature_cache.release("another")
    assert feature_cache.on_device(dataset, cpu, ("a task", 1)).images is not there.images
    tickets = [Ticket(2, None, 0.5), Ticket(0, None, 1.0)]
    batch, own = there.__getitems__(tickets), dataset.__getitems__(tickets)
    assert all(torch.equal(a, b) for a, b in zip(batch, own, strict=True))
    part, own = there.subset(np.array([3, 2])), dataset.subset(np.array([3, 2]))
    assert np.array_equal(part.pixels(tickets[1:]), own.pixels(tickets[1:]))
    assert part.labels.tolist() == own.labels.tolist() == [0, 1]
    assert part.keys == own.keys == ["d", "c"]


@pytest.mark.parametrize("method", [slow("partial"), "vpt_deep"])
def test_frozen_first_blocks_run_once_and_change_nothing(tmp_path, monkeypatch, method):
    """partial-1 on two blocks, and prompts in the last one: the first block sees each training image once."""
    options = [f"method={method}"] + (
        [] if method == "partial" else ["method.depth=1", "method.depth_from=last"]
    )
    results = {}
    for way in ("kept", "not"):
        if way == "not":
            monkeypatch.setattr("visprompt.models.tuning_module.keep", lambda *_: None)
        one = tiny_run(tmp_path / way, *options, "recipe.lr=0.01")
        results[way] = run.run_job(one)
    assert results["kept"].metrics["train/loss"] == pytest.approx(
        results["not"].metrics["train/loss"], rel=1e-4
    )
    assert results["kept"].score == pytest.approx(results["not"].score, abs=0.01)


def test_prompts_start_as_features_once(tmp_path, monkeypatch):
    seen, original = [], inits.initialise

    def note(method, backbone, images, seed):
        before = method.prompts.detach().clone()
        original(method, backbone, images, seed)
        seen.append((before, method.prompts.detach().clone()))

    monkeypatch.setattr("visprompt.models.tuning_module.initialise", note)
    run.run_job(tiny_run(tmp_path, "method.init=patch_pool", "recipe.epochs=2"))
    ((before, after),) = seen
    assert not torch.equal(before, after)
    assert after.std() > 0


def test_trained_batch_norm_is_refused_under_accumulation(tmp_path):
    options = ("method=mlp", "trainer.accumulate_grad_batches=2", "recipe.epochs=1", "recipe.warmup_epochs=0")
    with pytest.raises(
        UserError, match=r"batch norm is trained here, .*: set trainer.accumulate_grad_batches=1"
    ):
        run.run_job(tiny_run(tmp_path, *options))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"on_cpu": True, "short": 0}, "cannot be synchronised over CPU processes: set trainer.devices=1"),
        (
            {"on_cpu": False, "short": 1},
            "the last batch of 1 images is too short for 2 devices: change recipe.",
        ),
    ],
)
def test_trained_batch_norm_is_refused_on_several_processes(where, message):
    classifier = tiny_classifier("mlp")
    with pytest.raises(UserError, match=message):
        check_batch_norm(classifier, accumulated=1, processes=2, **where)
    check_batch_norm(tiny_classifier("linear"), accumulated=1, processes=2, **where)
    check_batch_norm(classifier, accumulated=1, processes=2, on_cpu=False, short=2)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_prompts_that_it_trained(tmp_path, monkeypatch):
    """Killed behind the last epoch, before the test set was read."""
    options = ("method.init=patch_pool", "recipe.epochs=2")
    whole = run.run_job(tiny_run(tmp_path / "whole", *options))
    cut = tiny_run(tmp_path / "cut", *options)

    def stop(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.Trainer.test", stop)
        with pytest.raises(RuntimeError, match="killed"):
            run.run_job(cut)
    again = run.run_job(cut)
    assert again.score == whole.score
    assert again.tuned["sha256"] == whole.tuned["sha256"]


@pytest.mark.parametrize("whitening", ["frozen", "tuned"])
def test_right_matrices_are_made_of_training_images_and_saved(tmp_path, monkeypatch, whitening):
    seen, original = [], inits.initialise

    def note(method, backbone, images, seed):
        before = method.right.detach().clone()
        original(method, backbone, images, seed)
        seen.append((before, method.right.detach().clone()))

    monkeypatch.setattr("visprompt.models.tuning_module.initialise", note)
    options = ("method=vpt_low_rank", "method.rank=2", f"method.whitening={whitening}", "recipe.epochs=1")
    one = tiny_run(tmp_path, *options, "recipe.warmup_epochs=0")
    run.run_job(one)
    ((before, after),) = seen
    assert not torch.equal(before, after)
    saved = load_state(one.folder).tensors["right"]
    assert torch.equal(saved, after) == (whitening == "frozen")
