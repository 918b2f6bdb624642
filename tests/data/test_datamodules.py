import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from helpers.miniatures import write_folder
from helpers.wide import case
from visprompt.data.catalog import TASKS
from visprompt.data.folder_datamodule import FolderDataModule
from visprompt.data.sources.images import decode
from visprompt.data.stores import ragged
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.runs.compose import composing, job

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
GIVEN = {"batch_size": 4, "split": "final", "seed": 42, "image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3}


def composed(spec, *arguments):
    with composing():
        return job("train", [f"data={spec.config}", *arguments])


# fast: the first task of each family and those of the demo
FIRST = {spec.family: spec for spec in reversed(TASKS.values())}


@pytest.mark.parametrize(
    "spec",
    [case(s, fast=s is FIRST[s.family] or s.family == "demo", id=s.id) for s in TASKS.values()],
)
def test_every_task_has_a_config_and_a_module_that_agree_with_its_record(spec):
    config = dict(composed(spec).data)
    path, name = config.pop("_target_").rsplit(".", 1)
    data = getattr(import_module(path), name)(**config, **GIVEN)
    assert data.task == spec.id
    if spec.family == "demo":
        assert data.class_names == spec.class_names
        assert data.sizes == dict(spec.split_sizes)
        assert len(data.test_dataset) == spec.split_sizes["test"]
    else:
        assert data.plan.spec is spec
        assert data.plan.source == "raw"
        assert data.mean == (0.485, 0.456, 0.406), "the preset of the Visual Prompt Tuning code"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ("bilinear", "tf1", "imagenet")),
        (("preprocessing=task_adaptation",), ("bilinear", "tf1", "none")),
        (("preprocessing=petl",), ("bicubic", "pillow", "imagenet")),
        (("preprocessing.normalisation=inception",), ("bilinear", "tf1", "inception")),
    ],
)
def test_presets_of_preprocessing(arguments, expected):
    data = composed(TASKS["cifar"], *arguments).data
    assert (data.interpolation, data.resampling, data.normalisation) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ("bicubic", "pillow", "model")),
        (("preprocessing=task_adaptation",), ("bilinear", "tf1", "none")),
        (("preprocessing=model",), ("bilinear", "pillow", "model")),
        (("preprocessing=petl",), ("bicubic", "pillow", "imagenet")),
        (("data.interpolation=bilinear",), ("bilinear", "pillow", "model")),
    ],
)
def test_preprocessing_means_what_it_says_for_own_images(tmp_path, arguments, expected):
    with composing():
        data = job("train", ["data=folder", f"data.root={tmp_path}", *arguments]).data
    assert (data.interpolation, data.resampling, data.normalisation) == expected


def own(tmp_path, root, **options):
    return FolderDataModule(root=str(root), store_dir=str(tmp_path / "stores"), **{**GIVEN, **options})


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", ("cat", "dog"), 10)


def test_the_config_of_own_images_names_every_argument(tmp_path, pets):
    config = yaml.safe_load((CONFIGS / "folder.yaml").read_text())
    assert config.pop("defaults") == [{"override /preprocessing@_global_.preprocessing": "own_images"}]
    assert config.pop("normalisation") == "${preprocessing.normalisation}"
    assert config.pop("interpolation") == "${preprocessing.interpolation}"
    assert config.pop("resampling") == "${preprocessing.resampling}"
    assert config.pop("_target_") == "visprompt.data.folder_datamodule.FolderDataModule"
    assert config.pop("root") == "???"
    assert config.pop("store_dir") == "${paths.data_dir}/stores"
    data = own(tmp_path, pets, **config)
    assert (data.task, data.source, data.num_classes, data.augments) == ("pets", "folder", 2, True)
    assert data.class_names == ("cat", "dog")
    assert data.sizes == {"train": 16, "val": 2, "test": 2}


def test_facts_are_known_before_any_image_is_decoded(tmp_path, pets, monkeypatch):
    monkeypatch.setattr(ragged, "_write", None)
    data = own(tmp_path, pets, name="my pets")
    assert data.task == "my pets"
    assert data.num_classes == 2
    assert len(data.fingerprint) == 64


@pytest.mark.parametrize(("size", "short"), [(224, 256), (384, 438), (448, 512), (64, 73)])
def test_the_short_side_follows_the_image_size(tmp_path, pets, size, short):
    data = own(tmp_path, pets, image_size=size)
    assert data.short_side == data.preprocessing["short_side"] == short
    assert data.preprocessing["resize"] == "short_side"
    assert data.preprocessing["crop"] == "random"


def test_splits_of_own_images(tmp_path, pets):
    tune, final = own(tmp_path, pets, split="tune"), own(tmp_path, pets)
    more = own(tmp_path, pets, final="train+val")
    assert [len(data.train_dataset) for data in (tune, final, more)] == [16, 16, 18]
    assert len(tune.val_dataset) == 2
    assert len(final.val_dataset) == 2
    assert [data.validates for data in (tune, final, more)] == [True, True, False]
    assert more.val_dataloader() == []
    assert (final.source, more.source) == ("folder", "folder:train+val")
    with pytest.raises(UserError, match=r"split=tune has no test set \(it scores val\)"):
        tune.test_dataloader()


def test_batches_of_own_images(tmp_path, pets):
    data = own(tmp_path, pets)
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 28, 28)
    assert data.on_after_batch_transfer(batch, 0).images.dtype == torch.float32
    assert torch.cat([batch.rows for batch in data.test_dataloader()]).tolist() == [0, 1]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resampling", ["pillow", "tf2"])
def test_prediction_prepares_a_file_as_evaluation_does(tmp_path, pets, interpolation, resampling):
    data = own(tmp_path, pets, interpolation=interpolation, resampling=resampling)
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    first = data.store.keys[int(data.test_dataset.rows[0])]
    assert torch.equal(to_input(decode(pets / first), data.preprocessing), batch.images[0])


@pytest.mark.parametrize("crop", [True, False])
def test_crop_and_flip_decide_whether_training_images_vary(tmp_path, pets, crop):
    data = own(tmp_path, pets, crop=crop, flip=0.0)
    assert data.augments is crop
    assert data.preprocessing["crop"] == ("random" if crop else "center")


def test_missing_sets_are_named(tmp_path):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 4, splits=("train",))
    assert own(tmp_path, root).sizes == {"train": 8}
    no_test = (
        "pets has no test images: add test/<class>/ folders (or CSV rows), train with split=tune, which "
        "scores val, or give data.test=none, which trains and scores nothing"
    )
    no_val = "pets has no val images: add val/<class>/ folders (or CSV rows)"
    wanted = [({}, no_test), ({"split": "tune"}, no_val), ({"final": "train+val"}, no_val)]
    for options, sentence in [*wanted, ({"final": "train+val", "test": "none"}, no_val)]:
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            own(tmp_path, root, **options).check_sets()
    with pytest.raises(UserError, match=f"^{re.escape(no_test)}$"):
        own(tmp_path, root).test_dataloader()
    own(tmp_path, root, test="none").check_sets()
    assert not (tmp_path / "stores" / "checksums").exists()
    write_folder(root, ("cat", "dog"), 1, splits=("test",))
    with pytest.raises(
        UserError, match=r"^data.test=none, but pets has test images: remove that option to score them$"
    ):
        own(tmp_path, root, test="none").check_sets()
    with pytest.raises(UserError, match=r"^unknown data.test 'no': did you mean none\?"):
        own(tmp_path, root, test="no")


def test_a_split_of_which_nothing_can_be_read_is_known_before_training(tmp_path):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 4, splits=("train", "test"))
    for file in (root / "test").rglob("*.png"):
        file.write_text("damaged")
    data = own(tmp_path, root, skip_bad=True)
    data.check_sets()
    with pytest.raises(UserError, match=r"^pets has no test images"):
        data.prepare_data()


def test_wrong_values_are_named(tmp_path, pets):
    with pytest.raises(UserError, match=r"unknown data.final 'val': did you mean train\+val"):
        own(tmp_path, pets, final="val")
    with pytest.raises(UserError, match=r"data.name='a/b' cannot name a folder"):
        own(tmp_path, pets, name="a/b")
    with pytest.raises(UserError, match=r"data.name='a\\x1b\[31m' cannot name a folder"):
        own(tmp_path, pets, name="a\x1b[31m")
    with pytest.raises(UserError, match=r"data.name='' cannot name a folder"):
        own(tmp_path, "/")
    with pytest.raises(UserError, match=r"data.short_side=20 is below the backbone's 28 px"):
        own(tmp_path, pets, short_side=20)


def test_a_class_of_which_nothing_can_be_read(tmp_path, pets):
    for path in (pets / "dog").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="10 of 20 images cannot be used"):
        own(tmp_path, pets).prepare_data()
    data = own(tmp_path, pets, skip_bad=True)
    assert sum(data.sizes.values()) == 10
    with pytest.raises(UserError, match="no training image of class 'dog' can be read"):
        data.train_dataloader()


def test_own_images_are_learnt_from_their_own_pixels(tmp_path, pets):
    dataset = own(tmp_path, pets).train_dataset
    means = np.stack(
        [batch.images.float().mean((0, 2, 3)).numpy() for batch in map(dataset.__getitem__, tickets())]
    )
    cats = dataset.labels.numpy()[:16] == 0
    assert np.ptp(means[cats], axis=0).max() < np.abs(means[cats].mean(0) - means[~cats].mean(0)).max()


def tickets():
    from visprompt.data.datasets import Ticket

    return [Ticket(row, 0, 1.0) for row in range(16)]
