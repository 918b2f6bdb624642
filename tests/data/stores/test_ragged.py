import errno
import json
import os
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.damage import bounded, damages, outcome, spoil
from helpers.miniatures import write_folder
from visprompt.data.sources.images import decode
from visprompt.data.sources.own_images import find
from visprompt.data.stores import ragged as module
from visprompt.data.stores.ragged import open_store, read_store
from visprompt.data.transforms import resize_short_side
from visprompt.errors import UserError
from visprompt.files import claimed

NAME = "pets-24"


@pytest.fixture
def folder(tmp_path):
    return find(write_folder(tmp_path / "pets", ("cat", "dog"), 5))


def opened(folder, store_dir, skip_bad=False):
    return open_store(folder, store_dir / NAME, 24, skip_bad=skip_bad)


def left(stores):
    """Names in the folder of stores, without the empty files of locks."""
    return sorted(path.name for path in stores.iterdir() if path.suffix != ".lock")


def damaged(root):
    (root / "cat" / "0001.png").write_bytes(b"no image")
    (root / "dog" / "0002.png").write_bytes((root / "dog" / "0002.png").read_bytes()[:100])
    return find(root)


def test_a_store_holds_what_decoding_gives(folder, tmp_path):
    store = opened(folder, tmp_path / "stores")
    assert store.keys == tuple(item.key for item in folder.items)
    assert store.labels.tolist() == [item.label for item in folder.items]
    assert store.splits.tolist() == [item.split for item in folder.items]
    for row, item in enumerate(folder.items):
        assert np.array_equal(store.image(row), resize_short_side(decode(item.path), 24))
    assert store.image(0).shape == (24, 30, 3)
    assert left(tmp_path / "stores") == [NAME]


def test_images_are_decoded_once(folder, tmp_path, monkeypatch):
    opened(folder, tmp_path)
    monkeypatch.setattr(module, "_write", None)
    assert len(opened(folder, tmp_path).keys) == 10


def test_a_worker_gets_a_store_without_its_pixels(folder, tmp_path):
    store = opened(folder, tmp_path)
    first = store.image(0)
    data = pickle.dumps(store)
    assert len(data) < 4000
    assert np.array_equal(pickle.loads(data).image(0), first)


def cut(folder):
    with (folder / "pixels.bin").open("r+b") as file:
        file.truncate(100)


def empty_manifest(folder):
    (folder / "manifest.json").write_text("")


def other_schema(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": 0}))


def no_pixels(folder):
    (folder / "pixels.bin").unlink()


def flipped_label(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["images"][0][1] = 1 - manifest["images"][0][1]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [cut, empty_manifest, other_schema, no_pixels, flipped_label])
def test_a_damaged_store_is_built_again_and_that_is_said(folder, tmp_path, damage, caplog):
    stores = tmp_path / "stores"
    whole = opened(folder, stores)
    pixels = (whole.folder / "pixels.bin").read_bytes()
    damage(whole.folder)
    again = opened(folder, stores)
    assert again.labels.tolist() == whole.labels.tolist()
    (said,) = [message for message in caplog.messages if "damaged" in message]
    assert said.startswith(f"{whole.folder}/")
    assert said.endswith(": the store is written again from the original files")
    assert (again.folder / "pixels.bin").read_bytes() == pixels
    assert sorted(path.name for path in again.folder.iterdir()) == ["manifest.json", "pixels.bin"]
    assert left(stores) == [again.folder.name]


def test_of_several_builders_at_once_one_decodes_and_the_others_take_its_store(folder, tmp_path):
    stores, results, decoded = tmp_path / "stores", [], []
    barrier = threading.Barrier(4)

    def slowly(path):
        decoded.append(path)
        time.sleep(0.01)
        return decode(path)

    def build():
        barrier.wait()
        results.append(open_store(folder, stores / NAME, 24, decode=slowly))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert sorted(decoded) == sorted(item.path for item in folder.items)
    assert all(np.array_equal(store.image(9), results[0].image(9)) for store in results)
    assert left(stores) == [NAME]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk of .*stores is full: free space there, or set store_dir"),
        (
            errno.EROFS,
            r"cannot write to .*stores .*: set store_dir \(data.store_dir in training\) to another folder",
        ),
    ],
)
def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, monkeypatch, number, message):
    def fail(file, image):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "in_threads", fail)
    with pytest.raises(UserError, match=message):
        opened(folder, tmp_path / "stores")
    assert left(tmp_path / "stores") == []


def test_an_interrupt_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def interrupt(file, image):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "in_threads", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opened(folder, tmp_path / "stores")
    assert left(tmp_path / "stores") == []


def test_what_a_killed_process_left_is_swept_but_not_a_running_one(folder, tmp_path):
    dead, alive = (tmp_path / "stores" / f"{NAME}.tmp-{word}" for word in ("dead", "alive"))
    for path in (dead, alive):
        path.mkdir(parents=True)
        (path / "pixels.bin").write_bytes(b"x")
        os.utime(path, (time.time() - 10,) * 2)
    with claimed(alive):
        opened(folder, tmp_path / "stores")
    assert left(tmp_path / "stores") == [NAME, alive.name]


def test_files_that_cannot_be_decoded_are_all_named_at_once(tmp_path):
    folder = damaged(write_folder(tmp_path / "pets", ("cat", "dog"), 5))
    message = r"2 of 10 images cannot be used \(cat/0001.png cannot be decoded .*; dog/0002.png .*\): repair or remove"
    with pytest.raises(UserError, match=message):
        opened(folder, tmp_path / "stores")
    assert left(tmp_path / "stores") == []


def test_at_most_five_bad_files_are_listed(tmp_path):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 4)
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="8 of 8 images") as caught:
        opened(find(root), tmp_path / "stores", skip_bad=True)
    assert str(caught.value).count(".png") == 5


def test_bad_files_are_left_out_on_demand_and_counted(tmp_path, caplog):
    folder = damaged(write_folder(tmp_path / "pets", ("cat", "dog"), 5))
    store = opened(folder, tmp_path / "stores", skip_bad=True)
    assert len(store.keys) == 8
    assert [key for key, _ in store.bad] == ["cat/0001.png", "dog/0002.png"]
    assert "2 of 10 images left out: cat/0001.png cannot be decoded" in caplog.text
    last = next(item for item in folder.items if item.key == "dog/0004.png")
    assert np.array_equal(store.image(7), resize_short_side(decode(last.path), 24))
    with pytest.raises(UserError, match="2 of 10 images cannot be used"):
        opened(folder, tmp_path / "stores")
    assert len(opened(folder, tmp_path / "stores", skip_bad=True).keys) == 8


def test_a_file_mended_in_place_replaces_the_store_without_it(tmp_path):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 5)
    image = root / "cat" / "0001.png"
    content = image.read_bytes()
    image.write_bytes(b"x" * len(content))
    assert len(opened(find(root), tmp_path / "stores", skip_bad=True).keys) == 9
    image.write_bytes(content)
    assert len(opened(find(root), tmp_path / "stores").keys) == 10


def test_resizing_keeps_the_shape_of_the_image(tmp_path):
    image = np.asarray(Image.new("RGB", (50, 33), "red"))
    assert resize_short_side(image, 256).shape == (256, 387, 3)
    assert resize_short_side(image.transpose(1, 0, 2), 64).shape == (96, 64, 3)


def test_changed_pixels_are_refused_and_the_store_is_made_anew_once_it_is_deleted(folder, tmp_path):
    store = opened(folder, tmp_path)
    path = store.folder / "pixels.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError) as error:
        opened(folder, tmp_path).image(3)
    assert str(error.value) == (
        f"the store {store.folder} is damaged, pixels.bin is not what its checksums say: delete that folder "
        "and run the same command, which writes it again from the original files"
    )
    shutil.rmtree(store.folder)
    assert (opened(folder, tmp_path).folder / "pixels.bin").read_bytes() == whole


def outdated(folder):
    """Turns a store into one of an older version: without checksums and digest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in manifest.items() if k not in ("digest", "chunks", "made_for")})
    )


def test_a_store_of_an_older_version_is_given_checksums(folder, tmp_path, monkeypatch):
    store = opened(folder, tmp_path)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    outdated(store.folder)
    monkeypatch.setattr(module, "_write", None)  # nothing is decoded anew
    again = opened(folder, tmp_path)
    assert (again.chunks, again.made_for) == (store.chunks, NAME)
    assert json.loads((store.folder / "manifest.json").read_text()) == manifest


def test_a_store_of_another_size_in_the_place_of_one_is_not_used(folder, tmp_path):
    other = open_store(folder, tmp_path / "pets-32", 32)
    other.folder.rename(tmp_path / NAME)
    with pytest.raises(UserError) as error:
        opened(folder, tmp_path)
    assert str(error.value) == (
        f"{tmp_path / NAME} holds the store pets-32, not {NAME}: move it to its own place or delete it"
    )
    outdated(tmp_path / NAME)
    assert opened(folder, tmp_path).short_side == 24, (
        "an older store does not say more, and the originals are there"
    )


@bounded
@given(damage=damages(), name=st.sampled_from(["manifest.json", "pixels.bin"]))
def test_a_flipped_bit_or_a_cut_is_never_another_store(tmp_path, damage, name):
    stores = tmp_path / "stores"
    if not stores.exists():
        opened(find(write_folder(tmp_path / "pets", ("cat", "dog"), 5)), stores)
    path = stores / NAME / name
    whole, expected = path.read_bytes(), read_store(stores / NAME)
    spoil(path, damage, whole)

    def read():
        store = read_store(stores / NAME)
        return store, [store.image(row).tolist() for row in range(10)]

    found, sentence = outcome(read)
    path.write_bytes(whole)
    assert sentence.startswith((str(path), f"the store {stores / NAME} is damaged")) or (
        found[0].keys == expected.keys
        and found[0].labels.tolist() == expected.labels.tolist()
        and found[1] == [expected.image(row).tolist() for row in range(10)]
    )
