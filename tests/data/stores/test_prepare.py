"""What goes wrong while a task is prepared, on miniatures.

That all tasks are prepared is in test_miniature.py.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from helpers.damage import rewrite
from helpers.miniatures import circulated, miniature
from helpers.miniatures.fgvc import json_splits
from helpers.miniatures.natural import encoded, tar_bytes, write_mat, write_zip
from visprompt.data import catalog, fgvc_datamodule, vtab_datamodule
from visprompt.data.catalog import TASKS
from visprompt.data.catalog.task import Golden, in_bytes
from visprompt.data.sources import hf as hub_module
from visprompt.data.sources import open_source
from visprompt.data.sources.archive import members, unpack
from visprompt.data.sources.arrays import mat
from visprompt.data.sources.content import Content
from visprompt.data.sources.decoders import DECODERS, decoder_of
from visprompt.data.sources.fgvc import fgvc as listed_fgvc
from visprompt.data.sources.readers import READERS
from visprompt.data.sources.structured import DSPRITES, SMALLNORB
from visprompt.data.stores import manifest, ragged, square
from visprompt.data.stores.plan import Plan
from visprompt.data.stores.prepare import prepare_ragged, prepare_square
from visprompt.data.stores.prepare_all import prepare_all, verify_all
from visprompt.errors import UserError

FEEDING = {
    "batch_size": 8,
    "split": "final",
    "seed": 0,
    "image_size": 64,
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a miniature and puts its records into the catalog."""

    def write(task, source="raw"):
        for name, spec in miniature.write(task, source, tmp_path).items():
            monkeypatch.setitem(catalog.TASKS, name, spec)
        return tmp_path

    return write


@pytest.fixture
def patched(monkeypatch):
    """Changes a record of the catalog."""

    def patch(task, **facts):
        monkeypatch.setitem(catalog.TASKS, task, replace(TASKS[task], **facts))

    return patch


def plan(task, folder, **given):
    place = {"data_dir": folder, "store_dir": folder / "stores", "size": 64}
    return Plan(**{"spec": TASKS[task], **place, **given})


def raw(folder, task):
    return folder / "raw" / TASKS[task].dataset


def contents(path):
    return [(member.name, member.read()) for member in members(path)]


def tree(folder):
    """Everything below a folder: name -> size and time of the last change."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def nothing_is_built(folder):
    stores = folder / "stores"
    return not list(stores.rglob("pixels.bin")) and not list(stores.rglob("*.tmp-*"))


@contextmanager
def refused(folder, message):
    """Expects one sentence, and no store and no rest of one."""
    with pytest.raises(UserError, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert nothing_is_built(folder)


# ---- files that are not the right ones


def test_a_file_of_another_checksum_is_refused(written, patched):
    folder = written("eurosat")
    path = raw(folder, "eurosat") / "EuroSAT.zip"
    found = sha256(path.read_bytes()).hexdigest()
    patched("eurosat", files=(replace(TASKS["eurosat"].files[0], sha256="0" * 64),))
    with refused(
        folder, rf"EuroSAT.zip is not the file that the catalog knows \(sha256 {found} instead of 0{{64}}\)"
    ):
        prepare_square(plan("eurosat", folder))
    assert sha256(path.read_bytes()).hexdigest() == found, "it stays where it is"


def test_a_store_tells_the_checksums_of_its_files(written, patched):
    folder = written("eurosat")
    right = sha256((raw(folder, "eurosat") / "EuroSAT.zip").read_bytes()).hexdigest()
    patched("eurosat", files=(replace(TASKS["eurosat"].files[0], sha256=right),))
    assert prepare_square(plan("eurosat", folder)).record == {
        "source": "raw",
        "form": "lossless",
        "dataset": "eurosat",
        "from": {"sha256": {"EuroSAT.zip": right}},
    }


TRUNCATED = [
    ("cifar", "cifar-100-binary.tar.gz"),
    ("dtd", "dtd-r1.0.1.tar.gz"),  # a plain tar
    ("caltech101", "caltech-101.zip"),  # a tar.gz in a zip
    ("eurosat", "EuroSAT.zip"),
    ("svhn", "train_32x32.mat"),
    ("dsprites_loc", DSPRITES),
    ("patch_camelyon", "camelyonpatch_level_2_split_valid_x.h5.gz"),
    ("patch_camelyon", "camelyonpatch_level_2_split_test_y.h5.gz"),
    ("dmlab", "dmlab.tar.gz"),
    ("smallnorb_azi", SMALLNORB["train"].format("dat")),
    ("smallnorb_azi", SMALLNORB["test"].format("info")),
]


@pytest.mark.parametrize(("task", "name"), TRUNCATED)
def test_a_truncated_file_is_named(written, task, name):
    folder = written(task)
    path = raw(folder, task) / name
    for share in (0.9, 0.4):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with refused(folder, rf"{name}.* is truncated or damaged"):
            prepare_square(plan(task, folder))


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache of `datasets` that goes with the test; the usual one may hold what other tests read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
def test_a_truncated_table_of_a_mirror_is_named(written):
    folder = written("svhn", "hf")
    path = next((folder / "mirror").rglob("test*.parquet"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with refused(folder, r"the clone .*mirror cannot be read \(.+\): get it again"):
        prepare_square(plan("svhn", folder, source="hf", root=folder / "mirror"))


@pytest.mark.usefixtures("own_cache")
def test_a_clone_is_read_and_not_what_was_cached_of_another_one(tmp_path):
    sizes = []
    for place, counts in (("old", {"train": 9, "test": 3}), ("new", {"train": 8, "test": 5})):
        clone = tmp_path / place / "svhn"  # of one name, as copies of one mirror are
        circulated.mirror(clone, TASKS["svhn"], counts, np.random.default_rng(0))
        content, _ = hub_module.hub(TASKS["svhn"], clone, "")
        sizes.append({split: len(part.keys) for split, part in content.parts.items()})
    assert sizes == [{"train": 9, "test": 3}, {"train": 8, "test": 5}]


def test_a_mirror_is_not_asked_for_where_downloads_are_forbidden(written, monkeypatch):
    folder = written("svhn", "hf")
    monkeypatch.setattr(open_source, "hub", lambda *_: pytest.fail("the hub was asked"))
    with refused(
        folder, r"svhn is not prepared and data.download=false: run `python src/prepare.py tasks=svhn sourc"
    ):
        prepare_square(plan("svhn", folder, source="hf", download=False))


def test_an_image_of_an_archive_that_does_not_decode(written):
    folder = written("dtd")
    path = raw(folder, "dtd") / "dtd-r1.0.1.tar.gz"
    files = dict(contents(path))
    key = files["dtd/labels/test1.txt"].decode().split()[3]
    files[f"dtd/images/{key}"] = b"no image"
    path.write_bytes(tar_bytes(files.items(), packed=False))
    with refused(
        folder, rf"image {key} \(test\) cannot be decoded \(not an image of a known format\): the file that"
    ):
        prepare_square(plan("dtd", folder))


def small_image(label=0):
    return encoded(np.full((32, 48, 3), 40 * label, np.uint8))


def test_raw_images_that_are_stored_as_they_are_have_one_size(written):
    folder = written("eurosat")
    path = raw(folder, "eurosat") / "EuroSAT.zip"
    files = contents(path)
    name = files[5][0]
    write_zip(path, [(other, small_image() if other == name else data) for other, data in files])
    key = "_".join(name.split("/")[1:])
    with refused(
        folder, rf"image {key} \(train\) is 48 x 32 pixels, not 64 x 64: the file that holds it is damaged"
    ):
        prepare_square(plan("eurosat", folder))


def test_images_in_circulation_are_squashed_whatever_their_size(written):
    folder = written("eurosat", "prepared")
    name = (folder / "vtab-1k" / "eurosat" / "train800.txt").read_text().split()[0]
    (folder / "vtab-1k" / "eurosat" / name).write_bytes(small_image())
    made = prepare_square(plan("eurosat", folder, source="prepared"))
    assert made.shape == (56, 3, 64, 64)
    assert np.array_equal(made.take([0]), np.zeros((1, 3, 64, 64)))


def test_a_label_out_of_range(written):
    folder = written("svhn")
    path = raw(folder, "svhn") / "test_32x32.mat"
    images, labels = mat(path, "X", "y")
    labels[7] = 11
    write_mat(path, X=images, y=labels)
    with refused(
        folder, r"test_32x32.mat gives image 7 the label 11, outside 0..9: the file is not the right one"
    ):
        prepare_square(plan("svhn", folder))


@pytest.mark.parametrize(
    ("size", "message"), [(73_257, "48 images, expected 73,257"), (40, "48 images, expected 40")]
)
def test_an_official_split_of_another_size(written, patched, size, message):
    folder = written("svhn")
    patched("svhn", official_sizes={"train": size, "test": 24})
    with refused(
        folder, rf"the train split of svhn has {message}: the files in .*svhn are not the right ones, get"
    ):
        prepare_square(plan("svhn", folder))


def test_an_official_split_that_is_not_there(written, patched):
    folder = written("svhn")
    patched("svhn", official_sizes={"train": 48, "test": 24, "validation": 1})
    with refused(folder, r"the validation split of svhn has 0 images, expected 1"):
        prepare_square(plan("svhn", folder))


def test_other_images_of_the_right_number_are_refused(written, patched):
    folder = written("svhn")
    patched("svhn", golden={"train800": Golden(keys=("x",), classes=10)})
    message = (
        r"svhn in .*raw/svhn is not the right data: first keys of train800 is \d+, expected x; "
        r"classes in train800 is 4, expected 10; get its files again"
    )
    with refused(folder, message):
        prepare_square(plan("svhn", folder))


def test_an_image_that_two_lists_in_circulation_name(written):
    folder = written("dtd", "prepared")
    lists = folder / "vtab-1k" / "dtd"
    both = (lists / "train800.txt").read_text().splitlines()[3]
    rows = (lists / "val200.txt").read_text().splitlines()
    (lists / "val200.txt").write_text("\n".join([both, *rows[1:]]))
    with refused(
        folder, r"dtd in .*vtab-1k is not the right data: train800 and val200 disjoint, by name is 1 in"
    ):
        prepare_square(plan("dtd", folder, source="prepared"))


# ---- the folder in circulation as an archive


def zipped(folder, top="vtab-1k/"):
    """Makes `vtab-1k.zip` of the folder and moves the folder away."""
    inner = folder / "vtab-1k"
    files = [path for path in sorted(inner.rglob("*")) if path.is_file()]
    write_zip(
        folder / "vtab-1k.zip", [(f"{top}{p.relative_to(inner).as_posix()}", p.read_bytes()) for p in files]
    )
    inner.rename(folder / "aside")


@pytest.mark.parametrize("top", ["vtab-1k/", ""])
def test_the_archive_in_circulation_is_unpacked(written, top):
    folder = written("svhn", "prepared")
    other = folder / "vtab-1k" / "dtd" / "test.txt"
    other.parent.mkdir()
    other.write_text("of another task")
    before = prepare_square(plan("svhn", folder, source="prepared", store_dir=folder / "other")).images
    zipped(folder, top)
    made = prepare_square(plan("svhn", folder, source="prepared"))
    assert made.images == before
    right = sha256((folder / "vtab-1k.zip").read_bytes()).hexdigest()
    assert made.record["from"] == {"sha256": {"vtab-1k.zip": right}}
    assert other.is_file()


def test_an_archive_in_circulation_that_is_there_needs_no_download(written):
    folder = written("svhn", "prepared")
    zipped(folder)
    assert prepare_square(plan("svhn", folder, source="prepared", download=False)).shape[0] == 56


def test_an_archive_of_one_task_moves_nothing_else(written):
    folder = written("svhn", "prepared")
    others = [folder / "raw" / "dtd", *(folder / f"other{number}" for number in range(20))]
    for other in others:
        other.mkdir(parents=True)
    (folder / "vtab-1k" / "svhn").rename(folder / "svhn")
    (folder / "vtab-1k").rmdir()
    (folder / "svhn").rename(folder / "vtab-1k")  # its test.txt is at the top
    zipped(folder, "")
    try:
        made = prepare_square(plan("svhn", folder, source="prepared"))
    except UserError:
        made = None
    assert [other for other in others if not other.is_dir()] == []
    assert made is None or made.shape[0] == 56


def test_a_root_that_lacks_a_file(tmp_path):
    with refused(
        tmp_path, r"own has no train_32x32.mat \(.+\): put it there, or leave root out to have it downloaded"
    ):
        prepare_square(plan("svhn", tmp_path, root=tmp_path / "own"))


def test_a_root_in_circulation_that_is_no_folder(tmp_path):
    with refused(
        tmp_path, r"root=.*nowhere is not a folder: give the one that holds the folders of the vtab-1k tasks"
    ):
        prepare_square(plan("svhn", tmp_path, source="prepared", root=tmp_path / "nowhere"))


# ---- interrupted, together, and on disks that refuse


@contextmanager
def reader(monkeypatch, dataset, before_image):
    """Calls a function with the number of each image before it is handed out."""
    original = READERS[dataset]

    def opened(root):
        content = original(root)

        def read(wanted):
            for number, found in enumerate(content.read(wanted)):
                before_image(number)
                yield found

        return Content(content.parts, read, content.decode, content.lossy)

    with monkeypatch.context() as patch:
        patch.setitem(READERS, dataset, opened)
        yield


@pytest.mark.parametrize("number", [0, 50])
def test_an_interrupt_leaves_nothing_and_the_next_call_succeeds(written, monkeypatch, number):
    folder = written("svhn")

    def interrupt(image):
        if image == number:
            raise KeyboardInterrupt

    with reader(monkeypatch, "svhn", interrupt), pytest.raises(KeyboardInterrupt):
        prepare_square(plan("svhn", folder))
    assert nothing_is_built(folder)
    assert prepare_square(plan("svhn", folder)).shape == (56, 3, 32, 32)


def test_an_interrupt_of_an_fgvc_dataset(written, monkeypatch):
    folder = written("cub200")

    def interrupt(file, image):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ragged, "in_threads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_ragged(plan("cub200", folder))
    assert nothing_is_built(folder)
    assert len(prepare_ragged(plan("cub200", folder)).keys) == 72


def test_two_at_once_build_once(written, monkeypatch, caplog):
    folder = written("svhn")
    started, go, builds, made = threading.Event(), threading.Event(), [], []

    def waiting():
        said = [text for text in caplog.messages if text.startswith("another process is preparing ")]
        return [text for text in said if "svhn" in text and text.endswith(": waiting for it")]

    def hold(number):
        if number == 0:
            builds.append(number)
            started.set()
            go.wait(20)

    def run():
        made.append(prepare_square(plan("svhn", folder)))

    threads = [threading.Thread(target=run), threading.Thread(target=run)]
    with reader(monkeypatch, "svhn", hold):
        threads[0].start()
        assert started.wait(20)
        threads[1].start()
        end = time.monotonic() + 10
        while not waiting() and time.monotonic() < end:
            time.sleep(0.01)
        go.set()
        for thread in threads:
            thread.join(20)
    assert len(waiting()) == 1
    assert builds == [0]
    assert len(made) == 2
    assert made[0].images == made[1].images


def read_only(self, *args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(("task", "prepare"), [("svhn", prepare_square), ("cub200", prepare_ragged)])
def test_a_place_that_cannot_be_written(written, monkeypatch, task, prepare):
    folder = written(task)
    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", read_only)
        message = rf"cannot write to .*stores/{task} \(Read-only file system\): set store_dir \(data.store_dir in training"
        with refused(folder, message):
            prepare(plan(task, folder))
    made = prepare(plan(task, folder))
    monkeypatch.setattr(FileLock, "acquire", read_only)
    assert prepare(plan(task, folder)).keys == made.keys


def test_unpacked_images_on_a_disk_that_cannot_be_written(written, monkeypatch):
    folder, acquire = written("cub200"), FileLock.acquire
    unpacked_cub(folder)

    def only_below_stores(self, *args, **kwargs):
        return acquire(self, *args, **kwargs) if "stores" in Path(self.lock_file).parts else read_only(self)

    monkeypatch.setattr(FileLock, "acquire", only_below_stores)
    assert len(prepare_ragged(plan("cub200", folder)).keys) == 72


def full(self, *args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def nothing_fits(monkeypatch):
    """A disk on which no file can be begun."""
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **rest: (full if "w" in mode else original)(self, mode, **rest)
    )


FULL = r"the disk of .*stores/{} is full: free space there, or set store_dir \(data.store_dir in training\) to another"


def test_a_disk_that_gets_full_of_pixels(written, monkeypatch):
    folder = written("svhn")

    def half(path, places, images, digests):
        path.write_bytes(next(images).image.data)
        full(path)

    with monkeypatch.context() as patch:
        patch.setattr(square, "_write_pixels", half)
        with refused(folder, FULL.format("svhn")):
            prepare_square(plan("svhn", folder))
    assert prepare_square(plan("svhn", folder)).shape[0] == 56


def test_a_disk_that_gets_full_of_fgvc_pixels(written, monkeypatch):
    folder = written("cub200")
    monkeypatch.setattr(ragged, "in_threads", full)
    with refused(folder, FULL.format("cub200")):
        prepare_ragged(plan("cub200", folder))


def test_a_disk_that_gets_full_of_unpacked_fgvc_images(written, request):
    folder = written("cub200")
    request.getfixturevalue("nothing_fits")
    message = r"^the disk of .*raw/cub200 is full: free space there, or set data_dir "
    with refused(folder, message) as caught:
        prepare_ragged(plan("cub200", folder))
    assert "store_dir" not in str(caught.value), "there is no store yet"


def test_a_disk_that_gets_full_of_the_folder_in_circulation(written, request):
    folder = written("svhn", "prepared")
    zipped(folder)
    request.getfixturevalue("nothing_fits")
    with refused(folder, r"^the disk of .* is full: free space there") as caught:
        prepare_square(plan("svhn", folder, source="prepared"))
    assert "store_dir" not in str(caught.value), "there is no store yet"
    assert [path.name for path in folder.glob("vtab-1k*")] == ["vtab-1k.zip"]


def test_a_store_of_another_resizing_is_neither_used_nor_deleted(written, caplog):
    folder = written("dtd")
    older = prepare_square(plan("dtd", folder, resampling="tf2"))
    before, words = tree(older.folder), plan("dtd", folder)
    assert caplog.messages == []
    made = prepare_square(words)
    assert caplog.messages == [
        "dtd: its images are resized as preprocessing.resampling=tf1 does, into a new store of "
        f"{words.bytes / 1e9:.2g} GB (python src/prepare.py tasks=dtd image_size=64); {older.folder}, "
        "resized in another way, is neither used nor deleted"
    ]
    assert (made.folder / "pixels.bin").stat().st_size == words.bytes
    assert tree(older.folder) == before
    assert not np.array_equal(made.take([0]), older.take([0]))
    caplog.clear()
    prepare_square(words)
    assert caplog.messages == [], "it is there now"


def test_a_store_that_lacks_the_task_is_made_again(written):
    """As of a dataset whose other task was all that an older version knew."""
    folder = written("svhn")
    made = prepare_square(plan("svhn", folder))
    stored = json.loads((made.folder / "manifest.json").read_text())
    rewrite(made.folder / "manifest.json", labels={"other": stored["labels"]["svhn"]})
    again = prepare_square(plan("svhn", folder))
    assert again.labels["svhn"].tolist() == made.labels["svhn"].tolist()


# ---- unpacked by hand


@pytest.mark.slow
def test_eyes_unpacked_by_hand(written):
    folder = written("diabetic_retinopathy")
    before = prepare_square(plan("diabetic_retinopathy", folder, store_dir=folder / "other"))
    for name in ("train.zip", "test.zip"):
        path = raw(folder, "diabetic_retinopathy") / name
        unpack(path, path.parent)
        path.unlink()
    after = prepare_square(plan("diabetic_retinopathy", folder, download=False))
    assert after.images == before.images
    assert after.record["from"]["sha256"]["train.zip"] == ""
    assert len(after.record["from"]["sha256"]["trainLabels.csv"]) == 64


def test_sun397_unpacked_by_hand(written):
    folder = written("sun397")
    before = prepare_square(plan("sun397", folder, store_dir=folder / "other"))
    path = raw(folder, "sun397") / "SUN397.tar.gz"
    unpack(path, path.parent)
    path.unlink()
    assert prepare_square(plan("sun397", folder, download=False)).images == before.images


# ---- FGVC


def unpacked_cub(folder):
    """Unpacks CUB where it lies and removes its archive."""
    path = raw(folder, "cub200") / "CUB_200_2011.tgz"
    unpack(path, path.parent)
    path.unlink()
    return path.parent


def test_json_split_files_are_the_splits(written):
    folder = written("cub200")
    root = unpacked_cub(folder)
    items = listed_fgvc(root, TASKS["cub200"]).items
    other = {"train": "val", "val": "train", "test": "test"}
    given = {item.key: item.split for item in items}
    swap = {
        key for split in ("train", "val") for key in sorted(k for k, s in given.items() if s == split)[:4]
    }
    expected = {key: other[split] if key in swap else split for key, split in given.items()}
    assert expected != given
    json_splits(root, [item._replace(split=expected[item.key]) for item in items])
    made = prepare_ragged(plan("cub200", folder, download=False))
    assert dict(zip(made.keys, made.splits.tolist(), strict=True)) == expected


def test_json_split_files_that_come_later_count(written):
    folder = written("cub200")
    made = prepare_ragged(plan("cub200", folder))
    items = listed_fgvc(raw(folder, "cub200"), TASKS["cub200"]).items
    other = {"train": "val", "val": "train", "test": "test"}
    json_splits(raw(folder, "cub200"), [item._replace(split=other[item.split]) for item in items])
    again = prepare_ragged(plan("cub200", folder))
    assert again.keys == made.keys
    assert again.splits.tolist() == [other[split] for split in made.splits.tolist()]
    assert prepare_ragged(plan("cub200", folder)).splits.tolist() == again.splits.tolist()


def test_the_users_own_root_is_read_and_not_written(written):
    folder = written("cub200")
    expected = prepare_ragged(plan("cub200", folder, store_dir=folder / "other"))
    own = folder / "my birds"
    (folder / "raw" / "cub200" / "CUB_200_2011").rename(own)
    (folder / "raw" / "cub200" / "CUB_200_2011.tgz").unlink()
    before = tree(own)
    made = prepare_ragged(plan("cub200", folder, root=own, download=False))
    assert made.keys == expected.keys
    assert made.labels.tolist() == expected.labels.tolist()
    assert tree(own) == before


def test_a_root_that_does_not_hold_the_images(tmp_path):
    with refused(tmp_path, r"does not hold the images of cub200 .*: unpack CUB_200_2011.tgz there"):
        prepare_ragged(plan("cub200", tmp_path, root=tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["../evil.txt", "CUB_200_2011/../../evil.txt"])
def test_an_archive_that_climbs_out_is_refused(written, name):
    folder = written("cub200")
    path = raw(folder, "cub200") / "CUB_200_2011.tgz"
    path.write_bytes(tar_bytes([*contents(path), (name, b"evil")]))
    with refused(folder, rf"CUB_200_2011.tgz holds the member '{name}', which points outside its folder"):
        prepare_ragged(plan("cub200", folder))
    assert not list(folder.rglob("evil.txt"))


def test_a_truncated_fgvc_archive_is_named(written):
    folder = written("cub200")
    path = raw(folder, "cub200") / "CUB_200_2011.tgz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with refused(
        folder, r"CUB_200_2011.tgz is truncated or damaged .*: delete it and run the same command again"
    ):
        prepare_ragged(plan("cub200", folder))
    path.write_bytes(whole)
    assert len(prepare_ragged(plan("cub200", folder)).keys) == 72, (
        "half of its files are there, all are unpacked again"
    )


def test_the_store_needs_neither_archives_nor_files(written):
    folder = written("cub200")
    made = prepare_ragged(plan("cub200", folder))
    (folder / "raw").rename(folder / "gone")
    again = prepare_ragged(plan("cub200", folder, download=False))
    assert again.keys == made.keys
    assert np.array_equal(again.image(71), made.image(71))


def test_an_fgvc_image_that_does_not_decode(written):
    folder = written("cub200")
    image = sorted(unpacked_cub(folder).rglob("*.jpg"))[2]
    image.write_bytes(b"no image")
    with refused(
        folder, rf"1 of 72 images cannot be used \(.*{image.name} cannot be decoded \(not an image of a known"
    ):
        prepare_ragged(plan("cub200", folder))


def test_what_fgvc_says_of_damage_can_be_done(written):
    """There is no data.skip_bad for a dataset whose numbers of images are fixed."""
    folder = written("cub200")
    next(unpacked_cub(folder).rglob("*.jpg")).write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        prepare_ragged(plan("cub200", folder))
    assert "skip_bad" not in str(caught.value)


def test_an_image_lost_from_what_was_unpacked_by_hand_is_named(written):
    """The archive is gone, so that what is missing is the image and not the archive."""
    folder = written("nabirds")
    path = raw(folder, "nabirds") / "nabirds.tar.gz"
    unpack(path, path.parent)
    path.unlink()
    lost = next(path.parent.rglob("*.jpg"))
    lost.unlink()
    with refused(folder, rf"1 image\(s\) that are not in .*{lost.name}"):
        prepare_ragged(plan("nabirds", folder))


def test_fgvc_counts_are_compared_with_the_record(written, patched):
    folder = written("cub200")
    patched("cub200", split_sizes={"train": 5394, "val": 600, "test": 5794}, num_classes=200)
    message = (
        r"cub200 in .*raw/cub200 is not the right data: number of classes is 4, expected 200; "
        r"number of images in train\+val is 48, expected 5,994; number of images in test is 24, expected "
        r"5,794; get its"
    )
    with refused(folder, message):
        prepare_ragged(plan("cub200", folder))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "stanford_cars",
            r"stanford_cars is not prepared and data.download=false: run `python src/prepare.py tasks=st",
        ),
        (
            "nabirds",
            r"nabirds.tar.gz is missing: get it by hand .*\. NABirds wants its terms accepted by a person",
        ),
    ],
)
def test_an_fgvc_dataset_that_may_not_be_fetched(tmp_path, task, message):
    with refused(tmp_path, message):
        prepare_ragged(plan(task, tmp_path, download=False))


# ---- prepare_all and verify_all


def test_one_task_that_fails_does_not_stop_the_others(written, capsys):
    folder = written("svhn")
    plans = [plan("dtd", folder, download=False), plan("svhn", folder)]
    message = r"^1 of 2 tasks are not prepared: dtd: dtd is not prepared and data.download=false: run `python src/prep"
    with pytest.raises(UserError, match=message):
        prepare_all(plans)
    out = capsys.readouterr().out
    assert "dtd: left undone" in out
    assert "svhn: ready after" in out
    prepare_all(plans[1:])
    assert "svhn: was there, 56 images, 0.2 MB in" in capsys.readouterr().out


def test_a_store_below_a_folder_with_brackets_is_said_as_it_is(written, capsys):
    folder = written("svhn")
    prepare_all([plan("svhn", folder, store_dir=folder / "[old]")])
    assert str(folder / "[old]" / "svhn" / "raw-native") in capsys.readouterr().out


@pytest.fixture
def verified(written, patched):
    """Prepares SVHN and takes what is found for what is known of it."""
    folder = written("svhn")
    made = prepare_square(plan("svhn", folder))
    golden = {}
    for name, (start, stop) in made.sets.items():
        labels = made.labels["svhn"][start:stop]
        golden[name] = Golden(
            keys=tuple(key.partition("/")[2] for key in made.keys[start : start + 3]),
            labels=tuple(labels[:3].tolist()),
            histogram=tuple(np.bincount(labels, minlength=10).tolist()),
            classes=len(set(labels.tolist())),
        )
    patched("svhn", golden=golden)
    return plan("svhn", folder)


def tamper(wanted, change):
    path = wanted.folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    rewrite(path, **content)


def test_verify_passes_and_writes_nothing(verified, capsys):
    before = tree(verified.data_dir)
    verify_all([verified, plan("dtd", verified.data_dir)])
    out = capsys.readouterr().out
    assert out.count(" pass ") == 9 + 12
    assert "FAIL" not in out
    assert "1 of 2 tasks are prepared" in out
    assert "then: python src/prepare.py tasks=dtd" in out
    assert tree(verified.data_dir) == before


def first_labels(manifest):
    labels = manifest["labels"]["svhn"]
    other = next(row for row in range(24) if labels[row] != labels[0])
    labels[0], labels[other] = labels[other], labels[0]


def one_label(manifest):
    labels = manifest["labels"]["svhn"]
    labels[55] = (labels[55] + 1) % 4


def label_too_large(manifest):
    manifest["labels"]["svhn"][55] = 10


def label_below_zero(manifest):
    manifest["labels"]["svhn"][55] = -1


def image_of_the_other_set(manifest):
    manifest["keys"][31] = manifest["keys"][20]


def image_moved(manifest):
    manifest["sets"] |= {"train800": [0, 23], "val200": [23, 32]}


def key_renamed(manifest):
    manifest["keys"][1] = "train/x"


def image_twice(manifest):
    manifest["keys"][55] = manifest["keys"][54]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (first_labels, {"first labels of train800"}),
        (one_label, {"images per class in test"}),
        (label_too_large, {"range of labels", "images per class in test"}),
        (label_below_zero, {"range of labels", "images per class in test"}),
        (image_of_the_other_set, {"train800 and val200 disjoint"}),
        (image_moved, {"number of images in train800", "number of images in val200"}),
        (key_renamed, {"first keys of train800"}),
        (image_twice, {"no image twice in a set"}),
    ],
)
def test_verify_fails_what_was_tampered_with(verified, capsys, change, names):
    tamper(verified, change)
    before = tree(verified.data_dir)
    message = r"^\d+ checks failed: svhn: .*: delete those stores and prepare them again$"
    with pytest.raises(UserError, match=message) as caught:
        verify_all([verified])
    assert all(f"svhn: {name} is " in str(caught.value) for name in names)
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert all(any(name in line for line in failed) for name in names)
    assert tree(verified.data_dir) == before


def test_verify_fails_an_fgvc_image_that_was_moved(written, capsys):
    folder = written("cub200")
    wanted = plan("cub200", folder)
    prepare_ragged(wanted)
    capsys.readouterr()

    def move(manifest):
        image = next(image for image in manifest["images"] if image[2] == "train")
        image[2] = "test"

    tamper(wanted, move)
    message = (
        r"^2 checks failed: cub200: number of images in train\+val is 47, expected 48; cub200: number of "
        r"images in "
        "test is 25, expected 24: delete those stores"
    )
    with pytest.raises(UserError, match=message):
        verify_all([wanted])
    assert capsys.readouterr().out.count("FAIL") == 2


def test_verify_reads_every_pixel_and_the_whole_manifest(verified, capsys):
    pixels = verified.folder / "pixels.bin"
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError) as error:
        verify_all([verified])
    assert str(error.value) == (
        "1 checks failed: svhn: pixels unchanged is 1 of 1 parts of "
        f"{in_bytes(len(whole))} differ: delete those stores and prepare them again"
    )
    pixels.write_bytes(whole)
    path = verified.folder / "manifest.json"
    path.write_text(path.read_text().replace('"train800": [0, 24]', '"train800": [0, 23]'))
    with pytest.raises(UserError) as error:
        verify_all([verified])
    assert str(error.value) == (
        f"1 checks failed: svhn: {path} is damaged: it does not match its digest: delete those stores and "
        "prepare them again"
    )
    assert "0 of 1 tasks are prepared" in capsys.readouterr().out


def outdated(wanted):
    """Turns a store into one of an older version: without checksums and digest."""
    path = wanted.folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("digest", "chunks", "made_for")})
    )
    return path


@pytest.mark.parametrize(("task", "make"), [("svhn", prepare_square), ("cub200", prepare_ragged)])
def test_a_store_of_an_older_version_is_given_checksums_and_kept(written, task, make, caplog, capsys):
    folder = written(task)
    wanted = plan(task, folder)
    pixels = make(wanted).folder / "pixels.bin"
    new, changed = json.loads((wanted.folder / "manifest.json").read_text()), pixels.stat().st_mtime_ns
    path = outdated(wanted)
    shutil.rmtree(raw(folder, task))  # the originals are gone
    caplog.set_level("INFO")
    before = path.read_bytes()
    verify_all([wanted])
    assert path.read_bytes() == before, "verify writes nothing"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "pixels unchanged" in line]
    assert line.split("│")[2].strip() == "look"
    ragged = make(wanted)
    assert ragged.chunks == tuple(new["chunks"])
    assert json.loads(path.read_text()) == new
    assert pixels.stat().st_mtime_ns == changed
    assert caplog.messages[-1] == f"writing once the checksums of the store {wanted.folder}, 0.0 GB"
    caplog.clear()
    make(wanted)
    assert caplog.messages == []


def test_an_older_store_that_cannot_be_written_is_read_unchecked_and_that_is_said_once(
    written, monkeypatch, caplog
):
    wanted = plan("svhn", written("svhn"))
    prepare_square(wanted)
    outdated(wanted)

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(manifest, "write_manifest", read_only)
    for _ in range(2):
        assert prepare_square(wanted).take([0]).shape == (1, 3, 32, 32)
    assert [message for message in caplog.messages if "older" in message] == [
        f"the store {wanted.folder} is of an older version without checksums, and none can be written "
        "(Read-only file system): it is read unchecked"
    ]


@pytest.mark.parametrize("old", [False, True])
def test_another_store_in_the_place_of_one_is_refused_and_kept(written, old):
    folder = written("svhn")
    here, there = plan("svhn", folder), plan("svhn", folder, size=16)
    for each in (here, there):
        prepare_square(each)
    shutil.rmtree(here.folder)
    shutil.copytree(there.folder, here.folder)
    if old:
        outdated(here)
    with pytest.raises(UserError) as error:
        prepare_square(here)
    name = "svhn/raw-16" if old else "svhn/raw-16-bilinear-tf1"
    assert str(error.value) == (
        f"{here.folder} holds the store {name}, not svhn/raw-native: move it to its own place or delete it"
    )
    assert here.folder.is_dir()


# ---- data.fraction


def svhn(folder, **given):
    place = {"data_dir": str(folder), "store_dir": str(folder / "stores")}
    return vtab_datamodule.SVHNDataModule(**FEEDING | place | given)


def test_smaller_fractions_lie_within_larger_ones(written):
    folder = written("svhn")
    shares = {fraction: svhn(folder, fraction=fraction).train_dataset for fraction in (0.1, 0.25, 0.5, 1.0)}
    whole = Counter(shares[1.0].labels.tolist())
    assert sum(whole.values()) == 32
    larger = set(shares[1.0].keys)
    for fraction in (0.5, 0.25, 0.1):
        kept = shares[fraction]
        counts = {label: max(1, int(number * fraction + 0.5)) for label, number in whole.items()}
        assert Counter(kept.labels.tolist()) == counts
        assert set(kept.keys) < larger
        larger = set(kept.keys)
    rows = [shares[1.0].keys.index(key) for key in shares[0.5].keys]
    assert rows == sorted(rows)
    assert shares[0.5].labels.tolist() == shares[1.0].labels[rows].tolist()


def test_a_fraction_is_of_training_images_alone(written):
    folder = written("svhn")
    data = svhn(folder, fraction=0.5)
    batches = list(data.train_dataloader())
    assert sum(int((batch.weights > 0).sum()) for batch in batches) == len(data.train_dataset)
    assert len(data.test_dataset) == 24
    tuning = svhn(folder, fraction=0.5, split="tune")
    assert len(tuning.val_dataset) == 8
    assert 10 <= len(tuning.train_dataset) <= 14
    assert data.fingerprint == svhn(folder).fingerprint


def test_an_fgvc_file_is_predicted_from_the_pixels_that_were_scored(written, tmp_path):
    """The stores are written as the papers' loader decodes: without a rotation by EXIF, alpha dropped."""
    folder = written("cub200")
    data = fgvc_datamodule.CUB200DataModule(
        **FEEDING | {"data_dir": str(folder), "store_dir": str(folder / "stores")}
    )
    pixels = np.arange(80 * 60 * 4, dtype=np.uint32).reshape(80, 60, 4).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png", exif=exif)
    decoded = decoder_of(data.preprocessing)(tmp_path / "a.png")
    assert np.array_equal(decoded, pixels[..., :3])
    assert np.array_equal(decoded, DECODERS[data.plan.spec.decode](tmp_path / "a.png"))


def test_a_fraction_of_an_fgvc_dataset(written):
    folder = written("cub200")
    place = {"data_dir": str(folder), "store_dir": str(folder / "stores")}
    half, whole = (
        fgvc_datamodule.CUB200DataModule(**FEEDING | place, fraction=share) for share in (0.5, 1.0)
    )
    of_class = Counter(whole.train_dataset.labels.tolist())
    assert set(half.train_dataset.keys) < set(whole.train_dataset.keys)
    assert Counter(half.train_dataset.labels.tolist()) == {
        label: int(n / 2 + 0.5) for label, n in of_class.items()
    }
    assert next(iter(half.train_dataloader())).images.shape == (8, 3, 64, 64)


@pytest.mark.parametrize("fraction", [0, 1.5, -0.1, float("nan")])
def test_what_is_no_fraction(tmp_path, fraction):
    message = rf"^data.fraction={fraction} is not a share of the training images: give 0.1, 0.2, ... or 1.0$"
    with pytest.raises(UserError, match=message):
        svhn(tmp_path, fraction=fraction)
