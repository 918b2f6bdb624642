"""Data sets of `datasets` as own images: what is read from the forms in which they lie on a disk."""

import csv
from io import BytesIO

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.cli import ROOT, composed, frozen, tiny
from visprompt.data.hf_datamodule import HfDataModule
from visprompt.data.sources.hf_own import HubImages, written
from visprompt.errors import UserError
from visprompt.runs import run_all
from visprompt.runs.result import load_result

NAMES = ["cat", "dog"]
GIVEN = {"batch_size": 8, "split": "tune", "seed": 0, "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def picture(number, form="PNG"):
    file = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def table(labels, start=0, feature=None, **columns):
    """Return a data set of generated pictures with these labels."""
    pictures = [
        {"bytes": picture(start + i, ("PNG", "JPEG")[i % 2]), "path": None} for i in range(len(labels))
    ]
    features = {"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=NAMES)}
    features |= {name: datasets.Value("string") for name in columns}
    content = {"image": pictures, "label": labels, **columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    parts = {"train": table([0, 1] * 4), "validation": table([1, 0], 20), "test": table([0, 0, 1], 30)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "pets"))
    return tmp_path / "pets"


def rows(folder):
    with (folder / "labels.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_what_save_to_disk_wrote_is_read_byte_by_byte(tmp_path, saved):
    folder = written(HubImages(str(saved)), tmp_path / "hf", download=False)
    assert rows(folder) == [
        *((f"train/{i:08d}.{('png', 'jpeg')[i % 2]}", NAMES[i % 2], "train") for i in range(8)),
        ("val/00000000.png", "dog", "val"),
        ("val/00000001.jpeg", "cat", "val"),
        ("test/00000000.png", "cat", "test"),
        ("test/00000001.jpeg", "cat", "test"),
        ("test/00000002.png", "dog", "test"),
    ]
    assert (folder / "train/00000003.jpeg").read_bytes() == picture(3, "JPEG")
    before = folder.stat().st_mtime_ns
    assert written(HubImages(str(saved)), tmp_path / "hf", download=False) == folder
    assert folder.stat().st_mtime_ns == before, "written once"


def test_parquet_files_are_read_and_slices_of_splits(tmp_path):
    (tmp_path / "birds" / "data").mkdir(parents=True)
    table([0, 1] * 5).to_parquet(tmp_path / "birds" / "data" / "train-00000.parquet")
    table([1, 0, 1], 50).to_parquet(tmp_path / "birds" / "data" / "test-00000.parquet")
    splits = {"train": "train[:80%]", "val": "train[80%:]", "test": "test"}
    folder = written(HubImages(str(tmp_path / "birds"), splits=splits), tmp_path / "hf", download=False)
    counted = [split for _, _, split in rows(folder)]
    assert [counted.count(split) for split in ("train", "val", "test")] == [8, 2, 3]
    assert (folder / "val/00000000.png").read_bytes() == picture(8)


def test_a_single_split_is_cut_as_own_folders_are(tmp_path):
    table([0, 1] * 20).save_to_disk(str(tmp_path / "one"))
    data = module(tmp_path, tmp_path / "one")
    assert data.sizes == {"train": 32, "val": 4, "test": 4}


def test_labels_may_be_texts_or_lists(tmp_path):
    table(["b", "a", "b"], feature=datasets.Value("string")).save_to_disk(str(tmp_path / "texts"))
    source = HubImages(str(tmp_path / "texts"), label="label")
    assert [name for _, name, _ in rows(written(source, tmp_path / "hf", False))] == ["b", "a", "b"]
    several = datasets.List(datasets.ClassLabel(names=NAMES))
    table([[1, 0], [], [1]], feature=several).save_to_disk(str(tmp_path / "lists"))
    source = HubImages(str(tmp_path / "lists"), multi_label=True)
    assert [name for _, name, _ in rows(written(source, tmp_path / "hf", False))] == ["cat;dog", "", "dog"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {"label": "lable"}, r"unknown data\.label 'lable': did you mean label"),
        ([0, 1], {"image": "pixels"}, r"unknown data\.image 'pixels'"),
        (
            [0, 1],
            {"multi_label": True},
            "holds a list|holds one label for each image: give data.kind=single_label",
        ),
        (
            [0, -1],
            {},
            r"row 1 of the data in .* has no label \(-1\): leave this split out with data.split_names",
        ),
        (
            [0, 1],
            {"splits": {"trian": "train"}},
            r"unknown split in data\.split_names 'trian': did you mean train",
        ),
        ([0, 1], {"splits": {"train": "all"}}, "unknown split in data.split_names .no slices here. 'all'"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, labels, options, message):
    table(labels).save_to_disk(str(tmp_path / "pets"))
    with pytest.raises(UserError, match=message):
        written(HubImages(str(tmp_path / "pets"), **options), tmp_path / "hf", download=False)
    assert {path.suffix for path in (tmp_path / "hf").iterdir()} <= {".lock"}, "nothing half-written"


def test_columns_are_chosen_only_if_there_is_one(tmp_path):
    table([0, 1], colour=["x", "y"]).rename_column("label", "a").add_column("label", [0, 1]).cast_column(
        "label", datasets.ClassLabel(names=NAMES)
    ).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(
        UserError, match=r"has 2 columns that can be data\.label: give data\.label= one of a, label"
    ):
        written(HubImages(str(tmp_path / "two")), tmp_path / "hf", download=False)


def module(tmp_path, dataset, **options):
    return HfDataModule(
        dataset=str(dataset),
        data_dir=str(tmp_path / "data"),
        store_dir=str(tmp_path / "stores"),
        **{**GIVEN, **options},
    )


def test_the_data_module_treats_them_as_own_images(tmp_path, saved):
    data = module(tmp_path, saved)
    assert (data.task, data.class_names) == ("pets", ("cat", "dog"))
    assert data.source == "hf:pets", "a path is no part of a run"
    assert data.sizes == {"train": 8, "val": 2, "test": 3}
    assert next(iter(data.val_dataloader())).labels.tolist() == [1, 0]


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path, saved):
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(UserError, match=r"paths\.data_dir"):
        written(HubImages(str(saved)), tmp_path / "hf" / "place", download=False)


def test_nothing_is_downloaded_unless_allowed(tmp_path):
    data = module(tmp_path, "somebody/pets", download=False)
    with pytest.raises(UserError, match=r"somebody/pets are not on this machine, and data\.download=false"):
        data.check_sets()


def test_the_config_has_the_settings_of_own_folders_and_those_of_the_data_set(tmp_path, saved):
    config = yaml.safe_load((ROOT / "configs" / "data" / "hf.yaml").read_text())
    folder = yaml.safe_load((ROOT / "configs" / "data" / "folder.yaml").read_text())
    own = {"dataset", "subset", "revision", "image", "label", "download", "data_dir"}
    assert config.keys() - folder.keys() == own
    assert folder.keys() - config.keys() == {"root", "csv", "csv_columns"}
    same = folder.keys() & config.keys() - {"_target_"}
    assert {name: config[name] for name in same} == {name: folder[name] for name in same}


@frozen
@pytest.mark.slow
def test_a_run_on_a_local_data_set(tmp_path, saved):
    logs = tmp_path / "logs"
    data = ("data=hf", f"data.dataset={saved}", f"paths.data_dir={tmp_path / 'data'}")
    options = ("callbacks=none", "recipe.epochs=1", "recipe.warmup_epochs=0")
    with composed("train", *tiny(logs, *data, *options)) as cfg:
        run_all.train(cfg)
    (folder,) = (path.parent for path in logs.rglob("result.json"))
    result = load_result(folder)
    assert (result.task, result.data["source"], result.metrics["test/count"]) == ("pets", "hf:pets", 3)


def test_a_path_in_a_data_set_of_the_hub_reaches_no_other_file(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(picture(1))
    inside = tmp_path / "cache" / "given.png"
    inside.parent.mkdir()
    inside.write_bytes(picture(2))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})

    def found(path):
        content = {"image": [{"bytes": None, "path": str(path)}] * 2, "label": [0, 1]}
        return datasets.DatasetDict(train=datasets.Dataset.from_dict(content, features=features))

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found(inside))
    folder = written(HubImages("a/b"), tmp_path / "hf", download=True)
    assert (folder / "all/00000000.png").read_bytes() == picture(2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found(tmp_path / "secret.png"))
    with pytest.raises(
        UserError, match=r"names the file .*secret.png, which is not a part of the data set: it is not"
    ):
        written(HubImages("a/c"), tmp_path / "hf", download=True)


def test_a_jpeg_of_a_camera_with_more_than_one_picture_is_a_jpeg(tmp_path):
    file = BytesIO()
    first, second = (Image.fromarray(np.full((40, 40, 3), shade, np.uint8)) for shade in (90, 200))
    first.save(file, "MPO", save_all=True, append_images=[second])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    content = {"image": [{"bytes": file.getvalue(), "path": None}] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "phone"))
    folder = written(HubImages(str(tmp_path / "phone")), tmp_path / "hf", download=False)
    assert [path for path, _, _ in rows(folder)] == ["all/00000000.jpeg", "all/00000001.jpeg"]
