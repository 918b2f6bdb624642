import numpy as np
import pytest

from helpers.miniatures import circulated
from visprompt.data.catalog.task import Mirror, TaskSpec
from visprompt.data.sources.hf import hub
from visprompt.errors import UserError

COUNTS = {"train": 9, "test": 4}
NAMES = ("apple", "aquarium fish", "baby")
MIRROR = Mirror(
    repo="owner/mirror",
    splits={"train": "train", "test": "validation"},
    image="img",
    labels={"cifar": "fine_label"},
)


def make_spec(mirror=MIRROR, **changes):
    known = {
        "id": "cifar",
        "dataset": "cifar",
        "group": "natural",
        "family": "vtab",
        "num_classes": 3,
        "class_names": NAMES,
        "split_sizes": {},
        "mirror": mirror,
        **dict.fromkeys(("source", "licence", "homepage", "citation", "description"), ""),
    }
    return TaskSpec(**{**known, **changes})


def change_mirror(**changes):
    return Mirror(**{**vars(MIRROR), **changes})


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and a cache that goes with the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def clone(tmp_path, spec=None, **options):
    circulated.mirror(tmp_path / "clone", spec or make_spec(), COUNTS, np.random.default_rng(0), **options)
    return tmp_path / "clone"


def test_keys_labels_and_bytes(tmp_path):
    content, revision = hub(make_spec(), clone(tmp_path), "")
    assert revision == ""
    assert {split: len(part.keys) for split, part in content.parts.items()} == COUNTS
    assert content.parts["train"].keys == [str(row) for row in range(9)]
    assert content.parts["test"].labels["cifar"].tolist() == [0, 1, 2, 0]
    assert content.parts["test"].labels["cifar"].dtype == np.int64
    assert not content.lossy
    found = list(content.read({"test": ["3", "1"], "train": ["0", "5"]}))
    assert [(one.split, one.key) for one in found] == [
        ("train", "0"),
        ("train", "5"),
        ("test", "1"),
        ("test", "3"),
    ]
    assert all(one.image.startswith(b"\x89PNG") for one in found)
    pixels = [content.decode(one.image).mean((0, 1)) for one in found]
    assert pixels[0].shape == (3,)
    assert np.abs(pixels[0] - pixels[3]).max() < 2  # both of class 0
    assert np.abs(pixels[0] - pixels[1]).max() > 12


def test_a_configuration_and_a_column_of_keys(tmp_path):
    spec = make_spec(change_mirror(config="cifar100", key="name"))
    content, revision = hub(spec, clone(tmp_path, spec), "abc")
    assert revision == "abc"
    assert content.parts["train"].keys[:2] == ["train_000000", "train_000001"]
    assert [one.key for one in content.read({"train": ["train_000004"]})] == ["train_000004"]


def test_labels_of_both_tasks_of_a_dataset(tmp_path):
    spec = make_spec(change_mirror(labels={"cifar": "fine_label", "other": "coarse"}), class_names=())
    labels = hub(spec, clone(tmp_path, spec), "")[0].parts["test"].labels
    assert {task: values.tolist() for task, values in labels.items()} == {
        "cifar": [0, 1, 2, 0],
        "other": [0, 1, 0, 0],
    }


@pytest.mark.parametrize(("dataset", "lossy"), [("cifar", True), ("svhn", True), ("eurosat", False)])
def test_jpeg_of_a_lossless_original_is_lossy(tmp_path, dataset, lossy):
    assert hub(make_spec(dataset=dataset), clone(tmp_path, encoding="jpeg"), "")[0].lossy is lossy


@pytest.mark.parametrize(
    "names", [("Apple", "aquarium_fish", "BABY"), ("apple", "Aquarium-Fish", "baby"), ("0", "1", "2")]
)
def test_the_same_names_in_another_spelling(tmp_path, names):
    assert hub(make_spec(), clone(tmp_path, make_spec(class_names=names)), "")[0].parts["train"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("apple", "baby", "aquarium fish"),
            "gives label 1 to the class 'baby', not to 'aquarium fish' as cifar does",
        ),
        (("apple", "aquarium fish", "baby", "bear"), "gives label 3 to the class 'bear', not to None"),
        (("apple", "aquarium fish"), "gives label 2 to the class None, not to 'baby'"),
    ],
)
def test_another_order_of_classes(tmp_path, names, message):
    root = clone(tmp_path, make_spec(class_names=names, num_classes=len(names)))
    with pytest.raises(UserError, match=message):
        hub(make_spec(), root, "")


def test_a_label_out_of_range(tmp_path):
    root = clone(tmp_path, make_spec(num_classes=4, class_names=()))
    with pytest.raises(UserError, match=r"clone, train gives image 3 the label 3, outside 0..2"):
        hub(make_spec(), root, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": "train", "test": "test"}}, r"has no split 'test' \(it has train, validation\)"),
        ({"image": "picture"}, r"train has no column 'picture' \(it has img, fine_label\)"),
        ({"labels": {"cifar": "label"}}, r"train has no column 'label' \(it has img, fine_label\)"),
        ({"key": "id"}, r"train has no column 'id'"),
        ({"image": "fine_label"}, r"train: the column 'fine_label' holds no images"),
        ({"labels": {"cifar": "img"}}, r"train: the column 'img' holds other things than labels"),
    ],
)
def test_a_mirror_of_another_shape(tmp_path, changes, message):
    root = clone(tmp_path)
    with pytest.raises(UserError, match=message):
        hub(make_spec(change_mirror(**changes)), root, "")


def test_a_clone_that_is_missing_empty_or_damaged(tmp_path):
    with pytest.raises(
        UserError, match=r"there is no folder .*gone: give the folder of a clone of owner/mirror"
    ):
        hub(make_spec(), tmp_path / "gone", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the clone .*empty cannot be read \(.*\): get it again"):
        hub(make_spec(), tmp_path / "empty", "")
    file = clone(tmp_path) / "data/train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"the clone .*clone cannot be read \(.*\): get it again"):
        hub(make_spec(), tmp_path / "clone", "")


def test_the_hub_cannot_be_reached():
    with pytest.raises(
        UserError, match=r"the Hugging Face dataset owner/mirror cannot be read \(.*\): check the network"
    ):
        hub(make_spec(), None, "")
    with pytest.raises(
        UserError, match=r"the Hugging Face dataset owner/mirror at 12ab cannot be read \(.*\): check"
    ):
        hub(make_spec(), None, "12ab")


@pytest.mark.parametrize(
    ("recorded", "given", "read"), [("", "", "newest"), ("pinned", "", "pinned"), ("pinned", "mine", "mine")]
)
def test_which_commit_is_read(tmp_path, monkeypatch, recorded, given, read):
    import datasets
    import huggingface_hub

    local = datasets.load_dataset(str(clone(tmp_path)))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or local)
    info = type("Info", (), {"sha": "newest"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repo: info)
    content, revision = hub(make_spec(change_mirror(revision=recorded)), None, given)
    assert revision == read
    assert asked == [(("owner/mirror", None), {"revision": read})]
    assert len(content.parts["train"].keys) == 9


def test_a_task_without_mirror():
    with pytest.raises(
        UserError, match=r"no mirror of cifar on the Hugging Face hub is known: take data.source=raw"
    ):
        hub(make_spec(None), None, "")
    with pytest.raises(ValueError, match="cifar has no mirror"):
        circulated.mirror(None, make_spec(None), COUNTS, np.random.default_rng(0))
