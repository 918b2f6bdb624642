import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from helpers.cli import ROOT
from helpers.miniatures import miniature
from helpers.miniatures.masks import COLOURS, png, write_masks
from visprompt.data import catalog
from visprompt.data.ade20k_datamodule import ADE20KDataModule
from visprompt.data.digits_datamodule import DigitsMasksDataModule
from visprompt.data.mask_folder_datamodule import MaskFolderDataModule
from visprompt.data.splits import md5_order
from visprompt.data.stores import manifest
from visprompt.data.transforms import to_input, window_size
from visprompt.errors import UserError
from visprompt.export.pictures import _pictures
from visprompt.runs import recorded
from visprompt.runs.compose import composing, job
from visprompt.runs.identity import identity_of

GIVEN = {"batch_size": 4, "split": "final", "seed": 42, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


def own(tmp_path, root, **options):
    return MaskFolderDataModule(root=str(root), store_dir=str(tmp_path / "stores"), **{**GIVEN, **options})


@pytest.fixture
def root(tmp_path):
    return write_masks(tmp_path / "streets", 12)


@pytest.fixture
def ade(tmp_path, monkeypatch):
    """Makes the data module of a miniature of ADE20K."""
    for name, spec in miniature.write("ade20k", "raw", tmp_path).items():
        monkeypatch.setitem(catalog.TASKS, name, spec)

    def make(**options):
        return ADE20KDataModule(
            data_dir=str(tmp_path), store_dir=str(tmp_path / "stores"), **{**GIVEN, **options}
        )

    return make


def test_the_official_validation_set_is_the_test_set_and_val_is_held_out_of_training(ade):
    data = ade(split="tune")
    names = [f"ADE_train_{number:08d}.jpg" for number in range(1, 13)]
    order = [f"training/{name}" for name in md5_order(names, "training")]
    assert set(data.train_dataset.keys) == set(order[:9])
    assert set(data.val_dataset.keys) == set(order[9:])
    final = ade()
    assert set(final.train_dataset.keys) == set(order)
    assert final.test_dataset.keys == [f"validation/ADE_val_{number:08d}.jpg" for number in range(1, 5)]
    assert (data.source, final.source) == ("raw", "raw:train+val")
    assert (data.validates, final.validates) == (True, False)
    assert ade(final="train").validates
    assert data.sizes == {"train": 9, "val": 3, "test": 4}
    assert data.num_classes == 150
    assert data.fingerprint == final.fingerprint


def test_labels_are_the_numbers_of_the_annotations_less_one(ade):
    data = ade()
    for batch in data.test_dataloader():
        assert (batch.labels[:, :4] == 255).all()
        assert (batch.labels[:, 4:] < 5).all()
        # what the images show: an annotation of 1 has the second colour, nearly, for JPEG
        colours = torch.tensor(COLOURS)[(batch.labels.long() + 1) % 6].permute(0, 3, 1, 2)
        off = (batch.images.long() - colours).abs().amax(1)[batch.labels != 255]
        assert (off < 40).float().mean() > 0.8


def test_an_unpacked_archive_gives_the_same_data(ade, tmp_path):
    import zipfile

    known = ade().fingerprint
    with zipfile.ZipFile(tmp_path / "raw" / "ade20k" / "ADEChallengeData2016.zip") as archive:
        archive.extractall(tmp_path / "elsewhere")
    for place in ("elsewhere", "elsewhere/ADEChallengeData2016"):
        assert ade(root=str(tmp_path / place)).fingerprint == known


def test_evaluation_has_one_image_a_batch_resized_as_prediction_does(ade):
    data = ade(image_size=24)
    batches = list(data.test_dataloader())
    assert [len(batch.images) for batch in batches] == [1] * 4
    for batch in batches:
        image = batch.images[0].numpy().transpose(1, 2, 0)
        moved = data.on_after_batch_transfer(batch, 0)
        assert tuple(moved.images.shape[2:]) == window_size(*image.shape[:2], 24)
        assert min(moved.images.shape[2:]) == 24
        assert torch.equal(moved.images[0], to_input(image, data.preprocessing))
        assert moved.labels.shape[1:] == image.shape[:2], "labels keep the size of the file"


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(512, 683, (512, 683)), (1024, 683, (768, 512)), (100, 1000, (205, 2048)), (683, 683, (512, 512))],
)
def test_the_long_side_is_at_most_four_times_the_short_one(height, width, expected):
    assert window_size(height, width, 512) == expected


def trainer(**given):
    return SimpleNamespace(**given, strategy=SimpleNamespace(root_device=torch.device("cpu")))


def test_training_batches_are_squares_that_are_normalised_only(root, tmp_path):
    data = own(tmp_path, root, short_side=40)
    data.trainer = trainer(training=True, global_rank=0, world_size=1, current_epoch=0)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 32, 32)
    moved = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(moved.images, (batch.images / 255 - 0.5) / 0.5)
    data.trainer.training = False
    assert data.on_after_batch_transfer(batch, 0).images.shape == (4, 3, 40, 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_same_on_any_number_of_ranks_and_workers(root, tmp_path, workers):
    def batches(world, **options):
        found = {}
        for rank in range(world):
            data = own(tmp_path, root, **options)
            data.trainer = trainer(training=True, global_rank=rank, world_size=world, current_epoch=3)
            for batch in data.train_dataloader():
                found |= {int(row): (image, labels) for image, labels, row in zip(*batch[:3], strict=True)}
        return found

    one, two = batches(1), batches(2, num_workers=workers)
    assert one.keys() == two.keys() == set(range(10))
    assert all(torch.equal(one[row][i], two[row][i]) for row in one for i in (0, 1))


def test_each_test_image_is_scored_on_one_of_several_ranks(tmp_path):
    root = write_masks(tmp_path / "streets", 3, splits=("train", "val", "test"))
    rows = []
    for rank in range(2):
        data = own(tmp_path, root)
        data.trainer = trainer(training=False, global_rank=rank, world_size=2, current_epoch=0)
        batches = list(data.test_dataloader())
        assert {len(batch.images) for batch in batches} == {1}
        rows += [int(batch.rows) for batch in batches]
    assert sorted(rows) == [0, 1, 2]


def test_a_fraction_is_a_share_of_all_images(root, tmp_path):
    part, whole = own(tmp_path, root, fraction=0.5).train_dataset, own(tmp_path, root).train_dataset
    assert len(whole) == 10
    assert len(part) == 5
    assert set(part.keys) < set(whole.keys)


def test_preprocessing_and_what_augments(root, tmp_path):
    data = own(tmp_path, root)
    assert data.augments
    assert data.preprocessing == {
        "size": 32,
        "resize": "windows",
        "short_side": 32,
        "decode": "upright",
        "native": None,
        "interpolation": "bilinear",
        "resampling": "pillow",
        "crop": "random",
        "flip": 0.5,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    plain = own(tmp_path, root, scale=None, flip=0.0, jitter=False, max_pixels=5000)
    assert not plain.augments
    assert plain.preprocessing["crop"] is None
    assert plain.preprocessing["max_pixels"] == 5000
    for some in ({"flip": 0.1}, {"jitter": True}, {"scale": [1, 1]}):
        assert own(tmp_path, root, **{"scale": None, "flip": 0.0, "jitter": False} | some).augments


def test_own_masks_have_a_name_a_summary_and_their_splits(root, tmp_path):
    data = own(tmp_path, root)
    assert (data.task, data.source, data.kind) == ("streets", "folder", "segmentation")
    assert data.class_names == ("ground", "tree", "sky")
    data.check_sets()
    assert data.described == [
        f"data: streets in {root}: 3 classes; images: train 10, val 1, test 1 (no splits were given: images "
        "were cut 80/10/10)"
    ]
    data.prepare_data()
    assert data.sizes == {"train": 10, "val": 1, "test": 1}
    assert data.summary["left_out"] == {}


def test_unreadable_pairs_are_in_the_summary(root, tmp_path):
    (root / "masks" / "001.png").write_bytes(b"x")
    (root / "images" / "notes.txt").write_text("x")
    data = own(tmp_path, root, skip_bad=True)
    data.prepare_data()
    assert data.described[1:] == ["left out: files of other formats (1), images that cannot be used (1)"]


def test_a_class_that_no_training_mask_has_is_said_once(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(manifest, "_said", set())
    (root / "classes.txt").write_text("ground\ntree\nsky\nsea\n")
    for _ in range(2):
        assert len(own(tmp_path, root).train_dataset) == 10
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in said] == [
        "streets: no training mask has a pixel of sea: nothing can be learned about it"
    ]


def test_missing_splits_are_named(tmp_path):
    root = write_masks(tmp_path / "streets", 3, splits=("train", "val"))
    with pytest.raises(UserError, match="streets has no test images"):
        own(tmp_path, root).check_sets()
    data = own(tmp_path, root, test="none")
    data.check_sets()
    assert not data.is_scored
    own(tmp_path, root, split="tune").check_sets()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment": "light"},
            "data.augment=light changes images and not their masks: leave it out (data.scale, data.flip and "
            "data.jitter of own images and of ADE20K change both)",
        ),
        (
            {"scale": [2.0, 0.5]},
            "data.scale=[2.0, 0.5] is not a range of factors: give [0.5,2.0] for example, ",
        ),
        ({"final": "all"}, "unknown data.final 'all'"),
        ({"test": "no"}, "unknown data.test 'no'"),
        ({"name": "ade20k"}, "ade20k is the name of a task of this project, not of your own images"),
        ({"name": "a/b"}, "data.name='a/b' cannot name a folder of results"),
    ],
)
def test_wrong_options_are_refused(root, tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        own(tmp_path, root, **options)


def test_the_configs_name_every_argument(root, tmp_path):
    config = yaml.safe_load((ROOT / "configs/data/segmentation/folder.yaml").read_text())
    for name in ("defaults", "_target_", "root", "store_dir", "interpolation", "resampling", "normalisation"):
        config.pop(name)
    assert own(tmp_path, root, **config).scale == (0.5, 2.0)


def test_jobs_of_own_masks_are_own_images_under_another_task_than_own_photographs(root):
    with composing():
        one = job("train", ["data=segmentation/folder", f"data.root={root}", "data.classes=[a,b]"])
        many = job("train", ["data=folder", f"data.root={root}"])
    assert (one.task, many.task) == ("segmentation_folder", "folder")
    assert one.has_own_images
    assert one.name == "streets/vpt_deep"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "data.scale=[2,1]",
            "data.scale=[2, 1] does not fit: give two factors such as [0.5,2.0], the smaller",
        ),
        ("data.ignore=256", "data.ignore=256 does not fit: give a whole number from 0 to 255 or null"),
        ("data.jitter=1", "data.jitter=1 does not fit: give true or false"),
        ("data.classes=[1,2]", "data.classes=[1, 2] does not fit: give a path or a list of words or null"),
    ],
)
def test_settings_are_checked_when_they_are_composed(setting, message):
    with composing(), pytest.raises(UserError, match=f"^{re.escape(message)}"):
        job("train", ["data=segmentation/folder", "data.root=x", setting])


def test_scale_and_jitter_are_part_of_a_run_s_identity(root, tmp_path):
    backbone = SimpleNamespace(record=dict, module=SimpleNamespace(num_blocks=2))
    with composing():
        one = job("train", ["data=segmentation/folder", f"data.root={root}"])
    changes = ({}, {"scale": [0.5, 2]}, {"scale": None}, {"jitter": False})
    records = [identity_of(one, backbone, own(tmp_path, root, **change))["data"] for change in changes]
    assert records[0] == records[1], "two spellings of one run"
    assert [record["scale"] for record in records] == [[0.5, 2.0], [0.5, 2.0], None, [0.5, 2.0]]
    assert [record["jitter"] for record in records] == [True, True, True, False]
    assert records[0]["kind"] == "segmentation"
    demo = DigitsMasksDataModule(**GIVEN)
    assert not {"scale", "jitter"} & identity_of(one, backbone, demo)["data"].keys()


def test_a_recorded_run_on_own_masks_finds_its_config():
    data = recorded._compose("segmentation_folder", Path("config.yaml"), None)["data"]
    assert data["_target_"].endswith("MaskFolderDataModule")
    assert recorded._compose("folder", Path("config.yaml"), None)["data"]["_target_"].endswith(
        ".FolderDataModule"
    )


def test_an_archive_with_other_images_is_refused(ade, tmp_path, monkeypatch):
    spec = catalog.TASKS["ade20k"]
    monkeypatch.setitem(
        catalog.TASKS, "ade20k", replace(spec, official_sizes={"training": 13, "validation": 4})
    )
    with pytest.raises(
        UserError, match=r"the training split of ade20k has 12 images, expected 13: the files"
    ):
        ade().prepare_data()


def test_an_image_without_annotation_is_refused(tmp_path, ade):
    (tmp_path / "elsewhere" / "images" / "training").mkdir(parents=True)
    (tmp_path / "elsewhere" / "images" / "training" / "ADE_train_00000001.jpg").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"has no annotation of training/ADE_train_00000001: it is incomplete"
    ):
        ade(root=str(tmp_path / "elsewhere")).prepare_data()


def test_an_annotation_with_a_number_above_150_is_refused(tmp_path, ade):
    import zipfile

    place = tmp_path / "elsewhere"
    with zipfile.ZipFile(tmp_path / "raw" / "ade20k" / "ADEChallengeData2016.zip") as archive:
        archive.extractall(place)
    mask = place / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png"
    from PIL import Image

    with Image.open(mask) as image:
        mask.write_bytes(png(np.full((image.height, image.width), 151)))
    with pytest.raises(
        UserError,
        match=r"^1 of 16 images cannot be used \(validation/ADE_val_00000002.jpg has a mask that has a pixel "
        r"of value 151, for which there is no class: the 150 classes have the values 1 to 150, and 0 is "
        r"ignored\): get the dataset's files again$",
    ):
        ade(root=str(place)).prepare_data()


def test_validation_pictures_of_an_export_have_their_masks(root, tmp_path):
    data = own(tmp_path, root, split="tune")
    found = list(_pictures(data.val_dataset))
    assert len(found) == len(data.val_dataset)
    for picture, labels in found:
        assert picture.shape[2] == 3
        assert tuple(labels.shape) == picture.shape[:2]
        assert set(labels.unique().tolist()) <= {0, 1, 2, 255}


def test_images_without_any_label_are_not_scored(tmp_path):
    root = write_masks(tmp_path / "blank", 3, splits=("train", "val", "test"))
    for path in (root / "masks" / "test").iterdir():
        path.write_bytes(png(np.full((48, 64), 255, np.uint8)))
    data = own(tmp_path, root)
    with pytest.raises(UserError, match=r"^no pixel of the test masks of blank has a class, all are ignored"):
        _ = data.test_dataset


def test_the_demo_refuses_changes_that_leave_masks_where_they_were():
    with pytest.raises(UserError, match=r"^data\.augment=light changes images and not their masks"):
        DigitsMasksDataModule(**GIVEN, augment="light")
