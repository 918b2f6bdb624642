"""What a store stands for: another place, commit or list of images never passes for the one that was asked for."""

import logging

import numpy as np
import pytest

from helpers.miniatures import miniature
from helpers.miniatures.fgvc import json_splits
from visprompt.data import catalog
from visprompt.data.catalog import TASKS
from visprompt.data.sources import open_source
from visprompt.data.sources.archive import unpack
from visprompt.data.sources.content import decode_rgb
from visprompt.data.sources.decoders import DECODERS
from visprompt.data.sources.fgvc import fgvc
from visprompt.data.sources.readers import READERS
from visprompt.data.stores import prepare
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_ragged, prepare_square
from visprompt.data.transforms import to_input
from visprompt.errors import UserError


@pytest.fixture
def written(tmp_path, monkeypatch):
    def write(task, source="raw", folder=tmp_path):
        for name, spec in miniature.write(task, source, folder).items():
            monkeypatch.setitem(catalog.TASKS, name, spec)
        return folder

    return write


def plan(task, folder, **given):
    return Plan(
        **{"spec": TASKS[task], "data_dir": folder, "store_dir": folder / "stores", "size": 64, **given}
    )


def test_another_root_is_other_data(written, tmp_path):
    written("svhn", "prepared")
    first = prepare_square(plan("svhn", tmp_path, source="prepared"))
    with pytest.raises(
        UserError, match=r"root=/nowhere is not a folder: give the one that holds the folders of"
    ):
        prepare_square(plan("svhn", tmp_path, source="prepared", root=tmp_path.__class__("/nowhere")))
    again = prepare_square(plan("svhn", tmp_path, source="prepared", root=tmp_path / "vtab-1k"))
    assert again.folder != first.folder
    assert again.fingerprint("svhn") == first.fingerprint("svhn"), "a copy of the same data is the same data"


def test_another_revision_is_another_store(tmp_path):
    folders = {plan("svhn", tmp_path, source="hf", revision=word).folder.name for word in ("", "abc", "abd")}
    assert len(folders) == 3


def test_a_mirror_is_not_asked_where_downloads_are_forbidden(tmp_path, monkeypatch):
    monkeypatch.setattr(open_source, "hub", None)
    message = (
        r"svhn is not prepared and data.download=false: run `python src/prepare.py tasks=svhn source=hf`"
    )
    with pytest.raises(UserError, match=message):
        prepare_square(plan("svhn", tmp_path, source="hf", download=False))


def test_nothing_is_downloaded_into_the_users_own_place(tmp_path):
    message = (
        r"/own has no train_32x32.mat \(182.0 MB\): put it there, or leave root out to have it downloaded"
    )
    with pytest.raises(UserError, match=message):
        prepare_square(plan("svhn", tmp_path, root=tmp_path / "own"))
    assert not (tmp_path / "own").exists()


def test_terms_are_said_before_a_download_in_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        open_source, "obtain", lambda file, *_, **__: pytest.fail(f"{file.name} after {caplog.messages}")
    )
    caplog.set_level(logging.INFO)
    with pytest.raises(
        pytest.fail.Exception, match=r"downloading train_32x32.mat \(182.0 MB\); licence: for non-comm"
    ):
        prepare_square(plan("svhn", tmp_path))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"size": 224}, ""),
        ({}, " image_size=64"),
        (
            {"interpolation": "bicubic", "resampling": "pillow", "size": 224},
            " preprocessing.interpolation=bicubic ",
        ),
        ({"source": "prepared", "size": 224}, " source=prepared"),
    ],
)
def test_the_command_prepares_what_is_missing(tmp_path, given, options):
    command = plan("dtd", tmp_path, **given).command
    assert command.startswith(f"python src/prepare.py tasks=dtd{options}".rstrip())
    assert ("resampling=pillow" in command) == ("resampling" in given)


def test_json_splits_that_come_later_make_a_new_store(written, tmp_path):
    folder = written("cub200")
    own = prepare_ragged(plan("cub200", folder))
    assert own.origin == "lists"
    root = folder / "raw" / "cub200"
    items = fgvc(root, TASKS["cub200"]).items
    train = [item for item in items if item.split == "train"]
    changed = [*items[:0], *(item._replace(split="val") if item is train[0] else item for item in items)]
    json_splits(root / "CUB_200_2011", changed)
    given = prepare_ragged(plan("cub200", folder))
    assert given.origin == "json"
    assert (given.splits == "val").sum() == (own.splits == "val").sum() + 1
    assert prepare_ragged(plan("cub200", folder)).fingerprint == given.fingerprint


def test_a_wrong_list_is_said_and_nothing_is_fetched(written, tmp_path, monkeypatch):
    folder = written("cub200")
    prepare_ragged(plan("cub200", folder))
    (folder / "raw" / "cub200" / "CUB_200_2011" / "train.json").write_text("no json")
    monkeypatch.setattr(open_source, "obtain", None)
    with pytest.raises(UserError, match=r"train.json"):
        prepare_ragged(plan("cub200", folder))


def test_the_users_own_unpacked_folder(written, tmp_path, monkeypatch):
    folder = written("cub200")
    unpack(folder / "raw" / "cub200" / "CUB_200_2011.tgz", tmp_path / "own")
    monkeypatch.setattr(open_source, "obtain", None)
    store = prepare_ragged(plan("cub200", folder, root=tmp_path / "own"))
    assert store.origin == "lists"
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["CUB_200_2011"]


@pytest.mark.parametrize("task", ["sun397", "diabetic_retinopathy", "dtd", "clevr_count"])
def test_prediction_decodes_as_preparation_did(written, tmp_path, task):
    """A file out of the archive, predicted, gives the pixels of the store."""
    folder = written(task)
    spec = TASKS[task]
    content = READERS[spec.dataset](folder / "raw" / spec.dataset)
    store = prepare_square(plan(task, folder))
    split, key = store.keys[0].split("/", 1)
    (found,) = content.read({split: {key}})
    (tmp_path / "image").write_bytes(found.image)
    how = {"size": 64, "resize": "squash", "native": None, "interpolation": "bilinear", "resampling": "tf1"}
    planes = to_input(DECODERS[spec.decode](tmp_path / "image"), {**how, "mean": [0.0] * 3, "std": [1.0] * 3})
    assert np.array_equal((255 * planes).round().numpy().astype(np.uint8), store.take([0])[0])
    assert (content.decode is decode_rgb) == (spec.decode == "rgb")


def test_the_warning_about_lossy_images_comes_once(written, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(prepare, "_warned", set())
    folder = written("cifar", "prepared")
    given = plan("cifar", folder, source="prepared")
    for _ in range(3):
        prepare.warn_lossy(given, prepare_square(given))
    assert len([text for text in caplog.messages if "JPEG" in text]) == 1
