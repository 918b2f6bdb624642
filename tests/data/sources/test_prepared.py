import io

import numpy as np
import pytest
from PIL import Image

from helpers.miniatures import circulated
from visprompt.data.catalog.task import TaskSpec
from visprompt.data.sources.prepared import prepared
from visprompt.errors import UserError

COUNTS = {"train800": 8, "val200": 3, "test": 5}


def make_spec(**changes):
    known = {
        "id": "cifar",
        "aliases": ("cifar100", "cifar-100"),
        "group": "natural",
        "family": "vtab",
        "num_classes": 4,
        "split_sizes": COUNTS,
        **dict.fromkeys(("source", "licence", "homepage", "citation", "description"), ""),
    }
    return TaskSpec(**{**known, **changes})


@pytest.fixture
def root(tmp_path):
    assert circulated.prepared(tmp_path, make_spec(), COUNTS, np.random.default_rng(0)) == COUNTS
    return tmp_path


def test_keys_labels_and_images(root):
    content = prepared(root, make_spec())
    assert {part: len(found.keys) for part, found in content.parts.items()} == COUNTS
    assert content.parts["train800"].keys[:2] == ["images/train800/000000.jpg", "images/train800/000001.jpg"]
    assert content.parts["test"].labels["cifar"].tolist() == [0, 1, 2, 3, 0]
    assert content.parts["test"].labels["cifar"].dtype == np.int64
    assert content.lossy
    wanted = {
        "test": ["images/test/000004.jpg", "images/test/000001.jpg"],
        "val200": ["images/val200/000002.jpg"],
    }
    found = list(content.read(wanted))
    assert [(one.split, one.key) for one in found] == [
        ("val200", "images/val200/000002.jpg"),
        ("test", "images/test/000001.jpg"),
        ("test", "images/test/000004.jpg"),
    ]
    assert found[1].image == (root / "cifar/images/test/000001.jpg").read_bytes()
    assert content.decode(found[1].image).shape == (40, 40, 3)


def test_the_miniature_is_jpeg_75_in_the_colour_of_the_label(root):
    with Image.open(root / "cifar/images/test/000000.jpg") as image:
        table = image.quantization[0]
        assert image.format == "JPEG"
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "jpeg", quality=75)
    with Image.open(file) as reference:
        assert table == reference.quantization[0]
    content = prepared(root, make_spec())
    means = [
        content.decode(one.image).mean((0, 1))
        for one in content.read({"train800": content.parts["train800"].keys})
    ]
    for label in range(4):
        assert np.abs(means[label] - means[label + 4]).max() < 4
        assert min(np.abs(means[label] - means[other]).max() for other in range(4) if other != label) > 12


@pytest.mark.parametrize("name", ["cifar100", "cifar-100"])
def test_the_folder_may_have_an_alias(root, name):
    (root / "cifar").rename(root / name)
    assert len(prepared(root, make_spec()).parts["test"].keys) == 5


def test_the_folder_of_the_task_itself(root):
    assert len(prepared(root / "cifar", make_spec()).parts["test"].keys) == 5


def test_only_the_list_of_both(root, caplog):
    for part in ("train800", "val200"):
        (root / "cifar" / f"{part}.txt").unlink()
    content = prepared(root, make_spec())
    assert content.parts["train800"].keys[0] == "images/train800val200/000000.jpg"
    assert content.parts["train800"].labels["cifar"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert content.parts["val200"].keys[0] == "images/train800val200/000008.jpg"
    assert content.parts["val200"].labels["cifar"].tolist() == [0, 1, 2]
    assert "has no train800.txt: the first 8 lines of train800val200.txt are taken" in caplog.text


def test_png_is_lossless_if_all_are(root):
    for part in COUNTS:
        for file in (root / "cifar/images" / part).iterdir():
            file.rename(file.with_suffix(".PNG"))
        listed = root / "cifar" / f"{part}.txt"
        listed.write_text(listed.read_text().replace(".jpg", ".PNG"))
    assert not prepared(root, make_spec()).lossy
    (root / "cifar/images/test/000002.PNG").rename(root / "cifar/images/test/000002.jpeg")
    listed.write_text(listed.read_text().replace("2.PNG", "2.jpeg"))
    assert prepared(root, make_spec()).lossy


def test_odd_but_clear_lines(root):
    listed = root / "cifar/test.txt"
    (root / "cifar/images/test/000000.jpg").rename(root / "cifar/images/test/a b.jpg")
    listed.write_text("./images/test/a b.jpg 3\r\n\r\nimages\\test\\000001.jpg\t2")
    content = prepared(root, make_spec())
    assert content.parts["test"].keys == ["images/test/a b.jpg", "images/test/000001.jpg"]
    assert content.parts["test"].labels["cifar"].tolist() == [3, 2]
    assert len(list(content.read({"test": content.parts["test"].keys}))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "images/test/000009.jpg 1",
            r"test.txt, line 6: there is no image images/test/000009.jpg in .*cifar, get",
        ),
        ("images/test/000001.jpg 1", r"test.txt, line 6: images/test/000001.jpg is listed twice"),
        ("images/test/000001.jpg", r"test.txt, line 6: 'images/test/000001.jpg' is not a path and a label"),
        ("images/test/000001.jpg one", r"test.txt, line 6: '.* one' is not a path and a label"),
        ("./ 1", r"test.txt holds the member './', which points outside its folder"),
        ("../secret.jpg 1", r"test.txt holds the member '../secret.jpg', which points outside its folder"),
        ("/etc/hostname 1", r"test.txt holds the member '/etc/hostname', which points outside its folder"),
        ("images/test/000009.jpg \xff", r"test.txt, line 6: .* is not a path and a label"),
    ],
)
def test_a_faulty_line_is_named(root, line, message):
    listed = root / "cifar/test.txt"
    listed.write_bytes(listed.read_bytes() + line.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        prepared(root, make_spec())


def test_a_label_out_of_range(root):
    listed = root / "cifar/val200.txt"
    listed.write_text(listed.read_text().replace("000002.jpg 2", "000002.jpg 4"))
    message = r"list of val200 gives image images/val200/000002.jpg the label 4, outside 0..3"
    with pytest.raises(UserError, match=message):
        prepared(root, make_spec())


def test_missing_folders_and_lists(root):
    with pytest.raises(
        UserError, match=r"holds no folder svhn or house with test.txt: give the folder into which"
    ):
        prepared(root, make_spec(id="svhn", aliases=("house",)))
    (root / "cifar/val200.txt").unlink()
    with pytest.raises(UserError, match=r"there is no file .*val200.txt: get it"):
        prepared(root, make_spec())


def test_an_image_that_goes_away_after_listing(root):
    content = prepared(root, make_spec())
    (root / "cifar/images/test/000003.jpg").unlink()
    with pytest.raises(UserError, match=r"there is no file .*000003.jpg"):
        list(content.read({"test": content.parts["test"].keys}))
