import shlex
from pathlib import Path

import pytest

from helpers.miniatures import write_folder
from visprompt.data.folder_datamodule import FolderDataModule
from visprompt.data.sources import images
from visprompt.data.sources.split_folders import as_argument, class_parents, split_of
from visprompt.errors import UserError
from visprompt.runs.compose import composing, job

CLASSES = "data.split_names=none where all folders are classes"


def tree(root: Path, *folders: str) -> Path:
    """Folders with three files each; "a,b/c,d" stands for a/c, a/d, b/c and b/d."""
    for top, _, inner in (given.partition("/") for given in folders):
        for path in (root / t / i for t in top.split(",") for i in inner.split(",")):
            path.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                (path / f"{number}.png").write_bytes(b"x")
    return root


def answer(root: Path, split_names=None) -> object:
    """The split folders by split, or the refusal without the place."""
    try:
        return [
            (split, parent.relative_to(root).as_posix()) for split, parent in class_parents(root, split_names)
        ]
    except UserError as error:
        return str(error).replace(str(root), "ROOT")


@pytest.mark.parametrize(
    ("split", "names"),
    {
        "train": "train Train TRAIN training Training trains trainset TrainSet train_images images-train train2017 "
        "my-training-set trainval TrainImages",
        "val": "val Val valid VALID validation Validation dev devset eval evals evaluation val2017 ILSVRC2012_val",
        "test": "test Test TESTING testing tests test-set testset my-test-set TestData test_2 holdout",
        "": "contest latest strain restraint cat devil valley testimony interval 测试",
    }.items(),
)
def test_the_words_of_splits(split, names):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


@pytest.mark.parametrize(
    ("folders", "named", "argument"),
    [
        ("Training,Testing", "'Testing', 'Training'", "{train: Training, test: Testing}"),
        ("Train,Test", "'Test', 'Train'", "{train: Train, test: Test}"),
        ("train,valid", "'train', 'valid'", "{train: train, val: valid}"),
        ("train,Test", "'Test', 'train'", "{train: train, test: Test}"),
        (
            "train_images,my-test-set",
            "'my-test-set', 'train_images'",
            "{train: train_images, test: my-test-set}",
        ),
        ("training,dev,eval", "'dev', 'eval', 'training'", "{train: training, val: [dev, eval]}"),
        (
            "set1 (train),set2 (test)",
            "'set1 (train)', 'set2 (test)'",
            '{train: "set1 (train)", test: "set2 (test)"}',
        ),
        ("Training", "'Training'", "{train: Training}"),
    ],
)
def test_split_folders_of_other_names_are_refused_with_what_to_type(tmp_path, folders, named, argument):
    assert answer(tree(tmp_path, f"{folders}/dark,light")) == (
        f"data.root=ROOT has split folders ({named}): give 'data.split_names={argument}' to read them so, "
        f"or {CLASSES}"
    )


@pytest.mark.parametrize(
    ("folders", "named", "argument"),
    [
        ("A,B/dark,light", "('dark', 'light') in each of its folders ('A', 'B')", "{train: A, test: B}"),
        (
            "p,q,r/cat,dog",
            "('cat', 'dog') in each of its folders ('p', 'q', 'r')",
            "{train: p, val: q, test: r}",
        ),
        (
            "photo,art/cat,dog",
            "('cat', 'dog') in each of its folders ('art', 'photo')",
            "{train: art, test: photo}",
        ),
        (
            "f1,f2,f3,f4,f5/cat,dog",
            "('cat', 'dog') in each of its folders ('f1', 'f2', 'f3', ...)",
            "{train: [f1, f2, f3], val: f4, test: f5}",
        ),
    ],
)
def test_folders_that_hold_the_same_folders_are_refused(tmp_path, folders, named, argument):
    root = tree(tmp_path, folders)
    (root / folders.partition(",")[0] / "notes.txt").write_text("a stray file")
    assert answer(root) == (
        f"data.root=ROOT has the same folders {named}: give 'data.split_names={argument}' to read them so, "
        f"or {CLASSES}"
    )


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (
            ["train/cat,dog", "unlabeled/"],
            "has what looks like a split folder ('train') next to 'unlabeled': give "
            f"'data.split_names={{train: train}}' to read them so, or {CLASSES}",
        ),
        (
            ["cat,dog/", "test/cat,dog"],
            "has what looks like a split folder ('test') next to 'cat', 'dog' but no folder of training "
            f"images: put these into train/<class>/, or give {CLASSES}",
        ),
        (
            ["train,test,other/"],
            "has split folders ('test', 'train') next to 'other', but 'train' has no class folders in it: "
            f"put the images of each class into train/<class>/, or give {CLASSES}",
        ),
        (
            ["train,test/"],
            "has split folders ('test', 'train'), but 'train' has no class folders in it: put the images of "
            f"each class into train/<class>/, or give {CLASSES}",
        ),
        (
            ["test,val/a,b"],
            "has split folders ('test', 'val') but no folder of training images: put these into "
            f"train/<class>/, or give {CLASSES}",
        ),
        (
            ["cat,dog/train,test"],
            "has split folders in its classes (cat/test, cat/train): move the images to test/cat and so on, "
            "or give data.split_names=none to mix them",
        ),
        (
            ["data/train,test"],
            "has only the folder 'data': give data.root=ROOT/data if the classes or the splits are in it",
        ),
    ],
)
def test_other_places_of_split_folders(tmp_path, folders, sentence):
    assert answer(tree(tmp_path, *folders)) == f"data.root=ROOT {sentence}"


@pytest.mark.parametrize(
    "folders",
    [
        ["train,car,bus/"],
        ["train,car/"],
        ["trains,cars,buses/"],
        ["dog,cat/front,side"],
        ["dog,cat/sitting,running"],
        ["owl,wren/2019,2020-05"],
        ["species_1,species_2/sample_a,sample_b"],
        ["train,car,bus/front,side"],
        ["benign,malignant/SOB"],
        ["k1,k2,k3,k4,k5,k6,k7,k8,k9,k10,k11/one,two"],
        ["a,b/", "a/deep"],
    ],
)
def test_classes_are_learned_as_classes(tmp_path, folders):
    assert answer(tree(tmp_path, *folders)) == [("", ".")]


@pytest.mark.parametrize("folders", ["train,val,test", "train,test", "train,val", "train"])
def test_documented_names_are_read_as_splits(tmp_path, folders):
    assert answer(tree(tmp_path, f"{folders}/dark,light")) == [(name, name) for name in folders.split(",")]


def test_names_that_are_given(tmp_path):
    root = tree(tmp_path, "Training,Testing,more,extra/dark,light")
    assert answer(root, {"test": "Testing", "train": ["Training", "more"]}) == [
        ("train", "Training"),
        ("train", "more"),
        ("test", "Testing"),
    ]
    assert answer(root, "none") == [("", ".")]
    wrong = {
        "unknown folder of data.split_names in ROOT: 'Trainin': did you mean Training or extra?"
        " (all: Testing, Training, extra, more)": {"train": "Trainin"},
        "unknown split in data.split_names 'tset': did you mean test? (all: test, train, val)": {
            "tset": "Testing"
        },
        "data.split_names lacks train: add 'train: NAME' to it": {"test": "Testing"},
        "data.split_names.train=True is not a name: give one, or a list of names": {"train": True},
        "data.split_names gives 'more' twice: each name belongs to one split": {
            "train": "more",
            "test": "more",
        },
        "data.split_names=yes names no splits: give 'data.split_names={train: NAME, test: NAME}', or "
        "data.split_names=none where all folders are classes": "yes",
    }
    assert {answer(root, given): given for given in wrong.values()} == wrong


def test_the_argument_can_be_typed(tmp_path):
    names = {"train": ['Bob\'s "best" set', "a=b, {c}"], "test": ["50% [new] \\"]}
    (argument,) = shlex.split(as_argument(names))
    with composing():
        cfg = job("train", ["data=folder", f"data.root={tmp_path}", argument])
    assert dict(cfg.data.split_names) == {"train": names["train"], "test": names["test"][0]}


def test_splits_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "decode", None)
    given = {
        "batch_size": 4,
        "split": "final",
        "seed": 0,
        "image_size": 28,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    root = write_folder(tmp_path / "pets", ("dark", "light"), 10, splits=("Training", "Testing"))
    data = FolderDataModule(root=str(root), store_dir=str(tmp_path / "stores"), **given)
    with pytest.raises(UserError, match=r"has split folders \('Testing', 'Training'\)"):
        _ = data.fingerprint
    names = {"train": "Training", "test": "Testing"}
    data = FolderDataModule(root=str(root), store_dir=str(tmp_path / "stores"), split_names=names, **given)
    assert data.class_names == ("dark", "light")
    assert [item.key for item in data.images.items if item.split == "test"][:1] == ["Testing/dark/0000.png"]
    assert not (tmp_path / "stores").exists()
