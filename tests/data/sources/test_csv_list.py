import csv
import io
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.damage import bounded, outcome
from helpers.miniatures import write_folder
from visprompt.data.sources.own_images import find
from visprompt.errors import UserError


def table(tmp_path, text, name="images.csv"):
    root = tmp_path / "root"
    if not root.exists():
        write_folder(root, ("x", "y"), 3)
    (root / name).write_text(text, encoding="utf-8-sig")
    return root


def test_a_csv_with_splits(tmp_path):
    rows = "path,label,split\nx/0000.png,up,train\nx/0001.png,down,train\ny/0000.png,up,test\n"
    folder = find(table(tmp_path, rows), "images.csv")
    assert folder.class_names == ("down", "up")
    assert [(item.key, item.label, item.split) for item in folder.items] == [
        ("x/0000.png", 1, "train"),
        ("x/0001.png", 0, "train"),
        ("y/0000.png", 1, "test"),
    ]


def test_a_csv_without_splits_elsewhere(tmp_path):
    root = table(tmp_path, "")
    rows = [f"root/{name}/{number:04d}.png,{name}" for name in "xy" for number in range(3)]
    (tmp_path / "beside.csv").write_text("path,label\n" + "\n".join(rows))
    folder = find(root, tmp_path / "beside.csv")
    assert sorted(item.split for item in folder.items) == ["test"] * 2 + ["train"] * 2 + ["val"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images: its first line is path,label"),
        ("file,class\nx/0000.png,a\n", "has no columns named path and label"),
        ("path,label\nx/0000.png,\n", "line 2: the path or the label is empty"),
        ("path,label\nx/9.png,a\n", "line 2: there is no file x/9.png"),
        ("path,label\nx/0000.png,a\nx/0000.png,b\n", "line 3: x/0000.png is listed twice"),
        ("path,label,split\nx/0000.png,a,trian\n", "line 2: unknown split 'trian': did you mean train"),
        (
            "path,label,split\nx/0000.png,a,train\nx/0001.png,b,\n",
            "line 3: give a split for all images or for none",
        ),
        (
            "path,label\nx/0000.png,Owl\nx/0001.png,Crane, sandhill\n",
            "line 3 has more cells than the first line has columns: put names that have a comma in double quotes",
        ),
        ("path,label\nx/0000.png,a\nx/0001.png,a\n", r"has only one class \('a'\)"),
        ("path,label,split\nx/0000.png,a,train\nx/0001.png,b,test\n", "class 'b' .* has no training image"),
    ],
)
def test_a_faulty_csv_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        find(table(tmp_path, text), "images.csv")


def test_a_csv_that_is_none(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(UserError, match=r"list.csv is not a CSV in UTF-8 \(.*\): save it as one"):
        find(tmp_path, "list.csv")


def test_empty_cells_behind_the_columns_are_a_spreadsheets(tmp_path):
    rows = 'path,label,split\nx/0000.png,"Crane, sandhill",train,,\nx/0001.png,Owl,train,,\n'
    assert find(table(tmp_path, rows), "images.csv").class_names == ("Crane, sandhill", "Owl")


def test_a_csv_that_may_not_be_read(tmp_path, monkeypatch):
    def refuses(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    root = table(tmp_path, "path,label\n")
    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(UserError, match=r"data\.csv=.*images\.csv cannot be read \(Permission denied\)$"):
        find(root, "images.csv")


def test_a_missing_csv(tmp_path):
    with pytest.raises(UserError, match=r"data.csv=.*list.csv is not a file"):
        find(tmp_path, "list.csv")


def both(tmp_path: Path) -> list[Path]:
    """The same images in two places, each with a CSV of absolute paths."""
    places = [write_folder(tmp_path / where / "birds", ("dark", "light"), 10) for where in ("here", "there")]
    for root in places:
        files = sorted(root.rglob("*.png"))
        (root / "abs.csv").write_text(
            "path,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files)
        )
    return places


def test_absolute_paths_make_the_same_run_wherever_the_data_are(tmp_path):
    here, there = both(tmp_path)
    assert find(here, "abs.csv").fingerprint == find(there, "abs.csv").fingerprint
    assert [item[1:] for item in find(here, "abs.csv").items] == [
        item[1:] for item in find(there, "abs.csv").items
    ]
    assert find(here, "abs.csv").items[0].key == "dark/0000.png"
    assert find(here, "abs.csv").fingerprint == find(here).fingerprint, "as by folders"


def test_paths_outside_the_root_are_relative_to_their_own_folder(tmp_path):
    keys = []
    for where in both(tmp_path):
        root = where.parent / "lists"
        root.mkdir()
        (where / "abs.csv").rename(root / "abs.csv")
        keys.append([item.key for item in find(root, "abs.csv").items])
    assert keys[0] == keys[1]
    assert keys[0][0] == "dark/0000.png"


def test_a_root_under_another_name(tmp_path):
    here, _ = both(tmp_path)
    (tmp_path / "link").symlink_to(here)
    assert find(tmp_path / "link", "abs.csv").fingerprint == find(here).fingerprint


@pytest.mark.parametrize(
    "again", ["dark/../dark/0000.png", "{root}/dark/0000.png", "dark/soft.png", "dark/hard.png"]
)
def test_one_file_under_two_spellings_is_refused(tmp_path, again):
    root = write_folder(tmp_path / "root", ("dark", "light"), 2)
    (root / "dark" / "soft.png").symlink_to(root / "dark" / "0000.png")
    os.link(root / "dark" / "0000.png", root / "dark" / "hard.png")
    again = again.format(root=root)
    rows = ["dark/0000.png,dark,train", "light/0000.png,light,train", f"{again},dark,test"]
    (root / "twice.csv").write_text("path,label,split\n" + "\n".join(rows))
    with pytest.raises(UserError) as caught:
        find(root, "twice.csv")
    assert str(caught.value) == (
        f"data.csv={root}/twice.csv, line 4: {again} is the file of line 2, dark/0000.png: remove one of "
        "the lines"
    )


@pytest.mark.parametrize(
    ("column", "values", "take"),
    [
        ("fold", ("train", "val", "test"), "'data.csv_columns={split: fold}'"),
        (
            "subset",
            ("Training", "Testing"),
            "'data.csv_columns={split: subset}' and 'data.split_names={train: Training, test: Testing}'",
        ),
        (
            "kfold",
            ("train", "valid"),
            "'data.csv_columns={split: kfold}' and 'data.split_names={train: train, val: valid}'",
        ),
        (
            "fold",
            ("0", "1", "2"),
            '\'data.csv_columns={split: fold}\' and \'data.split_names={train: "0", val: "1", test: "2"}\'',
        ),
        ("Split", ("a", "b"), "'data.csv_columns={split: Split}' and 'data.split_names={train: a, test: b}'"),
        ("use", ("train",), "'data.csv_columns={split: use}'"),
    ],
)
def test_splits_in_a_column_of_another_name_are_never_cut_anew(tmp_path, column, values, take):
    root = write_folder(tmp_path / "root", ("dark", "light"), 6)
    rows = [f"{c}/{n:04d}.png,{c},{values[n % len(values)]}" for n in range(6) for c in ("dark", "light")]
    (root / "list.csv").write_text(f"path,label,{column}\n" + "\n".join(rows))
    with pytest.raises(UserError) as caught:
        find(root, "list.csv")
    assert str(caught.value) == (
        f"data.csv={root}/list.csv has no column split, but a column {column!r} "
        f"({', '.join(sorted(values))}): give "
        f"{take} to read it, or 'data.csv_columns={{split: null}}' to cut every class 80/10/10"
    )
    images = find(root, "list.csv", columns={"split": None})
    assert (images.cut, images.unread) == (True, (column,))


def test_columns_and_splits_of_other_names_are_read(tmp_path):
    root = write_folder(tmp_path / "root", ("dark", "light"), 6)
    rows = [f"{c}/{n:04d}.png,{c},{n // 2},{n}" for n in range(6) for c in ("dark", "light")]
    (root / "list.csv").write_text("file,class,fold,age\n" + "\n".join(rows))
    columns = {"path": "file", "label": "class", "split": "fold"}
    images = find(root, "list.csv", columns=columns, split_names={"train": [0, 1], "test": "2"})
    assert [sum(item.split == split for item in images.items) for split in ("train", "val", "test")] == [
        8,
        0,
        4,
    ]
    assert (images.cut, images.unread) == (False, ("age",))


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        (
            "path,label,split\nx/0000.png,a,Training\n",
            {},
            "line 2: the split is called 'Training': give 'data.split_names={train: Training, test: NAME}'",
        ),
        (
            "file,class\nx/0000.png,a\n",
            {},
            "has no columns named path and label, only file, class: give "
            "'data.csv_columns={path: NAME, label: NAME}' or write path,label[,split] as first line",
        ),
        ("path,label\nx/0000.png,a\n", {"columns": {"lable": "x"}}, "did you mean label?"),
        ("path,label\nx/0000.png,a\n", {"columns": {"path": None}}, "data.csv_columns.path=null"),
        ("path,label\nx/0000.png,a\n", {"columns": "fold"}, "give 'data.csv_columns={split: NAME}'"),
        ("path,label\n" + "x" * 5000 + ",a\n", {}, "line 2: there is no file xxx"),
    ],
)
def test_what_to_do_about_other_names(tmp_path, text, options, sentence):
    with pytest.raises(UserError) as caught:
        find(table(tmp_path, text), "images.csv", **options)
    assert sentence in str(caught.value)


def test_columns_without_a_csv_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^data.csv_columns names columns of a CSV, and no CSV is given: give data.csv="
    ):
        find(write_folder(tmp_path, ("a", "b"), 3), columns={"split": "fold"})


def test_an_accent_in_another_form_than_on_the_disk(tmp_path):
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = write_folder(tmp_path / "root", (other, "tea"), 3)
    rows = [f"{name}/{number:04d}.png,{name}" for name in (one, "tea") for number in range(3)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows))
    images = find(root, "list.csv")
    assert images.class_names == (one, "tea")
    assert images.items[0].key == f"{one}/0000.png"


def test_no_splits_by_name_are_for_folders(tmp_path):
    with pytest.raises(
        UserError, match=r"^data.split_names=none is for folders: give 'data.csv_columns=\{split: null\}'"
    ):
        find(table(tmp_path, "path,label\nx/0000.png,a\n"), "images.csv", split_names="none")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("drawn"), ("x", "y"), 3)


_CELLS = st.sampled_from(
    ["x/0000.png", "y/0001.png", "x/../x/0000.png", ".", "", "a", "train", "test", '"', "\0", ",,"]
)
_LINES = st.lists(st.lists(_CELLS | st.text(max_size=6), max_size=4).map(",".join), max_size=5).map("\n".join)


@settings(max_examples=150, deadline=None)
@pytest.mark.slow
@given(
    content=st.binary(max_size=60)
    | st.builds("{}\n{}".format, st.just("path,label,split"), _LINES).map(str.encode)
)
@example(content=b"path,label\nx/0000.png,a,b,c,d\n")
@example(content=b"path,label\n" + b"x" * 5000 + b",a\n")
@example(content=b"path,label,split\n\n")
def test_any_bytes_as_a_csv_are_read_or_refused_in_one_sentence(drawn, content):
    (drawn / "any.csv").write_bytes(content)
    try:
        images = find(drawn, "any.csv")
    except UserError:
        return
    assert all(item.path.is_file() for item in images.items)


CELLS = st.sampled_from(
    ["x/0000.png", "y/0001.png", "path", "label", "split", "train", "test", "../..", "~", "~/", "/", "."]
)
ANY_CELL = CELLS | st.text(st.characters(exclude_categories=()), max_size=6)


@given(
    rows=st.lists(st.lists(ANY_CELL, max_size=4), max_size=5),
    head=st.sampled_from(["path,label\n", "path,label,split\n", ""]),
)
@bounded
def test_any_csv_is_read_or_one_sentence(tmp_path, rows, head):
    root = table(tmp_path, "")
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    (root / "any.csv").write_bytes((head + out.getvalue()).encode(errors="surrogatepass"))
    found, sentence = outcome(find, root, "any.csv")
    assert sentence or all(item.path.is_file() for item in found.items)
