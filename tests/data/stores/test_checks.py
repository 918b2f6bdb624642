from pathlib import Path

import numpy as np
import pytest

from visprompt.data.catalog.task import Golden, TaskSpec
from visprompt.data.sources.images import ImageFolder, Item
from visprompt.data.stores.checks import Check, check
from visprompt.data.stores.prepare import check_folder

KEYS = {"train800": ["train/b", "train/a"], "val200": ["train/c"], "test": ["test/a", "test/d", "test/e"]}
LABELS = {"train800": [0, 1], "val200": [2], "test": [1, 0, 2]}


def spec(sizes=None, **golden):
    return TaskSpec(
        id="made-up",
        group="natural",
        family="vtab",
        num_classes=3,
        split_sizes=sizes or {"train800": 2, "val200": 1, "test": 3},
        golden=golden,
        source="",
        licence="",
        homepage="",
        citation="",
        description="",
    )


def found(record, keys=None, labels=None, **given):
    """Name -> outcome and detail; the names are distinct."""
    arrays = {name: np.array(values, np.int64) for name, values in (LABELS | (labels or {})).items()}
    checks = check(record, KEYS | (keys or {}), arrays, **given)
    assert all(isinstance(one, Check) for one in checks)
    assert len({one.name for one in checks}) == len(checks)
    return {one.name: (one.good, one.detail) for one in checks}


def test_the_right_data_passes():
    record = spec(
        train800=Golden(keys=("b",), labels=(0, 1), histogram=(1, 1, 0), classes=2),
        val200=Golden(keys=("c",), labels=(2,)),
        test=Golden(classes=3),
    )
    assert found(record) == {
        "number of images in train800": (True, "2"),
        "number of images in val200": (True, "1"),
        "number of images in test": (True, "3"),
        "range of labels": (True, "0..2 of 3 classes"),
        "train800 and val200 disjoint": (True, "0 in both"),
        "train800 and test disjoint": (True, "0 in both"),
        "val200 and test disjoint": (True, "0 in both"),
        "no image twice in a set": (True, "0 repeated"),
        "first keys of train800": (True, "b"),
        "first labels of train800": (True, "0 1"),
        "images per class in train800": (True, "1 1 0"),
        "classes in train800": (True, "2"),
        "first keys of val200": (True, "c"),
        "first labels of val200": (True, "2"),
        "classes in test": (True, "3"),
    }


def failed(*args, **given):
    return {name: detail for name, (good, detail) in found(*args, **given).items() if not good}


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [
        ({"test": 26_032}, {"number of images in test": "3, expected 26,032"}),
        ({"val200": 0}, {"number of images in val200": "1, expected 0"}),
        ({"train": 800}, {"number of images in train": "0, expected 800"}),
    ],
)
def test_numbers_of_images(sizes, wrong):
    assert failed(spec({"train800": 2, "val200": 1, "test": 3} | sizes)) == wrong


def test_large_numbers_are_written_with_commas():
    keys = {"test": [f"test/{row}" for row in range(1234)]}
    record = spec({"train800": 2, "val200": 1, "test": 1234})
    assert found(record, keys)["number of images in test"] == (True, "1,234")


@pytest.mark.parametrize(
    ("labels", "detail"),
    [([1, 0, 3], "0..3 of 3 classes"), ([-1, 0, 2], "-1..2 of 3 classes")],
)
def test_labels_out_of_range(labels, detail):
    assert failed(spec(), labels={"test": labels}) == {"range of labels": detail}


def test_an_image_in_two_sets():
    keys = {"test": ["test/a", "train/b", "train/a"]}
    assert failed(spec(), keys) == {"train800 and test disjoint": "2 in both, train/a for one"}


def test_the_same_key_of_two_official_splits_is_two_images():
    assert failed(spec(), {"test": ["test/a", "test/b", "test/c"]}) == {}


def test_an_image_twice_in_a_set():
    assert failed(spec(), {"test": ["test/a", "test/a", "test/a"]}) == {
        "no image twice in a set": "2 repeated"
    }


@pytest.mark.parametrize(
    ("golden", "wrong"),
    [
        (Golden(keys=("b", "x")), {"first keys of train800": "b a, expected b x"}),
        (Golden(keys=("a",)), {"first keys of train800": "b, expected a"}),
        (Golden(keys=("b", "a", "f")), {"first keys of train800": "b a, expected b a f"}),
        (Golden(labels=(1, 0)), {"first labels of train800": "0 1, expected 1 0"}),
        (Golden(labels=(0, 1, 1)), {"first labels of train800": "0 1, expected 0 1 1"}),
        (Golden(histogram=(2, 0, 0)), {"images per class in train800": "1 1 0, expected 2 0 0"}),
        (Golden(classes=3), {"classes in train800": "2, expected 3"}),
    ],
)
def test_known_values(golden, wrong):
    assert failed(spec(train800=golden)) == wrong


def test_classes_that_a_test_set_lacks_are_said_and_not_refused():
    labels = {name: np.array(values) for name, values in LABELS.items()}
    record = spec(test=Golden(classes=2), train800=Golden(classes=3))
    fatal = {one.name: one.fatal for one in check(record, KEYS, labels) if not one.good}
    assert fatal == {"classes in test": False, "classes in train800": True}


def test_train_and_validation_together():
    record = spec(train800val200=Golden(labels=(0, 1, 2), histogram=(1, 1, 1), classes=3))
    assert {name: one for name, one in found(record).items() if "train800val200" in name} == {
        "first labels of train800val200": (True, "0 1 2"),
        "images per class in train800val200": (True, "1 1 1"),
        "classes in train800val200": (True, "3"),
    }
    assert failed(spec(train800val200=Golden(histogram=(3, 0, 0)))) == {
        "images per class in train800val200": "1 1 1, expected 3 0 0"
    }


def test_a_key_may_hold_slashes():
    keys = {"train800": ["train//a/abbey/sun.jpg", "train/x/y.jpg"]}
    record = spec(train800=Golden(keys=("/a/abbey/sun.jpg", "x/y.jpg")))
    assert found(record, keys)["first keys of train800"] == (True, "/a/abbey/sun.jpg x/y.jpg")


UNORDERED = {
    "train800": ["train800/b", "train800/a"],
    "val200": ["val200/c"],
    "test": ["test/d", "test/e", "test/f"],
}


def test_without_an_order_first_keys_and_labels_say_nothing():
    golden = Golden(keys=("x",), labels=(2,), histogram=(0, 0, 2), classes=1)
    assert failed(spec(train800=golden), UNORDERED, ordered=False) == {
        "images per class in train800": "1 1 0, expected 0 0 2",
        "classes in train800": "2, expected 1",
    }
    assert not [
        name for name in found(spec(train800=golden), UNORDERED, ordered=False) if name.startswith("first")
    ]


def test_without_official_splits_lists_are_compared_by_the_names_in_them():
    keys = {**UNORDERED, "test": ["test/d", "test/a", "test/f"]}
    wrong = failed(spec(), keys, ordered=False)
    assert set(wrong) == {"train800 and test disjoint, by name"}
    assert wrong["train800 and test disjoint, by name"].startswith("1 in both, ")


def test_a_known_set_that_is_not_there_is_left_out():
    assert failed(spec(other=Golden(keys=("x",), classes=1))) == {}


def test_labels_above_the_histogram_fail_it():
    wrong = failed(spec(test=Golden(histogram=(1, 1, 1))), labels={"test": [0, 1, 5]})
    assert wrong == {
        "range of labels": "0..5 of 3 classes",
        "images per class in test": "1 1 0 0 0 1, expected 1 1 1",
    }


def test_labels_below_zero_fail_the_histogram():
    wrong = failed(spec(test=Golden(histogram=(1, 1, 1))), labels={"test": [0, 1, -1]})
    assert wrong["range of labels"] == "-1..2 of 3 classes"
    assert "images per class in test" in wrong


def test_a_set_without_images_is_a_failed_check():
    wrong = failed(spec(test=Golden(histogram=(1, 1, 1), classes=3)), {"test": []}, {"test": []})
    assert wrong["number of images in test"] == "0, expected 3"
    assert {"images per class in test", "classes in test"} < set(wrong)


# ---- FGVC


def bird(split, number, label=0):
    key = f"{split}/{number}.jpg"
    return Item(Path(key), key, label, split)


BIRDS = [
    *(bird("train", n, n % 3) for n in range(5)),
    bird("val", 0),
    *(bird("test", n, n % 3) for n in range(2)),
]
SIZES = {"train": 5, "val": 1, "test": 2}


def found_birds(items, names=("a", "b", "c"), sizes=SIZES):
    checks = check_folder(spec(sizes), ImageFolder(names, tuple(items)))
    return {one.name: (one.good, one.detail) for one in checks}


def test_an_fgvc_dataset_passes_whatever_the_cut_of_train_and_val():
    right = {
        "number of classes": (True, "3"),
        "number of images in train+val": (True, "6"),
        "number of images in test": (True, "2"),
        "range of labels": (True, "0..2 of 3 classes"),
        "train+val and test disjoint": (True, "0 in both"),
        "no image twice in a set": (True, "0 repeated"),
    }
    assert found_birds(BIRDS) == right
    assert found_birds(BIRDS, sizes={"train": 4, "val": 2, "test": 2}) == right


def test_an_fgvc_dataset_fails():
    other = [*BIRDS[1:], BIRDS[-1]]
    other[-1] = Item(Path("x"), BIRDS[1].key, 5, "test")
    wrong = {name: detail for name, (good, detail) in found_birds(other, ("a", "b")).items() if not good}
    assert wrong == {
        "number of classes": "2, expected 3",
        "number of images in train+val": "5, expected 6",
        "number of images in test": "3, expected 2",
        "range of labels": "0..5 of 3 classes",
        "train+val and test disjoint": "1 in both, train/1.jpg for one",
    }


def test_an_fgvc_dataset_without_test_images_fails():
    assert found_birds(BIRDS[:-2])["number of images in test"] == (False, "0, expected 2")
