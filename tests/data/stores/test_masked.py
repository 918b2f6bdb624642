import json
import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from helpers.miniatures.masks import png, write_masks
from visprompt.data.sources.images import decode
from visprompt.data.sources.mask_folders import find_masks
from visprompt.data.stores import masked as module
from visprompt.data.stores.masked import open_masks, read_masks
from visprompt.errors import UserError


@pytest.fixture
def root(tmp_path):
    return write_masks(tmp_path / "own", 10)


def opened(root, tmp_path, **options):
    images = find_masks(root, skip_bad=options.get("skip_bad", False))
    return open_masks(images, tmp_path / "stores" / "own", fingerprint=images.fingerprint, **options)


def test_a_store_holds_the_files_of_images_and_the_labels_of_masks(root, tmp_path):
    images, store = find_masks(root), opened(root, tmp_path)
    assert store.keys == tuple(item.key for item in images.items)
    assert store.splits.tolist() == [item.split for item in images.items]
    assert store.class_names == ("ground", "tree", "sky")
    content = (store.folder / "pixels.bin").read_bytes()
    for row, item in enumerate(images.items):
        assert content[store.offsets[2 * row] :].startswith(item.image()), "byte by byte"
        assert np.array_equal(store.image(row), decode(BytesIO(item.image())))
        assert np.array_equal(store.mask(row), np.asarray(Image.open(BytesIO(item.mask()))))
        assert tuple(store.shapes[row]) == store.mask(row).shape == (48, 64)
    assert len(content) == store.offsets[-1]


def test_the_pixels_of_each_class_are_counted(root, tmp_path):
    store = opened(root, tmp_path)
    for split in ("train", "val", "test"):
        masks = [store.mask(row) for row in np.flatnonzero(store.splits == split)]
        assert store.pixels_of[split].tolist() == [int((np.array(masks) == c).sum()) for c in range(3)]


def test_a_store_is_written_once_and_needs_the_files_no_more(root, tmp_path, monkeypatch):
    images = find_masks(root)
    known = images.fingerprint
    first = open_masks(images, tmp_path / "store", fingerprint=known).mask(3)
    for path in [*root.rglob("*.png")]:
        path.unlink()
    monkeypatch.setattr(module, "_write", None)
    assert np.array_equal(open_masks(images, tmp_path / "store", fingerprint=known).mask(3), first)


def test_a_worker_gets_a_store_without_its_pixels(root, tmp_path):
    store = opened(root, tmp_path)
    first = store.image(0)
    data = pickle.dumps(store)
    assert len(data) < 4000
    assert np.array_equal(pickle.loads(data).image(0), first)


def test_a_changed_byte_is_noticed_when_it_is_read(root, tmp_path):
    folder = opened(root, tmp_path).folder
    content = bytearray((folder / "pixels.bin").read_bytes())
    content[100] ^= 1
    (folder / "pixels.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged, pixels.bin is not what its checksums say: delete that"):
        read_masks(folder).image(0)


@pytest.mark.parametrize("what", ["cut", "empty", "short row"])
def test_a_damaged_store_is_written_again_and_that_is_said(root, tmp_path, what, caplog):
    store = opened(root, tmp_path)
    before = store.mask(2)
    manifest = store.folder / "manifest.json"
    if what == "cut":
        (store.folder / "pixels.bin").write_bytes(b"short")
    elif what == "empty":
        manifest.write_text("")
    else:
        content = json.loads(manifest.read_text())
        content["images"][0] = content["images"][0][:-1]
        manifest.write_text(json.dumps({name: v for name, v in content.items() if name != "digest"}))
    assert np.array_equal(opened(root, tmp_path).mask(2), before)
    assert [m for m in caplog.messages if m.endswith("the store is written again from the original files")]


def write(value):
    return lambda path: path.write_bytes(value)


WRONG = {
    "has 64 x 48 pixels and its mask 20 x 20": ("masks/002.png", write(png(np.zeros((20, 20))))),
    "has a mask that has a pixel of value 7, for which there is no class: the 3 classes have the values 0 to "
    "2, and 255 is ignored": ("masks/002.png", write(png(np.full((48, 64), 7)))),
    r"has a mask that has colours \(Pillow's mode RGB\)": (
        "masks/002.png",
        lambda path: Image.new("RGB", (64, 48)).save(path),
    ),
    r"has a mask that cannot be decoded \(not an image of a known format\)": (
        "masks/002.png",
        write(b"no image"),
    ),
    r"cannot be decoded \(not an image of a known format\)": ("images/002.png", write(b"no image")),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_pair_that_cannot_be_used_is_named_or_left_out(root, tmp_path, reason, caplog):
    name, spoil = WRONG[reason]
    spoil(root / name)
    with pytest.raises(
        UserError,
        match=rf"^1 of 10 images cannot be used \(002.png {reason}.*\): repair or remove them, or set "
        "data.skip_bad=true to leave them out$",
    ):
        opened(root, tmp_path)
    assert not (tmp_path / "stores" / "own").exists()
    store = opened(root, tmp_path, skip_bad=True)
    assert "002.png" not in store.keys
    assert len(store.keys) == 9
    assert "1 of 10 images left out: 002.png" in caplog.messages[-1]


def test_training_masks_without_a_labelled_pixel_are_refused(root, tmp_path):
    for path in (root / "masks").iterdir():
        path.write_bytes(png(np.full((48, 64), 255)))
    with pytest.raises(UserError, match=r"^no pixel of a training mask has a class, all are ignored: check "):
        opened(root, tmp_path)


def test_files_that_change_while_they_are_read_are_noticed(root, tmp_path):
    images = find_masks(root)
    known = images.fingerprint
    (root / "masks" / "003.png").write_bytes(png(np.ones((48, 64))))
    with pytest.raises(UserError, match="were changed while they were read: run the command again"):
        open_masks(images, tmp_path / "store", fingerprint=known)
