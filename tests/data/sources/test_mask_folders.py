import re
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.miniatures.masks import png, write_masks
from visprompt.data.masks import IGNORED
from visprompt.data.sources.images import BadImage
from visprompt.data.sources.mask_folders import find_masks
from visprompt.errors import UserError


@pytest.fixture
def root(tmp_path):
    return write_masks(tmp_path / "own", 10)


def test_pairs_are_cut_in_md5_order(root):
    found = find_masks(root)
    assert found.cut
    assert [item.key for item in found.items] == [f"{number:03d}.png" for number in range(10)]
    assert [item.split for item in found.items].count("train") == 8
    assert found.items[3].mask() == (root / "masks" / "003.png").read_bytes()
    again = find_masks(root)
    assert [item.split for item in again.items] == [item.split for item in found.items]


def test_folders_of_splits_are_read_as_they_are(tmp_path):
    found = find_masks(write_masks(tmp_path / "own", 3, splits=("train", "val")))
    assert not found.cut
    assert [item.split for item in found.items] == ["train"] * 3 + ["val"] * 3
    assert found.items[0].key == "train/000.png"


def test_images_in_folders_of_any_depth_have_masks_in_the_same_ones(root):
    for kind in ("images", "masks"):
        (root / kind / "a" / "b").mkdir(parents=True)
        (root / kind / "000.png").rename(root / kind / "a" / "b" / "000.png")
    assert "a/b/000.png" in [item.key for item in find_masks(root).items]


def test_an_image_may_be_of_another_format_than_its_mask(root):
    with Image.open(root / "images" / "000.png") as image:
        image.save(root / "images" / "000.JPG", "jpeg")
    (root / "images" / "000.png").unlink()
    assert find_masks(root).items[0].key == "000.JPG"


def test_the_fingerprint_is_of_content_splits_classes_and_ignored_value_and_not_of_the_place(root, tmp_path):
    before = find_masks(root).fingerprint
    moved = root.rename(tmp_path / "moved")
    assert find_masks(moved).fingerprint == before
    assert find_masks(moved, ["earth", "tree", "sky"]).fingerprint != before
    assert find_masks(moved, ignore=None).fingerprint != before
    (moved / "masks" / "001.png").write_bytes(png(np.zeros((48, 64))))
    assert find_masks(moved).fingerprint != before


def test_classes_are_of_the_file_or_of_the_setting(root, tmp_path):
    assert find_masks(root).class_names == ("ground", "tree", "sky")
    assert find_masks(root, ["a", "b", "c", "d"]).class_names == ("a", "b", "c", "d")
    (tmp_path / "mine.txt").write_text("one\ntwo\n\n")
    assert find_masks(root, str(tmp_path / "mine.txt")).class_names == ("one", "two")


@pytest.mark.parametrize(
    ("ignore", "names", "labels"),
    [
        (255, ("ground", "tree", "sky"), [0, 1, 2, IGNORED]),
        (0, ("tree", "sky"), [IGNORED, 0, 1]),
        (1, ("ground", "sky"), [0, IGNORED, 1]),
        (None, ("ground", "tree", "sky"), [0, 1, 2]),
        (9, ("ground", "tree", "sky"), [0, 1, 2, IGNORED]),
    ],
)
def test_the_ignored_value_may_be_named_and_then_higher_labels_are_one_less(root, ignore, names, labels):
    found = find_masks(root, ignore=ignore)
    assert found.class_names == names
    values = [0, 1, 2] + ([ignore] if ignore in (255, 9) else [])
    assert found.labels(np.array([values], np.uint8)).tolist() == [labels]


def test_a_value_without_a_class_is_named(root):
    with pytest.raises(
        BadImage, match=r"^has a pixel of value 3, for which there is no class: the 3 classes"
    ):
        find_masks(root).labels(np.array([[0, 4, 3]], np.uint8))


def moved_out(root):
    (root / "images" / "train").mkdir()


# what is done to the folder -> the error; {root} is the folder
REFUSED = {
    "no folder": (
        shutil.rmtree,
        "data.root={root} is not a folder: give the folder that holds images/, masks/ and classes.txt",
    ),
    "folders like splits": (
        lambda root: [(root / "images" / name).mkdir() for name in ("Training", "my-test-set", "trees")],
        "images/ in {root} has folders that are named like splits (Training, my-test-set): rename them to "
        "train, val and test, there and in masks/",
    ),
    "images and masks in other folders": (
        lambda root: (root / "masks").rename(root / "labels"),
        "data.root={root} has no folder masks: put the images into images/ and their masks into masks/, with "
        "the same names",
    ),
    "empty": (
        lambda root: [path.unlink() for path in (root / "images").iterdir()],
        "{root}/images is empty: put the images there",
    ),
    "no mask": (
        lambda root: (root / "masks" / "004.png").unlink(),
        "images/004.png in {root} has no mask: add a PNG of the same path in masks/, or set "
        "data.skip_bad=true to leave such files out",
    ),
    "no image": (
        lambda root: (root / "images" / "004.png").unlink(),
        "masks/004.png in {root} has no image: add the image of the same path in images/, or "
        "remove it, or set data.skip_bad=true to leave such files out",
    ),
    "no images": (
        lambda root: [(root / "images" / f"00{number}.png").unlink() for number in (4, 5)],
        "masks/004.png in {root} (one of 2) has no image: add the image of the same path in images/, "
        "or remove it, or set data.skip_bad=true to leave such files out",
    ),
    "another format": (
        lambda root: (root / "masks" / "004.png").rename(root / "masks" / "004.jpg"),
        "masks/004.jpg in {root} is not a PNG: save masks as PNG, which loses nothing, or set data.skip_bad=true "
        "to leave such files out",
    ),
    "a text": (
        lambda root: (root / "images" / "notes.txt").write_text("x"),
        "images/notes.txt in {root} is not a supported image (supported: .bmp .gif .jpeg .jpg .pgm .png .ppm "
        ".tif .tiff .webp): convert or remove it, or set data.skip_bad=true to leave such files out",
    ),
    "the same stem": (
        lambda root: shutil.copy(root / "images" / "004.png", root / "images" / "004.bmp"),
        "images/004.bmp in {root} and 004.png would have the same mask: rename one",
    ),
    "next to splits": (
        moved_out,
        "images/000.png in {root} is not in images/train, images/val or images/test: move it into one of them, "
        "or give no folders of splits and have the images cut",
    ),
    "no classes": (
        lambda root: (root / "classes.txt").unlink(),
        "the classes cannot be read from {root}/classes.txt (No such file or directory): write the name of "
        "each class on a line, in the order of their values from 0, or give data.classes=[NAME,...]",
    ),
    "an empty name": (
        lambda root: (root / "classes.txt").write_text("a\n\nb\n"),
        "{root}/classes.txt gives value 1 the name '': write a plain name",
    ),
    "a name twice": (
        lambda root: (root / "classes.txt").write_text("a\nb\na\n"),
        "{root}/classes.txt has the name 'a' twice: names of classes must differ",
    ),
    "one class": (
        lambda root: (root / "classes.txt").write_text("a\n"),
        "data.root={root} has 1 classes that are not ignored: segmentation needs 2 to 255",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_mismatch_is_one_sentence(root, case):
    change, message = REFUSED[case]
    change(root)
    with pytest.raises(UserError, match=f"^{re.escape(message.format(root=root))}$"):
        find_masks(root)


def test_files_that_are_no_pair_can_be_left_out(root):
    (root / "masks" / "004.png").unlink()
    (root / "images" / "005.png").unlink()
    (root / "masks" / "notes.txt").write_text("x")
    found = find_masks(root, skip_bad=True)
    assert len(found.items) == 8
    assert found.left_out == {
        "images without a mask": 1,
        "masks of other formats": 1,
        "masks without an image": 1,
    }


def test_too_few_images_to_cut_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 2 of the 3 images that a train/val/test split needs"):
        find_masks(write_masks(tmp_path / "own", 2))


def test_copies_of_training_images_are_counted(tmp_path):
    root = write_masks(tmp_path / "own", 2, splits=("train", "val", "test"))
    shutil.copy(root / "images/train/000.png", root / "images/test/001.png")
    assert find_masks(root).repeated == {"test": 1}
