"""Multi-label images: what a table says, the data module, and a run from the command line to predictions."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from helpers.cli import call, call_all, frozen, tiny
from visprompt.data.folder_datamodule import FolderDataModule
from visprompt.data.sources.label_sets import all_classes, classes_in, name_of, targets
from visprompt.data.sources.own_images import find
from visprompt.errors import UserError
from visprompt.models import api
from visprompt.models.fit import fit
from visprompt.models.recipe import Recipe
from visprompt.runs.result import load_result

GIVEN = {"batch_size": 8, "split": "tune", "seed": 0, "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def write(folder, names, split=True):
    """Write an image for each set of classes: red, green and blue channels that are on or off."""
    rows = []
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 60, (40, 44, 3), dtype=np.uint8)
        for channel, colour in enumerate(("red", "green", "blue")):
            pixels[..., channel] += 190 * (colour in name)
        path = folder / "images" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        given = ("train", "train", "val", "test")[number // 8 % 4] if split else ""
        rows.append((f"images/{path.name}", name, given))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return rows


SETS = ("red", "green;red", "", "blue", "blue; green ", "blue;green;red", "green", "blue;red") * 8


def test_names_of_label_sets():
    assert name_of(["sea", " beach", "sea", ""]) == "beach;sea"
    assert name_of([]) == ""
    assert classes_in("beach;sea") == ["beach", "sea"]
    assert classes_in("") == []
    assert all_classes(["b;c", "", "a;b"]) == ("a", "b", "c")
    assert targets(["", "a;c", "b"], ["a", "b", "c"]).tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_a_table_gives_an_image_several_classes(tmp_path):
    write(tmp_path, SETS)
    found = find(tmp_path, "labels.csv", multi_label=True)
    assert found.classes == ("blue", "green", "red")
    assert [found.classes_of(item) for item in found.items[:5]] == [
        ["red"],
        ["green", "red"],
        [],
        ["blue"],
        ["blue", "green"],
    ]


def as_columns(tmp_path, rows):
    """Write the labels as columns of 0 and 1."""
    with (tmp_path / "columns.csv").open("w", newline="") as file:
        colours = ("red", "green", "blue")
        lines = [(path, *(int(c in name) for c in colours), split) for path, name, split in rows]
        csv.writer(file).writerows([("file", *colours, "split"), *lines])
    return {"path": "file", "label": ["red", "green", "blue"]}


def as_parquet(tmp_path, rows):
    """Write the labels as lists in a Parquet file."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths, names, splits = zip(*rows, strict=True)
    lists = [[part.strip() for part in classes_in(name)] for name in names]
    parquet.write_table(pa.table({"path": paths, "label": lists, "split": splits}), tmp_path / "t.parquet")


def test_columns_and_parquet_say_the_same_as_texts(tmp_path):
    rows = write(tmp_path, SETS)
    columns = as_columns(tmp_path, rows)
    as_parquet(tmp_path, rows)
    texts = find(tmp_path, "labels.csv", multi_label=True)
    assert find(tmp_path, "columns.csv", columns=columns, multi_label=True).fingerprint == texts.fingerprint
    assert find(tmp_path, "t.parquet", multi_label=True).fingerprint == texts.fingerprint


def test_parquet_with_one_label(tmp_path):
    from pyarrow import parquet, table

    rows = write(tmp_path, ("red", "blue") * 16)
    paths, names, splits = zip(*rows, strict=True)
    parquet.write_table(table({"path": paths, "label": names, "split": splits}), tmp_path / "t.parquet")
    assert find(tmp_path, "t.parquet").fingerprint == find(tmp_path, "labels.csv").fingerprint
    (tmp_path / "no.parquet").write_text("path,label")
    with pytest.raises(UserError, match=r"no.parquet is not a Parquet file \(.*\): save it again$"):
        find(tmp_path, "no.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"label": ["red", "green"]}}, "names several columns: give one, or for several classes"),
        ({"columns": {"label": ["red", "path"]}, "multi_label": True}, "the column 'path' holds 'images/000"),
        ({"multi_label": True, "table": None}, "^data.kind=multi_label needs a table of labels"),
    ],
)
def test_what_a_table_cannot_say(tmp_path, options, message):
    rows = write(tmp_path, SETS)
    as_columns(tmp_path, rows)
    with (tmp_path / "columns.csv").open() as file:
        text = file.read().replace("file,", "path,", 1)
    (tmp_path / "columns.csv").write_text(text)
    given = {"table": tmp_path / "columns.csv", **options}
    with pytest.raises(UserError, match=message):
        find(tmp_path, **given)


def test_a_class_without_training_images_is_refused(tmp_path):
    write(tmp_path, ("red", "green") * 8 + ("blue",) * 16)
    with pytest.raises(UserError, match=r"class 'blue' in .* has no training image"):
        find(tmp_path, "labels.csv", multi_label=True)


def module(tmp_path, **options):
    return FolderDataModule(
        root=str(tmp_path),
        store_dir=str(tmp_path / "stores"),
        csv="labels.csv",
        **{**GIVEN, "kind": "multi_label", **options},
    )


def test_the_data_module_gives_rows_of_0_and_1(tmp_path):
    write(tmp_path, SETS)
    data = module(tmp_path, name="colours")
    assert (data.kind, data.class_names) == ("multi_label", ("blue", "green", "red"))
    batch = next(iter(data.val_dataloader()))
    assert batch.labels.dtype == torch.int64
    expected = [[int(c in name) for c in ("blue", "green", "red")] for name in SETS[:8]]
    assert batch.labels.tolist() == expected
    assert data.summary["classes"] == 3
    assert "(no splits" not in data.described[0]
    half = module(tmp_path, fraction=0.5)
    assert len(half.train_dataset) == 16, "half of all images, whatever their classes"


def test_images_without_given_splits_are_cut_whatever_their_classes(tmp_path):
    write(tmp_path, SETS, split=False)
    data = module(tmp_path)
    assert data.sizes == {"train": 52, "val": 6, "test": 6}
    assert "(no splits were given: images were cut 80/10/10)" in data.described[0]


def test_an_unknown_kind_names_the_kinds(tmp_path):
    with pytest.raises(UserError, match=r"unknown data\.kind 'multi': did you mean multi_label"):
        module(tmp_path, kind="multi")


@frozen
@pytest.mark.slow
def test_a_multi_label_run_from_the_command_line_to_predictions(tmp_path):
    write(tmp_path, SETS)
    logs = tmp_path / "logs"
    data = [
        "data=folder",
        f"data.root={tmp_path}",
        "data.csv=labels.csv",
        "data.kind=multi_label",
        "data.name=colours",
        f"paths.data_dir={tmp_path / 'data'}",
    ]
    done = call("train", *tiny(logs, *data, "callbacks=none", "recipe.epochs=20", "recipe.lr=5"))
    assert done.returncode == 0, done.stderr
    assert "test/map" in done.stdout
    (folder,) = (path.parent for path in logs.rglob("result.json"))
    state = api.load_state(folder)
    assert (state.kind, state.class_names) == ("multi_label", ("blue", "green", "red"))
    result = load_result(folder)
    assert result.kind == result.data["kind"] == "multi_label"
    assert result.metrics["test/map"] > 0.9, "three colours are easy"
    assert (folder / "classes.csv").read_text().startswith("class,images,precision,recall,f1\nblue,8,")
    weights = f"weights={logs / 'weights.safetensors'}"
    done = call_all(
        [
            ("eval", [f"run={folder}", weights, f"paths.data_dir={tmp_path / 'data'}"]),
            ("predict", [f"state={folder}", f"images={tmp_path}", weights, f"output={tmp_path / 'out.csv'}"]),
            ("report", [f"paths.log_dir={logs}", f"inspect={folder}", weights, "formats=[html]"]),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert f"test/map {100 * result.metrics['test/map']:.2f} % on 16 images" in done.stdout
    with (tmp_path / "out.csv").open(newline="") as file:
        predicted = {row["path"]: row["class"] for row in csv.DictReader(file)}
    right = [predicted[f"images/{i:03d}.png"] == name_of(name.split(";")) for i, name in enumerate(SETS)]
    assert sum(right) / len(right) > 0.7
    page = (logs / "report" / "index.html").read_text()
    assert "colours (mean average precision)" in page
    assert "The most confident mistakes" in page or result.metrics["test/exact"] == 1


def test_every_class_has_a_training_image_where_the_images_are_cut(tmp_path):
    rare = [f"rare{i}" for i in range(20)]
    write(tmp_path, ("red",) * 44 + tuple(rare), split=False)
    found = find(tmp_path, "labels.csv", multi_label=True)
    trained = {name for item in found.items if item.split == "train" for name in found.classes_of(item)}
    assert trained == {"red", *rare}
    assert {item.split for item in found.items} == {"train", "val", "test"}


def test_a_share_without_a_class_is_refused(tmp_path):
    write(tmp_path, ("red",) * 30 + ("green;red",) + ("red",) * 10, split=False)
    with pytest.raises(
        UserError,
        match=r"data\.fraction=0\.05 leaves no training image of class 'green': give a larger share",
    ):
        len(module(tmp_path, fraction=0.05).train_dataset)


@pytest.mark.parametrize(
    ("labels", "multi_label", "message"),
    [
        ([["a;b"], ["c"]], True, r"a list in the column 'label' holds 'a;b', which cannot name a class"),
        ([["a", None], ["c"]], True, r"a list in the column 'label' holds None, which cannot name a class"),
        ([["a"], ["c"]], False, r"the column 'label' holds lists: give data\.kind=multi_label"),
    ],
)
def test_lists_in_parquet_are_taken_as_they_are(tmp_path, labels, multi_label, message):
    from pyarrow import parquet, table

    write(tmp_path, ("red", "blue"))
    paths = [f"images/{i:03d}.png" for i in range(2)]
    content = {"path": paths, "label": labels, "image": [{"bytes": b"x"}] * 2}
    parquet.write_table(table(content), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        find(tmp_path, "t.parquet", multi_label=multi_label)


def test_lists_in_columns_that_are_not_read_matter_to_nobody(tmp_path):
    from pyarrow import parquet, table

    write(tmp_path, ("red", "blue"))
    paths = [f"images/{i:03d}.png" for i in range(2)]
    content = {"path": paths, "label": ["a", "c"], "split": ["train"] * 2}
    content |= {"tags": [["a;b"], [None]], "box": [[0.5, None], []]}
    parquet.write_table(table(content), tmp_path / "t.parquet")
    assert find(tmp_path, "t.parquet").class_names == ("a", "c")


def test_own_images_cannot_have_the_name_of_a_task_of_the_papers(tmp_path):
    with pytest.raises(
        UserError, match=r"^dtd is the name of a task of this project, not of your own images: give"
    ):
        module(tmp_path, name="dtd")


@frozen
def test_plain_loaders_may_give_several_classes_as_numbers_with_a_point():
    classifier = api.build(timm.create_model("test_vit"), "linear", 3, kind="multi_label")
    draw = torch.Generator().manual_seed(0)
    labels = (torch.rand(16, 3, generator=draw) < 0.5).float()
    images = torch.randn(16, 3, 160, 160, generator=draw)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    recipe = Recipe(
        optimizer="adamw",
        lr=0.1,
        weight_decay=0.0,
        batch_size=8,
        epochs=1,
        warmup_epochs=0,
        class_weights="balanced",
    )
    figures = fit(classifier, loader, loader, recipe, accelerator="cpu", enable_progress_bar=False)
    assert 0 < figures["val/map"] <= 1
