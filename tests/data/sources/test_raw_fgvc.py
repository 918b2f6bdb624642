import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from helpers.miniatures import fgvc as synthetic
from helpers.miniatures.natural import write_mat
from visprompt.data.catalog.task import SourceFile, TaskSpec
from visprompt.data.sources.archive import unpack
from visprompt.data.sources.fgvc import fgvc, fgvc_root
from visprompt.data.sources.images import decode
from visprompt.data.splits import md5_order
from visprompt.errors import UserError

COUNTS = {"train": 60, "validation": 20, "test": 20}
WRITERS = {
    "cub200": synthetic.cub200,
    "nabirds": synthetic.nabirds,
    "oxford_flowers": synthetic.oxford_flowers,
    "stanford_dogs": synthetic.stanford_dogs,
    "stanford_cars": synthetic.stanford_cars,
    "stanford_cars (devkit)": synthetic.stanford_cars_devkit,
}
CLASSES = {"cub200": 200, "nabirds": 555, "oxford_flowers": 102, "stanford_dogs": 120, "stanford_cars": 196}


def record(name, **changes):
    task = name.split()[0]
    words = dict.fromkeys(("source", "licence", "homepage", "citation", "description"), "")
    given = {
        "id": task,
        "group": "fine-grained",
        "family": "fgvc",
        "num_classes": CLASSES[task],
        "split_sizes": {},
    }
    return TaskSpec(**(words | given | changes))


def unpacked(name, root, counts=COUNTS):
    """Writes the archives of a dataset and unpacks them beside each other, as a preparation does."""
    root.mkdir(parents=True, exist_ok=True)
    written = WRITERS[name](root, counts, np.random.default_rng(0))
    for archive in sorted(root.iterdir()):
        if archive.suffix in (".tgz", ".tar", ".gz"):
            unpack(archive, root)
            archive.unlink()
    return written


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each dataset once, unpacked; tests that change files make their own."""
    roots = {}
    for name in WRITERS:
        roots[name] = tmp_path_factory.mktemp("fgvc") / name.split()[0]
        unpacked(name, roots[name])
    return roots


def sizes(folder):
    return dict(Counter(item.split for item in folder.items))


@pytest.mark.parametrize("name", WRITERS)
def test_official_lists(data, name):
    folder = fgvc(data[name], record(name))
    val = 20 if name == "oxford_flowers" else 8  # 15 images of each of 4 classes: 2 are val
    assert sizes(folder) == {"train": 80 - 20 if val == 20 else 60 - val, "val": val, "test": 20}
    assert {item.label for item in folder.items} == {0, 1, 2, 3}
    keys = [item.key for item in folder.items]
    assert keys == sorted(set(keys))
    assert all(item.path.is_file() for item in folder.items)
    assert len(folder.class_names) == 4
    colours = {label: [] for label in range(4)}
    for item in folder.items:
        colours[item.label].append(decode(item.path).mean(axis=(0, 1)))
    assert all(np.std(of_one, axis=0).max() < 4 for of_one in colours.values())  # a label names one colour
    means = np.array([np.mean(of_one, axis=0) for of_one in colours.values()])
    assert min(np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a)) > 10


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_writer_says_it_wrote(tmp_path, name):
    written = unpacked(name, tmp_path, {"train": 12, "validation": 5, "test": 7})
    folder = fgvc(tmp_path, record(name))
    assert sum(written.values()) == len(folder.items)
    assert written["test"] == sizes(folder)["test"] == 7
    expected = (
        {"train": 12, "validation": 5, "test": 7} if name == "oxford_flowers" else {"train": 12, "test": 7}
    )
    assert written == expected


def test_keys_and_names(data):
    def first(name, **changes):
        folder = fgvc(data[name], record(name, **changes))
        return folder.items[0].key, folder.class_names

    assert first("cub200") == (
        "001.Black_footed_Albatross/Black_footed_Albatross_0001.jpg",
        ("Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross", "Groove_billed_Ani"),
    )
    key, names = first("nabirds")
    assert key.startswith("0295/")
    assert names == ("Common Eider", "Oak Titmouse (Adult)", "Juniper Titmouse", "Verdin")
    assert first("oxford_flowers", class_names=("a", "b", "c", "d")) == (
        "image_00001.jpg",
        ("a", "b", "c", "d"),
    )
    assert first("stanford_dogs") == (
        "n02085620-Chihuahua/n02085620_10001.jpg",
        ("Chihuahua", "Japanese_spaniel", "Maltese_dog", "Pekinese"),
    )
    assert first("stanford_cars", class_names=tuple("abcd")) == ("car_ims/000001.jpg", ("a", "b", "c", "d"))
    assert first("stanford_cars (devkit)") == ("cars_test/00001.jpg", ("0", "1", "2", "3"))


def test_val_is_a_tenth_of_each_class_in_md5_order(data):
    folder = fgvc(data["cub200"], record("cub200"))
    for label in range(4):
        of_class = [item for item in folder.items if item.label == label and item.split != "test"]
        order = md5_order([item.key for item in of_class], "val")
        assert {item.key for item in of_class if item.split == "val"} == set(order[:2])


@pytest.mark.parametrize(("train", "val"), [(4 * 14, 4), (4 * 15, 8), (4 * 2, 4), (4, 0)])
def test_val_is_rounded_half_up_and_leaves_train_something(tmp_path, train, val):
    unpacked("stanford_cars", tmp_path, {"train": train, "test": 4})
    assert sizes(fgvc(tmp_path, record("stanford_cars"))).get("val", 0) == val


@pytest.mark.parametrize("name", ["cub200", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"])
def test_json_files_are_the_splits_where_they_are(tmp_path, name):
    unpacked(name, tmp_path)
    spec = record(name, class_names=tuple("abcd"))
    official = fgvc(tmp_path, spec)
    # class 0 has no train image left
    items = [item for item in official.items if item.split != "train" or item.label]
    moved = [
        item._replace(split="train") if item.label == 0 and item.split == "val" else item for item in items
    ]
    synthetic.json_splits(fgvc_root(tmp_path, spec), moved)
    folder = fgvc(tmp_path, spec)
    assert folder.items == tuple(moved)
    assert folder.class_names == spec.class_names
    assert folder.fingerprint != official.fingerprint


def test_json_files_above_the_folder_of_the_archive_count_too(tmp_path):
    unpacked("cub200", tmp_path)
    official = fgvc(tmp_path, record("cub200"))
    synthetic.json_splits(
        tmp_path,
        [item for item in official.items if item.split != "val"]
        + [item for item in official.items if item.split == "val"][:4],
    )
    folder = fgvc(tmp_path, record("cub200"))
    assert sizes(folder) == {"train": 52, "val": 4, "test": 20}
    assert folder.class_names == official.class_names
    assert fgvc_root(tmp_path, record("cub200")) == tmp_path / "CUB_200_2011"
    assert fgvc_root(tmp_path / "CUB_200_2011", record("cub200")) == tmp_path / "CUB_200_2011"


def test_flowers_json_with_and_without_jpg_and_images_with_and_without_jpg(tmp_path):
    spec = record("oxford_flowers")
    unpacked("oxford_flowers", tmp_path)
    items = fgvc(tmp_path, spec).items
    synthetic.json_splits(tmp_path, items)
    first = fgvc(tmp_path, spec)
    synthetic.json_splits(tmp_path, items, prefix="jpg/")
    assert fgvc(tmp_path, spec).fingerprint == first.fingerprint
    for path in (tmp_path / "jpg").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "jpg").rmdir()
    flat = fgvc(tmp_path, spec)
    assert flat.fingerprint == first.fingerprint
    assert flat.items[0].path == tmp_path / "image_00001.jpg"


def test_nested_cars_folders(tmp_path):
    unpacked("stanford_cars (devkit)", tmp_path)
    fingerprint = fgvc(tmp_path, record("stanford_cars")).fingerprint
    for split in ("train", "test"):
        (tmp_path / f"cars_{split}").rename(tmp_path / "inner")
        (tmp_path / f"cars_{split}").mkdir()
        (tmp_path / "inner").rename(tmp_path / f"cars_{split}" / f"cars_{split}")
    (tmp_path / "devkit" / "cars_train_annos.mat").replace(tmp_path / "cars_train_annos.mat")
    nested = fgvc(tmp_path, record("stanford_cars"))
    assert nested.fingerprint == fingerprint
    assert nested.items[0].path == tmp_path / "cars_test" / "cars_test" / "00001.jpg"


def test_class_ids_with_gaps_are_mapped_once_from_train(tmp_path):
    (tmp_path / "images" / "0007").mkdir(parents=True)
    for name in "abcd":
        (tmp_path / "images" / "0007" / f"{name}.jpg").write_bytes(b"")
    (tmp_path / "classes.txt").write_text("7 A bird\n")
    lists = {
        "train": {"0007/a.jpg": 900, "0007/b.jpg": 31},
        "val": {"0007/c.jpg": 900},
        "test": {"0007/d.jpg": "31"},
    }
    for split, images in lists.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(images))
    folder = fgvc(tmp_path, record("nabirds"))
    assert [item.label for item in folder.items] == [1, 0, 1, 0]  # val lacks 31, which shifts nothing
    assert folder.class_names == ("A bird", "A bird")  # the folder tells it, whatever the json numbers it
    (tmp_path / "val.json").write_text(json.dumps({"0007/c.jpg": 30}))
    with pytest.raises(
        UserError, match=r"val.json gives image 0007/c.jpg the class 30, of which .*train.json has no"
    ):
        fgvc(tmp_path, record("nabirds"))


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "{", r"train.json is truncated or damaged \("),
        (
            "val",
            '["a.jpg"]',
            r"val.json is not of the form \{image path: class id\}: get the split files again",
        ),
        ("test", '{"a.jpg": [1]}', r"test.json is not of the form"),
        ("val", None, r"there is no file .*val.json"),
        ("train", "{}", r"train.json has 0 classes where cub200 has 200"),
        (
            "train",
            json.dumps({f"{i}.jpg": i for i in range(201)}),
            r"train.json has 201 classes where cub200 has 200",
        ),
        ("test", '{"a/1.jpg": 1}', r"train.json and .*test.json both list a/1.jpg"),
        (
            "test",
            '{"a/9.jpg": 1, "a/8.jpg": 1}',
            r"test.json lists 2 image\(s\) .*images \(first: a/8.jpg\): unpack",
        ),
    ],
)
def test_faulty_json_files(tmp_path, split, text, message):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number, name in enumerate(("train", "val", "test"), 1):
        (tmp_path / "images" / "a" / f"{number}.jpg").write_bytes(b"")
        (tmp_path / f"{name}.json").write_text(json.dumps({f"a/{number}.jpg": 1}))
    assert len(fgvc(tmp_path, record("cub200")).items) == 3
    (tmp_path / f"{split}.json").unlink()
    if text is not None:
        (tmp_path / f"{split}.json").write_text(text)
    with pytest.raises(UserError, match=message):
        fgvc(tmp_path, record("cub200"))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "image_class_labels.txt",
            "3 1\n",
            "3 777\n",
            r"class_labels.txt gives image 001.* the class 777, unknown to cl",
        ),
        (
            "image_class_labels.txt",
            "3 1\n",
            "3 x\n",
            r"the class x, unknown to classes.txt: the file is not the right",
        ),
        (
            "image_class_labels.txt",
            "3 1\n",
            "3\n",
            r"labels.txt is truncated or damaged \(the line of '3' has one colu",
        ),
        (
            "train_test_split.txt",
            "3 1\n",
            "",
            r"images.txt names image 3, which .*labels.txt or train_test_split.txt la",
        ),
        ("train_test_split.txt", "3 1\n", "3 2\n", r"images.txt names image 3"),
        ("images.txt", "_0003.jpg", "_9.jpg", r"images.txt lists 1 image\(s\) .* \(first: 001.*_9.jpg\)"),
        ("classes.txt", None, None, r"there is no file .*classes.txt"),
        ("images.txt", b"\xff\n", None, r"images.txt is truncated or damaged"),
    ],
)
def test_faulty_lists_of_birds(tmp_path, name, old, new, message):
    unpacked("cub200", tmp_path)
    path = tmp_path / "CUB_200_2011" / name
    if new is not None:
        edit(path, old, new)
    elif old is not None:
        path.write_bytes(old)
    else:
        path.unlink()
    with pytest.raises(UserError, match=message):
        fgvc(tmp_path, record("cub200"))


def test_faulty_lists_of_dogs(tmp_path):
    unpacked("stanford_dogs", tmp_path)
    spec = record("stanford_dogs")
    (tmp_path / "lists").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}_list.mat").replace(tmp_path / "lists" / f"{split}_list.mat")
    assert len(fgvc(tmp_path, spec).items) == 80
    with pytest.raises(UserError, match=r"train_list.mat gives image .* the label 3, outside 0..2"):
        fgvc(tmp_path, record("stanford_dogs", num_classes=3))
    (tmp_path / "Images" / "n02085620-Chihuahua" / "n02085620_10001.jpg").unlink()
    with pytest.raises(UserError, match=r"train_list.mat lists 1 image\(s\) that are not in .*Images"):
        fgvc(tmp_path, spec)
    write_mat(
        tmp_path / "lists" / "test_list.mat",
        file_list=np.array([["a/b.jpg"]], object),
        labels=np.ones((2, 1)),
    )
    with pytest.raises(UserError, match=r"test_list.mat is truncated or damaged \(1 images have 2 labels\)"):
        fgvc(tmp_path, spec)
    (tmp_path / "lists" / "test_list.mat").write_bytes(b"no")
    with pytest.raises(UserError, match=r"test_list.mat is truncated or damaged"):
        fgvc(tmp_path, spec)
    (tmp_path / "lists" / "test_list.mat").unlink()
    with pytest.raises(UserError, match=r"there is no file .*test_list.mat"):
        fgvc(tmp_path, spec)


def test_cars_of_one_layout_with_lists_of_the_other(tmp_path):
    spec = record("stanford_cars")
    unpacked("stanford_cars", tmp_path / "first")
    unpacked("stanford_cars (devkit)", tmp_path / "second")
    synthetic.json_splits(tmp_path / "second", fgvc(tmp_path / "first", spec).items)
    with pytest.raises(
        UserError, match=r"train.json lists 52 image\(s\) .* number the images of car_ims, not those of"
    ):
        fgvc(tmp_path / "second", spec)


def test_cars_without_the_labels_of_the_test_images(tmp_path):
    unpacked("stanford_cars (devkit)", tmp_path)
    bare = tmp_path / "devkit" / "cars_test_annos.mat"
    bare.replace(tmp_path / "cars_test_annos_withlabels.mat")
    with pytest.raises(
        UserError, match=r"withlabels.mat has no field class: it is not the file with all labels"
    ):
        fgvc(tmp_path, record("stanford_cars"))


def test_a_root_without_images(tmp_path):
    files = (SourceFile(name="images.tar"), SourceFile(name="lists.tar"))
    with pytest.raises(
        UserError, match=r"the images of stanford_dogs \(there is no Images .*: unpack images.tar and list"
    ):
        fgvc(tmp_path, record("stanford_dogs", files=files))
    with pytest.raises(UserError, match=r"no car_ims or cars_train in it .*: unpack its archives there"):
        fgvc_root(tmp_path / "gone", record("stanford_cars"))
    with pytest.raises(UserError, match=r"unknown fine-grained dataset 'cub201': did you mean cub200"):
        fgvc_root(Path(), record("cub200", id="cub201"))
