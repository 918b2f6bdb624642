import re
from collections import Counter
from functools import lru_cache
from itertools import combinations
from urllib.parse import urlparse

import pytest

from visprompt.data.catalog import fgvc, vtab
from visprompt.data.catalog.vtab_task import size
from visprompt.data.splits import md5_order

RECORDS = {spec.id: spec for spec in (*vtab.RECORDS, *fgvc.RECORDS)}
every_task = pytest.mark.parametrize("spec", RECORDS.values(), ids=RECORDS.keys())
every_vtab_task = pytest.mark.parametrize("spec", vtab.RECORDS, ids=lambda spec: spec.id)

# the order of the papers' tables
ORDER = {
    "natural": ["cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"],
    "specialized": ["patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"],
    "structured": [
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ],
    "fine-grained": ["cub200", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars"],
}

# classes and test images of VTAB-1k, classes and train / val / test images of FGVC, as their papers give them
TEST_SIZES = {
    "cifar": (100, 10_000),
    "caltech101": (102, 6_084),
    "dtd": (47, 1_880),
    "oxford_flowers102": (102, 6_149),
    "oxford_iiit_pet": (37, 3_669),
    "svhn": (10, 26_032),
    "sun397": (397, 21_750),
    "patch_camelyon": (2, 32_768),
    "eurosat": (10, 5_400),
    "resisc45": (45, 6_300),
    "diabetic_retinopathy": (5, 42_670),
    "clevr_count": (8, 15_000),
    "clevr_dist": (6, 15_000),
    "dmlab": (6, 22_735),
    "kitti": (4, 711),
    "dsprites_loc": (16, 73_728),
    "dsprites_ori": (16, 73_728),
    "smallnorb_azi": (18, 12_150),
    "smallnorb_ele": (9, 12_150),
}
FINE_GRAINED = {
    "cub200": (200, 5_394, 600, 5_794),
    "nabirds": (555, 21_536, 2_393, 24_633),
    "oxford_flowers": (102, 1_020, 1_020, 6_149),
    "stanford_dogs": (120, 10_800, 1_200, 8_580),
    "stanford_cars": (196, 7_329, 815, 8_041),
}


def test_the_tasks_come_in_the_order_of_the_papers():
    for group, ids in ORDER.items():
        assert [spec.id for spec in RECORDS.values() if spec.group == group] == ids
    assert list(RECORDS) == [task for ids in ORDER.values() for task in ids]
    assert len(vtab.RECORDS) == 19


@every_task
def test_a_record_is_complete(spec):
    for field in ("label_rule", "source", "licence", "homepage", "citation", "description"):
        assert len(getattr(spec, field)) > 5, field
    assert spec.family == ("fgvc" if spec.group == "fine-grained" else "vtab")
    assert spec.dataset
    assert spec.files
    assert spec.official_sizes
    assert spec.exact or "Not identical to the prepared folder" in spec.notes
    assert re.search(r"\b(19|20)\d\d\b", spec.citation)


def test_no_name_means_two_tasks():
    names = Counter(name for spec in RECORDS.values() for name in (spec.id, *spec.aliases))
    assert [name for name, times in names.items() if times > 1] == []


def test_names_in_circulation_are_known():
    task_of = {name: spec.id for spec in RECORDS.values() for name in spec.aliases}
    assert task_of["cifar100"] == "cifar"
    assert {task_of[name] for name in ("oxford_pet", "pets", "pet")} == {"oxford_iiit_pet"}
    assert task_of["flowers102"] == "oxford_flowers102"
    assert task_of["fgvc_flowers"] == "oxford_flowers"
    assert task_of["clevr_distance"] == "clevr_dist"
    assert task_of["dsprites_position"] == "dsprites_loc"
    assert task_of["camelyon"] == "patch_camelyon"


@every_task
def test_class_names_are_as_many_as_classes_and_distinct(spec):
    assert spec.class_names or spec.id in ("cub200", "nabirds", "stanford_dogs")
    if spec.class_names:
        assert len(set(spec.class_names)) == len(spec.class_names) == spec.num_classes


def test_class_names_follow_the_label_rules():
    assert RECORDS["clevr_count"].class_names[0] == "3 objects"
    assert RECORDS["clevr_count"].class_names[-1] == "10 objects"
    assert RECORDS["clevr_dist"].class_names[1] == "depth 8 to 8.5"
    assert RECORDS["dsprites_loc"].class_names[15] == "x 30 to 31 of 32"
    assert RECORDS["dsprites_ori"].class_names[:3] == (
        "orientation 0 to 2 of 40",
        "orientation 3 to 4 of 40",
        "orientation 5 to 7 of 40",
    )
    assert RECORDS["dsprites_ori"].class_names[15] == "orientation 38 to 39 of 40"
    assert RECORDS["smallnorb_azi"].class_names[-1] == "340 degrees"
    assert RECORDS["smallnorb_ele"].class_names[0] == "30 degrees"
    assert RECORDS["smallnorb_ele"].class_names[-1] == "70 degrees"


@every_vtab_task
def test_vtab_has_800_200_and_the_whole_test_set(spec):
    classes, test = TEST_SIZES[spec.id]
    assert spec.num_classes == classes
    assert spec.split_sizes == {"train800": 800, "val200": 200, "test": test}
    assert {name: size(cut, spec.official_sizes) for name, cut in spec.cuts.items()} == spec.split_sizes


@pytest.mark.parametrize(
    ("task", "split", "val", "test"),
    [
        ("cifar", "train", 0.9, None),
        ("caltech101", "train", 0.9, None),
        ("oxford_iiit_pet", "train", 0.8, None),
        ("svhn", "train", 0.9, None),
        ("eurosat", "train", 0.6, 0.8),
        ("resisc45", "train", 0.6, 0.8),
        ("clevr_count", "train", 0.9, None),
        ("dsprites_loc", "train", 0.8, 0.9),
        ("smallnorb_azi", "test", 0.0, 0.5),
    ],
)
def test_slices_start_at_the_shares_of_the_benchmark(task, split, val, test):
    spec = RECORDS[task]
    total = spec.official_sizes[split]
    start = round(val * total)
    assert spec.cuts["val200"] == (split, start, start + 200)
    if test:
        assert spec.cuts["test"] == (split, round(test * total), None)


@every_vtab_task
def test_no_image_is_in_two_splits(spec):
    images = {
        name: {(cut.split, place) for place in range(spec.official_sizes[cut.split])[cut.start : cut.stop]}
        for name, cut in spec.cuts.items()
    }
    for one, other in combinations(images, 2):
        assert images[one].isdisjoint(images[other]), (one, other)


@pytest.mark.parametrize("spec", fgvc.RECORDS, ids=lambda spec: spec.id)
def test_fgvc_holds_val_out_of_the_official_train_split(spec):
    classes, train, val, test = FINE_GRAINED[spec.id]
    assert spec.num_classes == classes
    assert spec.split_sizes == {"train": train, "val": val, "test": test}
    assert spec.cuts == {}
    assert train + val == spec.official_sizes["train"] + spec.official_sizes.get("validation", 0)
    assert test == spec.official_sizes["test"]


@pytest.mark.parametrize("dataset", ["clevr", "dsprites", "smallnorb"])
def test_pairs_share_everything_but_the_label(dataset):
    one, other = (spec for spec in RECORDS.values() if spec.dataset == dataset)
    for field in (
        "files",
        "cuts",
        "official_sizes",
        "split_sizes",
        "native",
        "licence",
        "citation",
        "mirror",
    ):
        assert getattr(one, field) == getattr(other, field), field
    assert one.label_rule != other.label_rule


def test_all_other_tasks_have_a_dataset_of_their_own():
    datasets = Counter(spec.dataset for spec in RECORDS.values())
    assert {name for name, tasks in datasets.items() if tasks > 1} == {
        *("clevr", "dsprites", "smallnorb", "oxford_flowers102")
    }
    assert len(datasets) == 20


def test_flowers_are_the_same_files_in_both_families():
    assert RECORDS["oxford_flowers"].files == RECORDS["oxford_flowers102"].files
    assert RECORDS["oxford_flowers"].dataset == RECORDS["oxford_flowers102"].dataset, (
        "they are downloaded once"
    )


@every_task
def test_files_have_places_and_checksums(spec):
    assert len({file.name for file in spec.files}) == len(spec.files)
    for file in spec.files:
        assert "/" not in file.name
        assert re.fullmatch(r"([0-9a-f]{64})?", file.sha256), file.name
        assert re.fullmatch(r"([0-9a-f]{32})?", file.md5), file.name
        assert file.size is None or file.size > 0
        assert not file.urls or file.sha256 or file.md5, f"{file.name} is downloaded, so it must be verified"
        for url in file.urls:
            parts = urlparse(url)
            assert parts.scheme in ("http", "https")
            assert parts.path.endswith(file.name)


def test_every_checksum_belongs_to_one_file():
    files = {file for spec in RECORDS.values() for file in spec.files}
    for field in ("sha256", "md5"):
        sums = [getattr(file, field) for file in files if getattr(file, field)]
        assert len(set(sums)) == len(sums)


@every_task
def test_what_has_no_place_says_how_to_get_it(spec):
    missing = [file.name for file in spec.files if not file.urls]
    assert bool(missing) == bool(spec.how_to_get)
    for name in missing:
        assert name in spec.how_to_get


def test_these_three_need_hands():
    by_hand = [spec.id for spec in RECORDS.values() if spec.how_to_get]
    assert by_hand == ["sun397", "diabetic_retinopathy", "nabirds"]


@pytest.mark.parametrize(
    ("task", "total"),
    [
        ("cifar", 168_513_733),
        ("caltech101", 137_414_764),
        ("dtd", 625_239_812),
        ("svhn", 182_040_794 + 64_275_384),
        ("sun397", 39_077_296_924),
        ("eurosat", 94_280_567),
        ("clevr_dist", 19_021_600_724),
        ("dmlab", 3_017_022_789),
        ("dsprites_ori", 28_024_106),
        ("cub200", 1_150_585_339),
        ("diabetic_retinopathy", None),
    ],
)
def test_known_sizes(task, total):
    assert RECORDS[task].size == total


def test_images_that_are_stored_as_they_are():
    assert {spec.id: spec.native for spec in RECORDS.values() if spec.native} == {
        "cifar": 32,
        "svhn": 32,
        "patch_camelyon": 96,
        "eurosat": 64,
        "dsprites_loc": 64,
        "dsprites_ori": 64,
        "smallnorb_azi": 96,
        "smallnorb_ele": 96,
    }


def test_what_the_raw_source_cannot_rebuild_exactly_is_marked():
    assert [spec.id for spec in RECORDS.values() if not spec.exact] == ["caltech101", "eurosat", "resisc45"]
    for task in ("sun397", "diabetic_retinopathy"):
        assert "official task itself is lossy" in RECORDS[task].notes


@every_task
def test_a_mirror_serves_the_task_and_its_official_splits(spec):
    if spec.mirror:
        assert spec.mirror.splits.keys() == spec.official_sizes.keys()
        assert spec.id in spec.mirror.labels
        assert re.fullmatch(r"([0-9a-f]{40})?", spec.mirror.revision)


# what the keys of each official split look like, at full size
ROW = "{}"
KEYS = {
    "cifar": {"train": ROW},
    "svhn": {"train": ROW},
    "smallnorb_azi": {"train": ROW, "test": ROW},
    "clevr_count": {"train": "CLEVR_train_{:06d}.png"},
    "patch_camelyon": {"train": "train_{}", "validation": "valid_{}"},
}


@pytest.mark.parametrize("task", KEYS)
def test_golden_keys_at_full_size(task):
    spec = RECORDS[task]
    known = {name: golden for name, golden in spec.golden.items() if golden.keys}
    assert known
    for name, golden in known.items():
        cut = spec.cuts[name]
        keys = [KEYS[task][cut.split].format(row) for row in range(spec.official_sizes[cut.split])]
        mine = md5_order(keys, cut.split)[cut.start : cut.stop]
        assert tuple(mine[: len(golden.keys)]) == golden.keys


@lru_cache
def dsprites_train800():
    """The first 800 of all 737,280 rows: a second of hashing, shared by both tasks."""
    return md5_order(range(737_280), "train")[:800]


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ("dsprites_loc", lambda row: row // 32 % 32 // 2),
        ("dsprites_ori", lambda row: int(row // (32 * 32) % 40 / 2.5)),
    ],
    ids=["column", "direction"],
)
def test_golden_labels_of_dsprites_at_full_size(task, label):
    golden = RECORDS[task].golden["train800"]
    labels = [label(row) for row in dsprites_train800()]
    assert tuple(labels[:10]) == golden.labels
    counts = Counter(labels)
    assert tuple(counts[label] for label in range(16)) == golden.histogram
    assert sum(golden.histogram) == 800


def test_sun397_golden_labels_are_labels():
    spec = RECORDS["sun397"]
    assert spec.golden["train800"].classes == 309
    assert all(0 <= label < 397 for golden in spec.golden.values() for label in golden.labels)
