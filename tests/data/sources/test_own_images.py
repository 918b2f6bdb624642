import json
import os
import unicodedata
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.miniatures import write_folder
from visprompt.data.folder_datamodule import FolderDataModule
from visprompt.data.sources import checksums
from visprompt.data.sources.checksums import Checksums
from visprompt.data.sources.own_images import find
from visprompt.errors import UserError

GIVEN = {"batch_size": 4, "split": "final", "seed": 42, "image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3}


def own(tmp_path, root, **options):
    return FolderDataModule(root=str(root), store_dir=str(tmp_path / "stores"), **{**GIVEN, **options})


def test_class_folders_are_cut_80_10_10(tmp_path):
    folder = find(write_folder(tmp_path / "pets", ("dog", "cat"), 20))
    assert folder.class_names == ("cat", "dog")
    assert [item.key for item in folder.items][:2] == ["cat/0000.png", "cat/0001.png"]
    assert folder.items[0].label == 0
    counts = [sum(item.split == split for item in folder.items) for split in ("train", "val", "test")]
    assert counts == [32, 4, 4]


def test_given_split_folders_are_taken_as_they_are(tmp_path):
    folder = find(write_folder(tmp_path, ("a", "b"), 2, splits=("train", "test")))
    assert {item.split for item in folder.items} == {"train", "test"}
    assert folder.items[-1].key == "train/b/0001.png"
    assert folder.items[-1].split == "train"


def test_a_class_may_be_called_train(tmp_path):
    assert find(write_folder(tmp_path, ("car", "train"), 3)).class_names == ("car", "train")


def test_nested_hidden_and_linked_files(tmp_path):
    root = write_folder(tmp_path / "root", ("a", "b"), 3)
    write_folder(root / "a", ("deep",), 1)
    write_folder(root, (".cache",), 1)
    (root / "a" / ".DS_Store").write_bytes(b"x")
    (root / "b" / "Thumbs.db").write_bytes(b"x")
    (root / "c").symlink_to(write_folder(tmp_path / "elsewhere", ("c",), 3) / "c")
    folder = find(root)
    assert folder.class_names == ("a", "b", "c")
    assert len(folder.items) == 10
    assert "a/deep/0000.png" in [item.key for item in folder.items]


def test_folders_that_hold_no_task_are_one_sentence_each(tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*gone is not a folder"):
        find(tmp_path / "gone")
    with pytest.raises(UserError, match="is empty: put the images of each class"):
        find(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds files but no class folders"):
        find(tmp_path)
    write_folder(tmp_path, ("cat",), 3)
    with pytest.raises(UserError, match=r"has only one class \('cat'\)"):
        find(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*dog is empty"):
        find(tmp_path)


def test_a_class_that_is_only_tested(tmp_path):
    write_folder(tmp_path, ("a", "b"), 3, splits=("train", "test"))
    write_folder(tmp_path, ("c",), 3, splits=("test",))
    with pytest.raises(UserError, match=r"class 'c' in .* has no training image"):
        find(tmp_path)


def test_unsupported_files_are_named_or_left_out(tmp_path, caplog):
    write_folder(tmp_path, ("a", "b"), 3)
    for number in range(6):
        (tmp_path / "a" / f"{number}.heic").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"6 file\(s\) .* \(a/0.heic, .*a/4.heic, \.\.\.; supported: .bmp .gif"
    ):
        find(tmp_path)
    assert len(find(tmp_path, skip_bad=True).items) == 6
    assert "6 file(s) left out, not supported images: a/0.heic, " in caplog.text


def test_a_dead_link_is_listed_for_decoding_to_name(tmp_path):
    root = write_folder(tmp_path, ("a", "b"), 3)
    (root / "a" / "dead.png").symlink_to(tmp_path / "gone.png")
    folder = find(root)
    assert len(folder.items) == 7
    assert len(folder.fingerprint) == 64


def test_content_decides_and_neither_place_nor_time(tmp_path):
    here = write_folder(tmp_path / "here", ("a", "b"), 4)
    there = write_folder(tmp_path / "there", ("a", "b"), 4)
    os.utime(there / "a" / "0000.png", (0, 0))
    first = find(here).fingerprint
    assert first == find(there).fingerprint
    checksum = sha256((here / "a" / "0000.png").read_bytes()).hexdigest()
    assert find(here).checksums[0] == checksum
    image = there / "a" / "0000.png"
    image.rename(there / "b" / "0004.png")
    assert find(there).fingerprint != first


def bitmaps(root: Path) -> Path:
    """Dark and light bitmaps, all of one size in bytes."""
    for name, value in (("dark", 40), ("light", 220)):
        (root / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng([number, value]).integers(value - 20, value + 20, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.bmp")
    return root


def swap(root: Path) -> None:
    """Give every file the other class's content, and the times that it had."""
    for number in range(10):
        files = [root / name / f"{number}.bmp" for name in ("dark", "light")]
        contents, times = [file.read_bytes() for file in files], [file.stat() for file in files]
        for file, content, time in zip(files, reversed(contents), times, strict=True):
            file.write_bytes(content)
            os.utime(file, ns=(time.st_atime_ns, time.st_mtime_ns))


def test_files_replaced_in_place_are_noticed(tmp_path):
    root = bitmaps(tmp_path / "shades")
    before = own(tmp_path, root)
    assert before.store.image(0).mean() < 60
    swap(root)
    after = own(tmp_path, root)
    assert after.fingerprint != before.fingerprint
    assert after.store.image(0).mean() > 200, "pixels of the old content"


def test_a_file_that_changes_while_the_images_are_read(tmp_path):
    root = bitmaps(tmp_path / "shades")
    data = own(tmp_path, root)
    assert len(data.fingerprint) == 64
    swap(root)
    with pytest.raises(
        UserError, match=r"\.bmp was changed while the images were read: run the same command again$"
    ):
        data.prepare_data()


def test_images_are_read_once_for_their_checksums(tmp_path, monkeypatch):
    root = bitmaps(tmp_path / "shades")
    monkeypatch.setattr("visprompt.data.sources.checksums._RECENT", -1)
    data = own(tmp_path, root)
    data.prepare_data()
    (memory,) = (tmp_path / "stores" / "checksums").iterdir()
    again = own(tmp_path, root)
    monkeypatch.setattr("visprompt.data.sources.checksums.file_digest", None)
    assert again.fingerprint == data.fingerprint
    memory.write_text("{}")
    with pytest.raises(TypeError):
        _ = own(tmp_path, root).fingerprint
    assert not (tmp_path / "none").exists()


def test_what_changed_a_moment_ago_is_read_again(tmp_path, monkeypatch):
    root = bitmaps(tmp_path / "shades")
    own(tmp_path, root).prepare_data()
    monkeypatch.setattr("visprompt.data.sources.checksums.file_digest", None)
    with pytest.raises(TypeError):
        _ = own(tmp_path, root).fingerprint


def test_what_changes_again_while_a_large_folder_is_read_is_read_again(tmp_path, monkeypatch):
    """Whether a file was old enough is asked before it is read, not when all have been."""
    path = tmp_path / "a.png"
    path.write_bytes(b"first")
    clock = SimpleNamespace(now=path.stat().st_mtime_ns)
    digest = checksums.file_digest

    def slow(file, name):
        clock.now += 60 * 10**9
        return digest(file, name)

    monkeypatch.setattr(checksums.time, "time_ns", lambda: clock.now)
    monkeypatch.setattr(checksums, "file_digest", slow)
    memory = tmp_path / "memory.json"
    for _ in range(2):
        known = checksums.Checksums(memory)
        known.of([path])
        known.remember()
    assert json.loads(memory.read_text())["files"].keys() == {str(path)}, "the second time it was old enough"
    assert clock.now == path.stat().st_mtime_ns + 120 * 10**9


def test_linked_folders_are_followed_and_cycles_guarded(tmp_path):
    root = write_folder(tmp_path / "root", ("dark", "light"), 6)
    more = write_folder(tmp_path / "more", ("dark",), 20) / "dark"
    (root / "dark" / "more").symlink_to(more)
    (more / "up").symlink_to(root / "dark")
    (more / "same").symlink_to(more)
    images = find(root)
    assert len(images.items) == 32
    assert images.left_out == {"links to folders that were read already": 2}
    assert next(item.key for item in images.items if item.key.startswith("dark/more")) == "dark/more/0000.png"


def test_what_is_left_out_is_counted(tmp_path):
    root = write_folder(tmp_path / "root", ("a", "b"), 10)
    Image.new("RGB", (40, 40)).save(root / "loose.png")
    (root / "README.txt").write_text("not an image")
    (root / "a" / ".DS_Store").write_bytes(b"x")
    (root / "b" / "Thumbs.db").write_bytes(b"x")
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "a" / "note.txt").write_text("hello")
    (root / "a" / "bad.png").write_text("hello")
    data = own(tmp_path, root, skip_bad=True)
    data.prepare_data()
    assert data.summary == {
        "root": str(root),
        "classes": 2,
        "images": {"train": 16, "val": 2, "test": 2},
        "cut": True,
        "smallest_class": "a",
        "smallest": 8,
        "left_out": {
            "files of other formats": 1,
            "hidden files": 1,
            "hidden folders": 1,
            "images next to the folders": 1,
            "system files": 2,
            "files that cannot be read": 1,
        },
        "unread_columns": [],
        "repeated": {},
    }
    assert data.described == [
        f"data: root in {root}: 2 classes (a, b); images: train 16, val 2, test 2 (no splits were given: "
        "every class was cut 80/10/10); smallest class: a with 8 training images",
        "left out: files of other formats (1), hidden files (1), hidden folders (1), images next to the "
        "folders (1), system files (2), files that cannot be read (1)",
    ]


def test_folders_that_are_no_split_are_left_out_and_said(tmp_path):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 3, splits=("Training", "Testing", "more"))
    Image.new("RGB", (40, 40)).save(root / "Testing" / "loose.png")
    data = own(tmp_path, root, split_names={"train": "Training", "test": "Testing"})
    assert data.described == [
        f"data: pets in {root}: 2 classes (cat, dog); images: train 6, test 6; smallest class: cat with 3 "
        "training images",
        "left out: folders that are not named in data.split_names (1), images next to the folders (1)",
    ]


def test_many_classes_are_counted(tmp_path):
    root = write_folder(tmp_path / "birds", [f"kind {number}" for number in range(11)], 3)
    assert own(tmp_path, root).described == [
        f"data: birds in {root}: 11 classes; images: train 11, val 11, test 11 (no splits were given: every "
        "class was cut 80/10/10); smallest class: kind 0 with 1 training images"
    ]


def test_equal_bytes_in_train_and_test_are_said_with_their_number(tmp_path):
    root = write_folder(tmp_path / "pets", ("cat", "dog"), 3, splits=("train", "val", "test"))
    for number in range(2):
        (root / "test" / "cat" / f"copy{number}.png").write_bytes(
            (root / f"train/dog/000{number}.png").read_bytes()
        )
    (root / "val" / "dog" / "copy.png").write_bytes((root / "train" / "dog" / "0002.png").read_bytes())
    data = own(tmp_path, root)
    assert data.summary["repeated"] == {"val": 1, "test": 2}
    says = "images have the same bytes as training images, so the score says little: remove them from one of the two"
    assert data.described[1:] == [f"warning: 1 of 7 val {says}", f"warning: 2 of 8 test {says}"]


def test_names_meet_in_one_unicode_form(tmp_path):
    one, other = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    here = write_folder(tmp_path / "here", (one, "tea"), 4)
    there = write_folder(tmp_path / "there", (other, "tea"), 4)
    assert find(here).class_names == find(there).class_names == (one, "tea")
    assert find(here).fingerprint == find(there).fingerprint
    split = write_folder(tmp_path / "split", (one, "tea"), 2, splits=("train",))
    write_folder(split, (other, "tea"), 2, splits=("test",))
    assert find(split).class_names == (one, "tea")


def test_names_that_are_no_utf8(tmp_path):
    root = write_folder(tmp_path / "root", ("dark", "light"), 6)
    (root / "dark" / "0000.png").rename(root / "dark" / os.fsdecode(b"caf\xe9.png"))
    (root / "light").rename(root / os.fsdecode(b"li\xe9ght"))
    data = own(tmp_path, root)
    data.prepare_data()
    assert data.class_names == ("dark", os.fsdecode(b"li\xe9ght"))
    assert os.fsdecode(b"dark/caf\xe9.png") in data.store.keys
    assert r"2 classes (dark, li\xe9ght)" in data.described[0]


def test_grey_images_in_a_small_part_of_their_range_are_said_once(tmp_path):
    root = tmp_path / "scans"
    for name, value in (("dark", 40), ("light", 200)):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((40, 40), value + number, np.uint16)).save(root / name / f"{number}.png")
    data = own(tmp_path, root)
    data.prepare_data()
    assert data.store.image(0).max() == 0
    said = (
        "warning: 20 grey images use less than a quarter of their 16 or 32 bits (up to 209) and look dark: "
        "give data.white_level=255 if that is their white"
    )
    assert [line for line in data.described if line.startswith("warning")] == [said]
    assert own(tmp_path, root).preprocessing.get("white_level") is None
    again = own(tmp_path, root)
    again.prepare_data()
    assert again.described[-1] == said, "a store that was there before"
    mended = own(tmp_path, root, white_level=255)
    mended.prepare_data()
    assert mended.store.image(0)[0, 0].tolist() == [40] * 3
    assert mended.preprocessing == data.preprocessing | {"white_level": 255}
    assert not any(line.startswith("warning") for line in mended.described)


def test_a_class_with_control_characters_in_its_name_is_refused_before_anything_is_decoded(tmp_path):
    for name in ("dog", "cat\x1b[31m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        find(tmp_path)
    assert (
        str(error.value)
        == rf"the class cat\x1b[31m in {tmp_path} has control characters in its name: rename it"
    )


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["schema", "files", "f.png"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=40) | _JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b'{"schema": 1, "files": {"f.png": [[1, 2, 3, 4], "00"]}}')
@example(content=b'{"schema": 1, "files": {"f.png": [[1, 2, 3, Infinity], "00"]}}')
@example(content=b"[" * 100_000)
def test_damaged_memories_of_checksums_are_not_believed(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("memory")
    (folder / "f.png").write_bytes(b"content")
    (folder / "memory.json").write_bytes(content)
    assert Checksums(folder / "memory.json").of([folder / "f.png"]) == [sha256(b"content").hexdigest()]
