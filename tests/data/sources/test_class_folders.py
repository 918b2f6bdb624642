"""An archive with a folder per class is read by what its record says."""

import pytest

from helpers.miniatures.natural import tar_bytes, write_zip
from visprompt.data.catalog.task import Cut, SourceFile
from visprompt.data.catalog.vtab_task import vtab
from visprompt.data.sources.class_folders import class_folders
from visprompt.errors import UserError

FACTS = {"licence": "", "homepage": "", "citation": "", "description": "", "source": "", "group": "natural"}
FILES = [("top/dog/b.JPG", b"1"), ("top/cat/a.png", b"2"), ("top/cat/._a.png", b""), ("top/LICENSE.txt", b"")]


def spec(name):
    file = SourceFile(name=name)
    cuts = {"val": Cut("train", 800, 1000), "test": Cut("train", 1000), "class_names": ("cat", "dog")}
    return vtab("pets", official={"train": 2}, num_classes=2, files=(file,), **cuts, **FACTS)


@pytest.mark.parametrize("name", ["pets.zip", "pets.tgz", "pets.tar"])
def test_keys_and_labels_come_from_the_folders(tmp_path, name):
    if name.endswith(".zip"):
        write_zip(tmp_path / name, FILES)
    else:
        (tmp_path / name).write_bytes(tar_bytes(FILES, packed=name.endswith(".tgz")))
    content = class_folders(tmp_path, spec(name))
    part = content.parts["train"]
    assert (list(part.keys), part.labels["pets"].tolist()) == (["cat/a.png", "dog/b.JPG"], [0, 1])
    found = list(content.read({"train": ["dog/b.JPG"]}))
    assert [(image.key, image.image) for image in found] == [("dog/b.JPG", b"1")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (FILES[:1], "has no images in a folder cat/"),
        ([*FILES, ("x/cat/a.png", b"")], "has two images cat/"),
    ],
)
def test_another_archive_is_refused(tmp_path, files, message):
    write_zip(tmp_path / "pets.zip", files)
    with pytest.raises(UserError, match=message):
        class_folders(tmp_path, spec("pets.zip"))
