"""Every task from every source it has.

The real files in miniature, the real reader, prepare and data module.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.miniatures import miniature
from helpers.miniatures.natural import tar_bytes
from helpers.resizing import tensorflow
from visprompt.data import ade20k_datamodule, catalog, fgvc_datamodule, other_datamodule, vtab_datamodule
from visprompt.data.catalog import SUITES, TASKS
from visprompt.data.sources.archive import members
from visprompt.data.sources.readers import READERS
from visprompt.data.stores import prepare
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_ragged, prepare_square
from visprompt.data.stores.prepare_all import verify_all
from visprompt.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VTAB = [TASKS[task] for task in SUITES["vtab_all"]]
SQUARE = [spec for spec in TASKS.values() if spec.family in ("vtab", "other")]
MODULES = {
    m.task: m
    for file in (vtab_datamodule, fgvc_datamodule, ade20k_datamodule, other_datamodule)
    for m in vars(file).values()
    if isinstance(getattr(m, "task", None), str)
}
SOURCES = {
    spec.id: ["raw", *["prepared"][: spec.family == "vtab"], *["hf"][: bool(spec.mirror)]] for spec in SQUARE
}
CASES = [(task, source) for task, sources in SOURCES.items() for source in sources]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a miniature and puts its records into the catalog."""

    def write(task, source="raw"):
        for name, spec in miniature.write(task, source, tmp_path).items():
            monkeypatch.setitem(catalog.TASKS, name, spec)
        return tmp_path

    return write


def options(folder, source="raw"):
    root = folder / "mirror" if source == "hf" else None
    return {
        "data_dir": str(folder),
        "store_dir": str(folder / "stores"),
        "root": root and str(root),
        "source": source,
    }


def module(task, folder, source="raw", **given):
    feeding = {"batch_size": 8, "split": "final", "seed": 0, "image_size": 64, "mean": MEAN, "std": STD}
    return MODULES[task](**feeding | options(folder, source) | given)


def plan(task, folder, **given):
    place = {"data_dir": folder, "store_dir": folder / "stores", "size": 64}
    return Plan(**{"spec": TASKS[task], **place, **given})


def test_there_is_a_module_for_each_task():
    assert set(MODULES) == {spec.id for spec in TASKS.values() if spec.family != "demo"}
    assert set(READERS) == {spec.dataset for spec in VTAB}


@pytest.mark.parametrize(("task", "source"), CASES)
def test_a_vtab_task_is_prepared_and_loaded(written, task, source, capsys):
    folder = written(task, source)
    data = module(task, folder, source, normalisation="imagenet", resampling="tf1")
    data.prepare_data()
    assert data.sizes == dict(TASKS[task].split_sizes)
    assert (data.sizes["train800"], data.sizes["val200"]) == (24, 8)
    assert data.source == source
    assert data.form == ("lossy" if source == "prepared" else "lossless")
    assert len(data.class_names) == data.num_classes == TASKS[task].num_classes
    assert len(data.train_dataset) == 32
    assert len(module(task, folder, source, split="tune", resampling="tf1").train_dataset) == 24

    batch = next(iter(data.test_dataloader()))
    ready = data.on_after_batch_transfer(batch, 0)
    assert ready.images.shape == (8, 3, 64, 64)
    assert ready.images.dtype == torch.float32
    assert torch.isfinite(ready.images).all()
    assert ready.images.std() > 0.01
    assert ready.labels.tolist() == data.test_dataset.labels[:8].tolist()
    assert int(data.test_dataset.labels.max()) < data.num_classes

    root = {"root": folder / "mirror"} if source == "hf" else {}
    verify_all([plan(task, folder, source=source, **root)])
    out = capsys.readouterr().out
    assert "1 of 1 tasks are prepared" in out
    assert "FAIL" not in out


@pytest.mark.parametrize("task", SUITES["fgvc"])
def test_an_fgvc_dataset_is_prepared_and_loaded(written, task, capsys):
    folder = written(task)
    data = module(task, folder, interpolation="bilinear", normalisation="imagenet", split="tune")
    data.prepare_data()
    assert sum(data.sizes.values()) == sum(TASKS[task].split_sizes.values())
    assert data.sizes["test"] == TASKS[task].split_sizes["test"]
    assert data.short_side == 73
    assert min(data.store.shapes.min(axis=1)) == max(data.store.shapes.min(axis=1)) == 73
    assert set(data.train_dataset.labels.tolist()) == set(range(data.num_classes))
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0).images.shape[1:] == (3, 64, 64)
    assert data.preprocessing["interpolation"] == "bilinear"
    assert data.preprocessing["resampling"] == "pillow"
    verify_all([plan(task, folder, size=73, resampling="pillow")])
    assert "1 of 1 tasks are prepared" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [("clevr_count", "clevr_dist"), ("dsprites_loc", "dsprites_ori")])
def test_a_pair_shares_one_pixel_file(written, pair):
    folder = written(pair[0])
    first, second = (prepare_square(plan(task, folder)) for task in pair)
    assert first.folder == second.folder
    assert len(list(folder.rglob("pixels.bin"))) == 1
    assert first.fingerprint(pair[0]) != second.fingerprint(pair[1])
    assert first.labels[pair[0]].tolist() != first.labels[pair[1]].tolist()


@pytest.mark.parametrize("task", ["cifar", "dtd", "smallnorb_azi", "sun397", "dmlab"])
def test_a_store_holds_the_images_of_its_keys(written, task):
    """Held against the reader, image by image; the expected values do not pass through the store's writer."""
    folder = written(task)
    spec = TASKS[task]
    wanted_plan = plan(task, folder)
    store = prepare_square(wanted_plan)
    content = READERS[spec.dataset](folder / "raw" / spec.dataset)
    wanted = [key.split("/", 1) for key in store.keys]
    images = {
        (split, key): content.decode(image) if isinstance(image, bytes) else image
        for split, key, image in content.read({s: {k for t, k in wanted if t == s} for s in content.parts})
    }
    for row, (split, key) in enumerate(wanted):
        planes = images[split, key].transpose(2, 0, 1)
        if not wanted_plan.native:
            planes = np.stack([tensorflow(plane, 64, half_pixel_centres=False) for plane in planes])
        stored = store.take([row])[0].astype(float)
        assert np.abs(stored - planes).max() <= (0 if wanted_plan.native else 0.5 + 1e-3)
        part = content.parts[split]
        assert store.labels[task][row] == part.labels[task][list(part.keys).index(key)]


def test_a_second_preparation_reads_nothing(written, monkeypatch):
    folder = written("svhn")
    store = prepare_square(plan("svhn", folder))
    changed = (store.folder / "pixels.bin").stat().st_mtime_ns
    for file in (folder / "raw" / "svhn").iterdir():
        file.unlink()
    assert prepare_square(plan("svhn", folder)).images == store.images
    assert (store.folder / "pixels.bin").stat().st_mtime_ns == changed


def test_the_fingerprint_is_of_the_data_and_not_of_the_size(written):
    folder = written("dtd")
    small, large = (prepare_square(plan("dtd", folder, size=size)) for size in (32, 48))
    assert small.folder != large.folder
    assert small.fingerprint("dtd") == large.fingerprint("dtd")


def test_stores_differ_by_interpolation_and_native_ones_do_not(written):
    folder = written("dtd")
    folders = {
        plan("dtd", folder, interpolation=word, resampling=way).folder.name
        for word, way in (
            ("bilinear", "tf1"),
            *((w, r) for w in ("bilinear", "bicubic") for r in ("pillow", "tf2")),
        )
    }
    assert folders == {
        f"raw-64-{word}{end}" for word in ("bilinear", "bicubic") for end in ("", "-antialias")
    } | {"raw-64-bilinear-tf1"}
    assert plan("cifar", folder, interpolation="bicubic", resampling="pillow").folder.name == "raw-native"
    assert plan("cifar", folder, size=16).folder.name == "raw-16-bilinear-tf1", (
        "a smaller target is squashed to once"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "tfds"}, r"unknown source 'tfds': choose one of hf, prepared, raw"),
        ({"source": "hf"}, r"dtd has no mirror on the hub that is known to be right: use source=raw"),
        ({"interpolation": "cubic"}, r"unknown interpolation 'cubic': did you mean bicubic"),
    ],
)
def test_wrong_words(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        plan("dtd", tmp_path, **given)


def test_nothing_is_downloaded_where_that_is_forbidden(tmp_path):
    message = r"svhn is not prepared and data.download=false: run `python src/prepare.py tasks=svhn`"
    with pytest.raises(UserError, match=message):
        prepare_square(plan("svhn", tmp_path, download=False))
    with pytest.raises(UserError, match=r"cub200 is not prepared .*`python src/prepare.py tasks=cub200`"):
        prepare_ragged(plan("cub200", tmp_path, download=False))
    with pytest.raises(
        UserError, match=r"dtd is not prepared .*prepare.py tasks=dtd source=prepared image_size=64`"
    ):
        prepare_square(plan("dtd", tmp_path, source="prepared", download=False))


def test_what_has_to_be_fetched_by_hand_is_said_with_its_steps(tmp_path):
    with pytest.raises(UserError, match=r"train.zip.*Kaggle wants a login. 1\. Accept the rules"):
        prepare_square(plan("diabetic_retinopathy", tmp_path, download=False))


def test_a_test_split_of_the_wrong_size_is_refused(written, monkeypatch):
    """As the Caltech101 in circulation whose test split has 1,046 images."""
    folder = written("caltech101", "prepared")
    sizes = dict(TASKS["caltech101"].split_sizes) | {"test": 6084}
    monkeypatch.setitem(catalog.TASKS, "caltech101", replace(TASKS["caltech101"], split_sizes=sizes))
    message = (
        r"caltech101 in .*vtab-1k is not the right data: number of images in test is 24, expected 6,084; get"
    )
    with pytest.raises(UserError, match=message):
        prepare_square(plan("caltech101", folder, source="prepared"))
    assert not list((folder / "stores").rglob("pixels.bin"))


def test_an_image_that_a_list_names_and_the_archive_lacks(written):
    folder = written("dtd")
    path = folder / "raw" / "dtd" / "dtd-r1.0.1.tar.gz"
    files = {member.name: member.read() for member in members(path)}
    lost = "dtd/images/" + files["dtd/labels/test1.txt"].decode().split()[0]
    path.write_bytes(tar_bytes([(name, data) for name, data in files.items() if name != lost]))
    message = rf"1 of 56 images that the lists name are not in the files, the first is {lost[11:]} \(test\): the files are"
    with pytest.raises(UserError, match=message):
        prepare_square(plan("dtd", folder))
    assert not list((folder / "stores").rglob("pixels.bin"))


def test_lossy_small_images_are_warned_about(written, caplog, monkeypatch):
    monkeypatch.setattr(prepare, "_warned", set())
    folder = written("cifar", "prepared")
    module("cifar", folder, "prepared").prepare_data()
    assert [r.message for r in caplog.records if "JPEG" in r.message] == [
        "cifar is read from JPEG files made of its lossless images, which costs accuracy (CIFAR-100: 10 to "
        "20 points): do not compare with lossless results; data.source=raw gives the exact pixels"
    ]
