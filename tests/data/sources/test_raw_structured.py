# ruff: noqa: NPY002 - the official split of KITTI is made with numpy's old generator
import gzip
import io
import json
import tarfile
import zipfile
from collections import Counter, defaultdict

import h5py
import numpy as np
import pytest
from PIL import Image

from helpers.miniatures import structured as synthetic
from helpers.miniatures.structured import build_example, record
from visprompt.data.sources import structured as raw
from visprompt.data.sources.content import decode_rgb
from visprompt.errors import UserError

COUNTS = {"train": 40, "validation": 12, "test": 14}
NAMES = ("clevr", "dmlab", "kitti", "dsprites", "smallnorb")
FILES = {
    "clevr": raw.CLEVR,
    "dmlab": raw.DMLAB,
    "kitti": raw.KITTI_IMAGES,
    "dsprites": raw.DSPRITES,
    "smallnorb": raw.SMALLNORB["test"].format("dat"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder and counts of each dataset's miniature, written once; tests that damage one write their own."""
    found = {}
    for name in NAMES:
        root = tmp_path_factory.mktemp(name)
        found[name] = root, write(name, root)
    return found


def write(name, root):
    return getattr(synthetic, name)(root, COUNTS, np.random.default_rng(1))


def pixels(content, found):
    return found.image if isinstance(found.image, np.ndarray) else content.decode(found.image)


@pytest.mark.parametrize("name", NAMES)
def test_lists_and_images_of_all_splits(name, written):
    root, counts = written[name]
    content = getattr(raw, name)(root)
    assert {split: len(part.keys) for split, part in content.parts.items()} == counts
    assert not content.lossy
    for part in content.parts.values():
        assert len(set(part.keys)) == len(part.keys)
        assert all(
            labels.dtype == np.int64 and len(labels) == len(part.keys) for labels in part.labels.values()
        )
    everything = list(content.read({split: part.keys for split, part in content.parts.items()}))
    assert Counter(found.split for found in everything) == counts
    assert len({(found.split, found.key) for found in everything}) == sum(counts.values())


@pytest.mark.parametrize("name", NAMES)
def test_only_wanted_images_are_read(name, written):
    content = getattr(raw, name)(written[name][0])
    wanted = {"train": set(content.parts["train"].keys[3:5])}
    assert {found.key for found in content.read(wanted)} == wanted["train"]
    assert {found.split for found in content.read(wanted)} == {"train"}
    assert list(content.read({})) == []


@pytest.mark.parametrize("name", NAMES)
def test_equal_draws_write_equal_files(name, written, tmp_path):
    write(name, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (written[name][0] / file.name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*: get it, or run prepare.py again"):
        getattr(raw, name)(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_named(name, tmp_path):
    write(name, tmp_path)
    file = tmp_path / FILES[name]
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])

    def everything():
        content = getattr(raw, name)(tmp_path)
        list(content.read({split: part.keys for split, part in content.parts.items()}))

    with pytest.raises(UserError, match=rf"{file.name} is truncated or damaged \(.*\): delete it and run"):
        everything()


@pytest.mark.parametrize(
    ("name", "task", "classes"),
    [("clevr", "clevr_count", 8), ("clevr", "clevr_dist", 6), ("dmlab", "dmlab", 6), ("kitti", "kitti", 4)],
)
def test_the_colour_tells_the_label(name, task, classes, written):
    content = getattr(raw, name)(written[name][0])
    part = content.parts["train"]
    label = dict(zip(part.keys, part.labels[task].tolist(), strict=True))
    means = defaultdict(list)
    for found in content.read({"train": part.keys}):
        colour = decode_rgb(found.image).mean(axis=(0, 1))
        means[label[found.key]].append(
            colour[1] if task == "clevr_dist" else colour[0] if name == "clevr" else colour
        )
    assert set(means) == set(range(classes))
    centres = np.array([np.mean(values, axis=0) for values in means.values()]).reshape(classes, -1)
    spread = max(np.ptp(values, axis=0).max() for values in means.values())
    between = np.linalg.norm(centres[:, None] - centres[None], axis=-1)[~np.eye(classes, dtype=bool)].min()
    assert between > 3 * spread


# CLEVR


def clevr_zip(root, scenes, val=None):
    with zipfile.ZipFile(root / raw.CLEVR, "w") as archive:
        for split, found in (("train", scenes), ("val", scenes if val is None else val)):
            archive.writestr(
                f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json", json.dumps({"info": {}, "scenes": found})
            )
            archive.writestr(f"CLEVR_v1.0/images/{split}/CLEVR_{split}_000000.png", split)
        archive.writestr("__MACOSX/CLEVR_v1.0/images/train/._CLEVR_train_000000.png", "litter")
        archive.writestr("CLEVR_v1.0/images/test/CLEVR_train_000000.png", "of another split")


def scene(name, *depths):
    return {
        "image_filename": name,
        "objects": [{"pixel_coords": [1, 2, depth], "3d_coords": []} for depth in depths],
    }


def test_clevr_labels_by_hand(tmp_path):
    rows = [
        ((7.0, 9, 12), 0, 0),
        ((8.0, 9, 12), 0, 0),  # not below 8
        ((8.001, 9, 12, 12), 1, 1),
        ((8.5, 9, 12), 0, 1),
        ((12, 8.6, 12), 0, 2),
        ((9.2, 20, 30), 0, 3),
        ((9.9, 20, 30), 0, 4),
        ((10.0, 20, 30), 0, 4),
        ((11,) * 10, 7, 5),
        ((8.00000001, 9, 9), 0, 0),  # as float32 it is 8
    ]
    clevr_zip(tmp_path, [scene(f"CLEVR_train_{i:06d}.png", *row[0]) for i, row in enumerate(rows)])
    part = raw.clevr(tmp_path).parts["train"]
    assert part.keys[:2] == ["CLEVR_train_000000.png", "CLEVR_train_000001.png"]
    assert part.labels["clevr_count"].tolist() == [row[1] for row in rows]
    assert part.labels["clevr_dist"].tolist() == [row[2] for row in rows]


def test_clevr_images_belong_to_their_split(tmp_path):
    name = "CLEVR_train_000000.png"
    clevr_zip(tmp_path, [scene(name, 9, 9, 9)])
    content = raw.clevr(tmp_path)
    assert list(content.read({"train": [name], "validation": [name]})) == [("train", name, b"train")]
    assert content.parts["validation"].keys == [name]


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ([scene("a.png", 9, 9)], "gives image a.png the label -1, outside 0..7"),
        ([scene("a.png", *[9] * 11)], "gives image a.png the label 8, outside 0..7"),
        ([scene("a.png", 9, 9, -1)], "gives image a.png the label -1, outside 0..5"),
        ([{"image_filename": "a.png"}], r"CLEVR_v1.0.zip is truncated or damaged \('objects'\)"),
        ([scene("a.png", 9, 9, "near")], r"CLEVR_v1.0.zip is truncated or damaged \(could not convert"),
    ],
)
def test_clevr_scenes_that_are_wrong(tmp_path, scenes, message):
    clevr_zip(tmp_path, scenes)
    with pytest.raises(UserError, match=message):
        raw.clevr(tmp_path)


def test_clevr_without_scenes(tmp_path):
    with zipfile.ZipFile(tmp_path / raw.CLEVR, "w") as archive:
        archive.writestr("CLEVR_v1.0/scenes/CLEVR_train_scenes.json", '{"scenes": []}')
    with pytest.raises(UserError, match=r"lacks scenes/CLEVR_train_scenes.json or CLEVR_val_scenes.json"):
        raw.clevr(tmp_path)


def test_a_damaged_image_in_a_zip(tmp_path):
    write("clevr", tmp_path)
    path = tmp_path / raw.CLEVR
    content = raw.clevr(tmp_path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("CLEVR_v1.0/images/train/CLEVR_train_000002.png").header_offset
    data = bytearray(path.read_bytes())
    data[place + 200 : place + 220] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"CLEVR_v1.0.zip is truncated or damaged"):
        list(content.read({"train": content.parts["train"].keys}))


# DMLab


def dmlab_tar(root, files):
    with tarfile.open(root / raw.DMLAB, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def frame(name, label, image=b"jpeg"):
    return record(build_example({"image": image, "filename": name, "label": label}))


def test_dmlab_fields_by_hand(tmp_path):
    others = {
        "./dmlab/dmlab-validation.tfrecord": frame(b"v", 5),
        "dmlab/dmlab-test.tfrecord-0": frame(b"t", 1),
    }
    train = frame(b"b.jpg", 3, b"first") + frame(b"a.jpg", 0, b"second")
    dmlab_tar(
        tmp_path, {"README": b"no records", "dmlab/dmlab-train.tfrecord-00000-of-00001": train, **others}
    )
    content = raw.dmlab(tmp_path)
    assert content.parts["train"].keys == ["b.jpg", "a.jpg"]
    assert content.parts["train"].labels["dmlab"].tolist() == [3, 0]
    assert content.parts["validation"].labels["dmlab"].tolist() == [5]
    assert list(content.read({"train": ["a.jpg"], "test": ["t"]})) == [
        ("train", "a.jpg", b"second"),
        ("test", "t", b"jpeg"),
    ]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (frame(b"a", 6), "dmlab.tar.gz gives image a the label 6, outside 0..5"),
        (
            frame(b"a", 0)[:-9],
            r"dmlab.tar.gz: dmlab-train.tfrecord is truncated or damaged \(record 1 is cut off\)",
        ),
        (record(build_example({"label": 1})), r"dmlab.tar.gz is truncated or damaged \(no text 'filename'\)"),
        (
            record(build_example({"filename": b"a"})),
            r"dmlab.tar.gz is truncated or damaged \(no integer 'label'\)",
        ),
        (record(b"\x0a\x7f"), r"dmlab.tar.gz is truncated or damaged \(a record is not a tf.train.Example\)"),
        (b"", r"it holds no records in dmlab-train.tfrecord\*"),
    ],
)
def test_dmlab_records_that_are_wrong(tmp_path, train, message):
    others = {f"dmlab-{split}.tfrecord": frame(b"x", 1) for split in ("validation", "test")}
    dmlab_tar(tmp_path, {"dmlab-train.tfrecord": train, **others})
    with pytest.raises(UserError, match=message):
        raw.dmlab(tmp_path)


# KITTI


def naive_split(videos):
    """As the official code reads: the global generator, sets of names, and lists of images by video."""
    images = defaultdict(list)
    for image, video in enumerate(videos):
        images[video].append(image)
    state = np.random.get_state()
    np.random.seed(123)
    count = max(1, 10 * len(images) // 100)
    test = set(np.random.choice(sorted(images), count, replace=False))
    validation = set(np.random.choice(sorted(set(images) - test), count, replace=False))
    np.random.set_state(state)
    parts = {"train": [], "validation": [], "test": []}
    for video, rows in images.items():
        parts["test" if video in test else "validation" if video in validation else "train"] += rows
    return {split: sorted(rows) for split, rows in parts.items()}


@pytest.mark.parametrize("count", [3, 9, 10, 19, 37, 141])
def test_kitti_videos_are_cut_as_officially(count):
    draw = np.random.default_rng(count)
    names = [f"2011_09_26_drive_{number:04d}_sync" for number in range(count)]
    videos = [*names, *draw.choice(names, 300).tolist()]
    state = np.random.get_state()[1].copy()
    split = raw.kitti_splits(videos)
    assert split == naive_split(videos)
    assert sorted(row for rows in split.values() for row in rows) == list(range(len(videos)))
    assert len({videos[row] for row in split["test"]}) == max(1, count // 10)
    assert not {videos[row] for row in split["train"]} & {videos[row] for row in split["test"]}
    assert np.array_equal(np.random.get_state()[1], state)


def kitti_files(root, notes, rand="2,1,3", lines="d a 0\nd b 0\nd c 0\n"):
    with zipfile.ZipFile(root / raw.KITTI_LABELS, "w") as archive:
        for number, note in enumerate(notes):
            archive.writestr(f"training/label_2/{number:06d}.txt", note)
    with zipfile.ZipFile(root / raw.KITTI_DEVKIT, "w") as archive:
        archive.writestr("devkit/mapping/train_rand.txt", rand)
        archive.writestr("devkit/mapping/train_mapping.txt", lines)
    with zipfile.ZipFile(root / raw.KITTI_IMAGES, "w") as archive:
        for name in ("testing/image_2", "training/image_3", "training/image_2"):
            archive.writestr(f"{name}/000001.png", name)


def note(kind, z):
    return f"{kind} 0.00 0 0.1 1 2 3 4 1.5 1.6 1.7 0.5 1.5 {z} 0.2\n"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (note("Car", 8.0), 0),
        (note("Van", 8.01) + note("Pedestrian", 2), 1),
        (note("Car", 50) + note("Truck", 20.0) + note("DontCare", -1000), 1),
        (note("Truck", 20.01), 2),
        (note("Car", 30) + note("Car", -1.2), 0),
        (note("Tram", 3) + note("Misc", 3) + note("Cyclist", 3) + note("Person_sitting", 3), 3),
        ("", 3),
    ],
)
def test_kitti_labels_by_hand(tmp_path, text, label):
    kitti_files(tmp_path, [text] * 3)
    parts = raw.kitti(tmp_path).parts
    assert [part.labels["kitti"].tolist() for part in parts.values()] == [[label]] * 3


def test_kitti_images_follow_the_mapping(tmp_path):
    kitti_files(tmp_path, [note("Car", 1), note("Car", 10), note("Car", 30)])
    content = raw.kitti(tmp_path)
    owner = {part.keys[0]: split for split, part in content.parts.items()}
    rows = naive_split(["b", "a", "c"])  # image 0 is of line 2
    assert owner == {f"{row:06d}.png": split for split, (row,) in rows.items()}
    wanted = {split: part.keys for split, part in content.parts.items()}
    assert list(content.read(wanted)) == [(owner["000001.png"], "000001.png", b"training/image_2")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"notes": [""] * 2}, "data_object_label_2.zip is .*it holds no annotation of 000002.png"),
        ({"notes": ["Car 0.00 0\n"] * 3}, "data_object_label_2.zip is truncated or damaged .*list index"),
        ({"notes": [note("Car", "far")] * 3}, "data_object_label_2.zip is truncated or damaged .*'far'"),
        ({"rand": "1,2,x"}, "devkit_object.zip is truncated or damaged .*'x'"),
        ({"rand": "1,2,4"}, "devkit_object.zip is truncated or damaged .*list index"),
        ({"lines": "d a\nd a\nd b\n"}, "devkit_object.zip .*names less than three videos"),
    ],
)
def test_kitti_files_that_are_wrong(tmp_path, change, message):
    kitti_files(tmp_path, **{"notes": [""] * 3, **change})
    with pytest.raises(UserError, match=message):
        raw.kitti(tmp_path)


# dSprites


def test_dsprites_pixels_labels_and_keys(written):
    root, _ = written["dsprites"]
    with h5py.File(root / raw.DSPRITES) as file:
        images, classes = file["imgs"][:], file["latents/classes"][:]
    content = raw.dsprites(root)
    part = content.parts["train"]
    assert part.keys == [str(row) for row in range(40)]
    assert part.labels["dsprites_loc"].tolist() == [x // 2 for x in classes[:, 4]]
    assert part.labels["dsprites_ori"].tolist() == [
        int(np.floor(np.float32(ori) / 2.5)) for ori in classes[:, 3]
    ]
    found = list(content.read({"train": ["17", "3"]}))
    assert [one.key for one in found] == ["3", "17"]
    assert found[1].image.shape == (64, 64, 1)
    assert np.array_equal(found[1].image[..., 0], images[17] * 255)
    assert set(np.unique(found[0].image)) == {0, 255}
    centre = np.argwhere(images[0])[:, 1].mean()
    assert abs(centre - (10 + 43 / 31 * classes[0, 4])) < 6


def sprites(root, images, classes):
    with h5py.File(root / raw.DSPRITES, "w") as file:
        file["imgs"] = images
        file["latents/classes"] = classes


def test_all_orientations_of_dsprites(tmp_path):
    classes = np.zeros((40, 6), np.int64)
    classes[:, 3] = np.arange(40)
    sprites(tmp_path, np.zeros((40, 64, 64), np.uint8), classes)
    labels = raw.dsprites(tmp_path).parts["train"].labels["dsprites_ori"]
    assert labels.tolist() == [int(np.float32(ori) // np.float32(2.5)) for ori in range(40)]
    assert np.bincount(labels).tolist() == [3, 2] * 8


def test_dsprites_are_read_over_block_borders(tmp_path):
    images = np.zeros((5000, 64, 64), np.uint8)
    images[4095, 1, 2] = images[4999, 3, 4] = 1
    sprites(tmp_path, images, np.zeros((5000, 6), np.int64))
    found = list(raw.dsprites(tmp_path).read({"train": ["4999", "4095", "4096"]}))
    assert [(one.key, np.argwhere(one.image[..., 0]).tolist()) for one in found] == [
        ("4095", [[1, 2]]),
        ("4096", []),
        ("4999", [[3, 4]]),
    ]


def test_dsprites_that_are_wrong(tmp_path):
    good = np.zeros((3, 64, 64), np.uint8), np.zeros((3, 6), np.int64)
    sprites(tmp_path, good[0] + np.uint8(2), good[1])
    with pytest.raises(UserError, match="holds pixels other than 0 and 1"):
        list(raw.dsprites(tmp_path).read({"train": ["0"]}))
    sprites(tmp_path, good[0], good[1] + 40)
    with pytest.raises(UserError, match=r"gives image 0 the label 20, outside 0..15"):
        raw.dsprites(tmp_path)
    sprites(tmp_path, good[0][:2], good[1])
    with pytest.raises(UserError, match=r"images of shape \(2, 64, 64\) and classes of shape \(3, 6\)"):
        raw.dsprites(tmp_path)
    with h5py.File(tmp_path / raw.DSPRITES, "w") as file:
        file["imgs"] = good[0]
    with pytest.raises(UserError, match=r"64x64.hdf5 is truncated or damaged \(.*open object"):
        raw.dsprites(tmp_path)


# smallNORB


def matrix(root, split, kind, data, magic=None, shape=None):
    magic = magic or (507333717 if data.dtype == np.uint8 else 507333716)
    shape = shape or (*data.shape, 1, 1)[: max(3, data.ndim)]
    with gzip.open(root / raw.SMALLNORB[split].format(kind), "wb") as file:
        file.write(np.array([magic, data.ndim, *shape], "<i4").tobytes() + data.tobytes())


def norb(root, info, images=None):
    info = np.array(info, "<i4")
    for split in raw.SMALLNORB:
        matrix(root, split, "info", info)
        matrix(root, split, "dat", np.zeros((len(info), 2, 96, 96), np.uint8) if images is None else images)


def test_smallnorb_pixels_and_labels_by_hand(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 96, 96)).astype(np.uint8)
    norb(tmp_path, [[0, 0, 34, 5], [1, 8, 0, 4], [2, 3, 6, 3], [3, 1, 2, 0]], images)
    content = raw.smallnorb(tmp_path)
    assert content.parts["test"].labels["smallnorb_azi"].tolist() == [17, 0, 3, 1]
    assert content.parts["train"].labels["smallnorb_ele"].tolist() == [0, 8, 3, 1]
    found = list(content.read({"test": ["2", "0"], "train": ["3"]}))
    assert [(one.split, one.key) for one in found] == [("train", "3"), ("test", "0"), ("test", "2")]
    for one in found:
        assert one.image.dtype == np.uint8
        assert np.array_equal(one.image[..., 0], images[int(one.key), 0])  # the left camera


def test_the_synthetic_smallnorb_shows_its_labels(written):
    content = raw.smallnorb(written["smallnorb"][0])
    part = content.parts["train"]
    for one in content.read({"train": part.keys}):
        row, column = np.argwhere(one.image[..., 0] > 128).min(axis=0)
        assert row // 10 == part.labels["smallnorb_ele"][int(one.key)]
        assert column // 5 == part.labels["smallnorb_azi"][int(one.key)]


def test_smallnorb_files_that_are_wrong(tmp_path):
    norb(tmp_path, [[0, 9, 0, 0]])
    with pytest.raises(UserError, match=r"training-info.mat.gz gives image 0 the label 9, outside 0..8"):
        raw.smallnorb(tmp_path)
    norb(tmp_path, [[0, 0, 36, 0]])
    with pytest.raises(UserError, match=r"gives image 0 the label 18, outside 0..17"):
        raw.smallnorb(tmp_path)
    norb(tmp_path, [[0, 0, 0, 0]])
    matrix(tmp_path, "train", "info", np.zeros((2, 4), "<i4"))
    with pytest.raises(
        UserError, match=r"shape is \(2, 4\), and there are 1 images in .*training-dat.mat.gz"
    ):
        raw.smallnorb(tmp_path)
    matrix(tmp_path, "train", "info", np.zeros((1, 4), "<i4"), magic=507333713)
    with pytest.raises(UserError, match=r"training-info.mat.gz is .*begins with 507333713 and 2"):
        raw.smallnorb(tmp_path)
    matrix(tmp_path, "train", "info", np.zeros((1, 4), "<i4"), shape=(3, 4, 1))
    with pytest.raises(UserError, match=r"training-info.mat.gz is .*ends 32 bytes too early"):
        raw.smallnorb(tmp_path)
    matrix(tmp_path, "train", "info", np.zeros((1, 4), "<i4"))
    matrix(tmp_path, "train", "dat", np.zeros((1, 2, 48, 48), np.uint8))
    with pytest.raises(UserError, match=r"training-dat.mat.gz is .*shape is \[1, 2, 48, 48\]"):
        raw.smallnorb(tmp_path)


def test_kitti_pictures_are_png(written):
    content = raw.kitti(written["kitti"][0])
    one = next(iter(content.read({"test": content.parts["test"].keys})))
    with Image.open(io.BytesIO(one.image)) as image:
        assert (image.format, image.size) == ("PNG", (62, 19))
    assert pixels(content, one).shape == (19, 62, 3)
