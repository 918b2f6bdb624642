"""Labels that folders give to images which `predict.py` labels."""

from visprompt.runs.labelled import labels_by_folder

CLASSES = ("caf\u00e9", "cat", "train")


def test_the_topmost_folder_with_the_name_of_a_class_gives_the_label():
    paths = ["cat/1.jpg", "x/cat/deep/2.jpg", "x/3.jpg", "4.jpg", "cat/caf\u00e9/5.jpg"]
    assert labels_by_folder(paths, CLASSES) == {paths[0]: 1, paths[1]: 1, paths[4]: 1}


def test_names_that_macos_has_taken_apart_are_the_same():
    path = "cafe\u0301/1.jpg"
    assert labels_by_folder([path], CLASSES) == {path: 0}


def test_a_folder_of_a_split_is_none_of_the_class_of_its_name():
    paths = ["train/cat/1.jpg", "test/cat/2.jpg", "train/train/3.jpg", "train/4.jpg"]
    assert labels_by_folder(paths, CLASSES) == dict(zip(paths, (1, 1, 2, 2), strict=True))
