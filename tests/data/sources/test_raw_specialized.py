import errno
import gzip
import io
import zipfile
from collections import defaultdict
from itertools import pairwise

import cv2
import h5py
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from helpers.miniatures import specialized as synthetic
from helpers.miniatures.natural import encoded, write_zip
from visprompt.data.sources import specialized as raw
from visprompt.data.sources.archive import unpack
from visprompt.data.sources.images import BadImage
from visprompt.errors import UserError

COUNTS = {"train": 21, "validation": 6, "test": 9}
ALL = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
IMAGES = {
    "patch_camelyon": "camelyonpatch_level_2_split_train_x.h5.gz",
    "eurosat": "EuroSAT.zip",
    "resisc45": "NWPU-RESISC45.zip",
    "diabetic_retinopathy": "train.zip",
}


def write(dataset, root, seed=0):
    return getattr(synthetic, dataset)(root, COUNTS, np.random.default_rng(seed))


def everything(content):
    return {split: list(part.keys) for split, part in content.parts.items()}


def read_all(dataset, root):
    content = getattr(raw, dataset)(root)
    return list(content.read(everything(content)))


def same(one, other):
    return [found[:2] for found in one] == [found[:2] for found in other] and all(
        np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("dataset", ALL)
def test_a_miniature_reads_back(tmp_path, dataset):
    written = write(dataset, tmp_path)
    content = getattr(raw, dataset)(tmp_path)
    assert {split: len(part.keys) for split, part in content.parts.items()} == written
    label_of = {}
    for split, part in content.parts.items():
        labels = part.labels[dataset]
        assert labels.dtype == np.int64
        label_of.update({(split, key): int(label) for key, label in zip(part.keys, labels, strict=True)})
    found = list(content.read(everything(content)))
    levels = defaultdict(list)
    assert {(one.split, one.key) for one in found} == set(label_of)
    assert len(found) == len(label_of)
    side = {"patch_camelyon": 96, "eurosat": 64, "resisc45": 48, "diabetic_retinopathy": 540}[dataset]
    for one in found:
        image = one.image if dataset == "patch_camelyon" else content.decode(one.image)
        assert image.dtype == np.uint8
        assert image.shape == (side, side, 3)
        label = label_of[one.split, one.key]
        if dataset == "diabetic_retinopathy":  # stripes, stronger by the level
            levels[label].append(image[170:370, 170:370].std())
        else:
            colour = np.random.default_rng(label).integers(40, 216, 3)
            assert np.abs(image.mean((0, 1)) - colour).max() < 8
    assert all(max(low) + 5 < min(high) for low, high in pairwise(levels[level] for level in sorted(levels)))


@pytest.mark.parametrize("dataset", ALL)
def test_a_miniature_depends_on_its_seed_alone(tmp_path, dataset):
    files = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        write(dataset, tmp_path / name, seed)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert files["one"] == files["two"]
    assert files["one"] != files["other"]


@pytest.mark.parametrize("dataset", ALL)
def test_only_the_wanted_images_come(tmp_path, dataset):
    write(dataset, tmp_path)
    content = getattr(raw, dataset)(tmp_path)
    some = list(content.read(everything(content)))[1::5]
    wanted = {split: {one.key for one in some if one.split == split} for split in content.parts}
    assert same(list(content.read(wanted)), some)
    assert list(content.read({})) == []
    assert list(content.read({"train": []})) == []


@pytest.mark.parametrize("dataset", ALL)
def test_a_missing_file_is_named(tmp_path, dataset):
    write(dataset, tmp_path)
    (tmp_path / IMAGES[dataset]).unlink()
    with pytest.raises(
        UserError, match=f"there is no file .*{IMAGES[dataset]}: get it, or run prepare.py again"
    ):
        read_all(dataset, tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("dataset", ALL)
def test_a_truncated_file_is_named(tmp_path, dataset, share):
    write(dataset, tmp_path)
    path = tmp_path / IMAGES[dataset]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=f"{IMAGES[dataset]} is truncated or damaged"):
        read_all(dataset, tmp_path)


def test_unpacked_folders_are_read_like_the_archives(tmp_path):
    """As Kaggle's instructions leave them; what is downloaded is not unpacked."""
    write("diabetic_retinopathy", tmp_path)
    before = read_all("diabetic_retinopathy", tmp_path)
    for path in tmp_path.glob("*.zip"):
        unpack(path, tmp_path)
        path.unlink()
    after = read_all("diabetic_retinopathy", tmp_path)
    assert sorted(after) == sorted(before)


def test_the_missing_eye_is_left_out(tmp_path):
    write("diabetic_retinopathy", tmp_path)
    before = read_all("diabetic_retinopathy", tmp_path)
    with zipfile.ZipFile(tmp_path / "test.zip") as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    write_zip(tmp_path / "test.zip", files[1:])
    gone = files[0][0].removeprefix("test/").removesuffix(".jpeg")
    assert read_all("diabetic_retinopathy", tmp_path) == [one for one in before if one.key != gone]


def test_pcam_keys_and_order(tmp_path):
    write("patch_camelyon", tmp_path)
    content = raw.patch_camelyon(tmp_path)
    assert {split: part.keys[:2] for split, part in content.parts.items()} == {
        "train": ["train_0", "train_1"],
        "validation": ["valid_0", "valid_1"],
        "test": ["test_0", "test_1"],
    }
    found = content.read({"validation": ["valid_5"], "train": ["train_20", "train_3"]})
    assert [(one.split, one.key) for one in found] == [
        ("train", "train_3"),
        ("train", "train_20"),
        ("validation", "valid_5"),
    ]


@pytest.mark.parametrize("chunks", [None, (5, 96, 96, 3), (3, 40, 96, 1)])
def test_pcam_pixels_whatever_the_chunks(tmp_path, chunks):
    write("patch_camelyon", tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (21, 96, 96, 3), np.uint8)
    write_hdf5(tmp_path / IMAGES["patch_camelyon"], "x", images, chunks=chunks)
    found = list(raw.patch_camelyon(tmp_path).read({"train": ["train_0", "train_4", "train_5", "train_20"]}))
    assert [one.key for one in found] == ["train_0", "train_4", "train_5", "train_20"]
    for one in found:
        np.testing.assert_array_equal(one.image, images[int(one.key.removeprefix("train_"))])


def write_hdf5(path, name, values, **options):
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened.create_dataset(name, data=values, **options)
    path.write_bytes(gzip.compress(file.getvalue(), mtime=0))


def test_pcam_leaves_nothing_beside_even_when_the_reading_stops(tmp_path):
    write("patch_camelyon", tmp_path)
    before = sorted(tmp_path.iterdir())
    images = raw.patch_camelyon(tmp_path).read({"train": ["train_0", "train_1"]})
    next(images)
    images.close()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")]
)
def test_pcam_says_when_it_cannot_decompress(tmp_path, monkeypatch, number, words):
    write("patch_camelyon", tmp_path)
    content = raw.patch_camelyon(tmp_path)

    def refuse(*_, **__):
        raise OSError(number, words)

    monkeypatch.setattr(raw.tempfile if number == errno.EROFS else raw.shutil, REFUSED[number], refuse)
    with pytest.raises(
        UserError, match=rf"train_x\.h5\.gz cannot be decompressed .* in its folder \({words}\): allow"
    ):
        list(content.read({"train": ["train_0"]}))


REFUSED = {errno.EROFS: "TemporaryFile", errno.ENOSPC: "copyfileobj"}


def test_pcam_refuses_wrong_files(tmp_path):
    write("patch_camelyon", tmp_path)
    labels = tmp_path / "camelyonpatch_level_2_split_test_y.h5.gz"
    write_hdf5(labels, "y", np.array([0, 1, 2]).reshape(3, 1, 1, 1))
    with pytest.raises(UserError, match=r"test_y\.h5\.gz gives image test_2 the label 2, outside 0\.\.1"):
        raw.patch_camelyon(tmp_path)
    write_hdf5(labels, "y", np.array([0, 1, 1]).reshape(3, 1, 1, 1))
    with pytest.raises(
        UserError, match=r"test_x\.h5\.gz .* \(its images are \(9, 96, 96, 3\), its labels 3\)"
    ):
        list(raw.patch_camelyon(tmp_path).read({"test": ["test_0"]}))
    write_hdf5(labels, "labels", np.array([0, 1, 1]))
    with pytest.raises(UserError, match=r"test_y\.h5\.gz holds no dataset 'y'"):
        raw.patch_camelyon(tmp_path)
    labels.write_bytes(gzip.compress(b"<html>404</html>"))
    with pytest.raises(UserError, match=r"test_y\.h5\.gz is truncated or damaged"):
        raw.patch_camelyon(tmp_path)


def test_pcam_with_garbled_pixels_is_named(tmp_path):
    write("patch_camelyon", tmp_path)
    path = tmp_path / IMAGES["patch_camelyon"]
    plain = bytearray(gzip.decompress(path.read_bytes()))
    plain[len(plain) // 2 : len(plain) // 2 + 400] = bytes(400)
    path.write_bytes(gzip.compress(plain))
    with pytest.raises(UserError, match=r"train_x\.h5\.gz is truncated or damaged \(.*read"):
        read_all("patch_camelyon", tmp_path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"train_x\.h5\.gz is truncated or damaged \(Not a gzipped file"):
        read_all("patch_camelyon", tmp_path)


def test_keys_of_class_folders(tmp_path):
    files = [
        ("2750/Forest/Forest_687.jpg", b"1"),
        ("2750/AnnualCrop/AnnualCrop_2.jpg", b"2"),
        ("2750/notes.txt", b""),
    ]
    litter = [("__MACOSX/2750/Forest/._Forest_687.jpg", b""), ("2750/Forest/._Forest_687.jpg", b"")]
    write_zip(tmp_path / "EuroSAT.zip", [*litter, *files])
    content = raw.eurosat(tmp_path)
    assert list(content.parts) == ["train"]
    assert content.parts["train"].keys == ["AnnualCrop_AnnualCrop_2.jpg", "Forest_Forest_687.jpg"]
    assert content.parts["train"].labels["eurosat"].tolist() == [0, 1]
    assert [one.image for one in content.read(everything(content))] == [b"1", b"2"]
    write("resisc45", tmp_path)
    assert raw.resisc45(tmp_path).parts["train"].keys[0] == "airplane_airplane_001.jpg"


def test_class_folders_refuse_strange_archives(tmp_path):
    write_zip(tmp_path / "EuroSAT.zip", [("2750/Wood/Wood_1.jpg", b"1")])
    with pytest.raises(
        UserError, match=r"EuroSAT\.zip holds Wood_Wood_1\.jpg, whose class 'Wood' is not one of the"
    ):
        raw.eurosat(tmp_path)
    write_zip(tmp_path / "EuroSAT.zip", [("readme.txt", b"")])
    with pytest.raises(UserError, match=r"EuroSAT\.zip holds no images in 2750/<class>/"):
        raw.eurosat(tmp_path)


def test_retinopathy_lists(tmp_path):
    (tmp_path / "trainLabels.csv").write_text("image,level\n10_left,0\n10_right,4\n")
    (tmp_path / "retinopathy_solution.csv").write_text(
        "image,level,Usage\n1_left,1,Private\n2_left,2,Public\n"
    )
    parts = raw.diabetic_retinopathy(tmp_path).parts
    assert {
        split: (part.keys, part.labels["diabetic_retinopathy"].tolist()) for split, part in parts.items()
    } == {
        "train": (["10_left", "10_right"], [0, 4]),
        "validation": (["2_left"], [2]),
        "test": (["1_left"], [1]),
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,level,Usage\n1_left,5,Private\n", r"gives image 1_left the label 5, outside 0\.\.4"),
        ("image,level,Usage\n1_left,-1,Private\n", "image 1_left has a level that is not a number"),
        (
            "image,level,Usage\n1_left,1,Secret\n",
            "line 2 has the Usage 'Secret' instead of Public or Private",
        ),
        ("image,level\n1_left,1\n", "line 2 has no Usage"),
        ("image,level,Usage\n1_left,1,Public\n2_left\n", "line 3 has no level and Usage"),
        ("", "it lists no images"),
        ("image,level,Usage\n\udcff,1,Public\n", r"is truncated or damaged \('utf-8' codec"),
    ],
)
def test_retinopathy_refuses_wrong_lists(tmp_path, table, message):
    write("diabetic_retinopathy", tmp_path)
    (tmp_path / "retinopathy_solution.csv").write_bytes(table.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"retinopathy_solution.csv .*{message}"):
        raw.diabetic_retinopathy(tmp_path)


def eye(height, width, radius, seed=0):
    """A smooth textured disc in the middle of black."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3))
    texture = gaussian_filter(noise, (4, 4, 0)) * 300 + (90, 110, 130)
    inside = (x - width // 2) ** 2 + (y - height // 2) ** 2 <= radius**2
    return np.where(inside[..., None], texture, 0).clip(0, 255).astype(np.uint8)


def test_retina_against_a_plain_implementation():
    image = eye(640, 700, 300)
    # 600 bright pixels: scale 1
    image[320] = np.where((np.abs(np.arange(700) - 349.5) < 300)[:, None], 120, 0)
    blurred = gaussian_filter(image.astype(float), (10, 10, 0), mode="mirror", truncate=3)
    expected = (4 * image.astype(float) - 4 * blurred + 128).clip(0, 255)[
        320 - 270 : 320 + 270, 350 - 270 : 350 + 270
    ]
    y, x = np.mgrid[-270:270, -270:270]
    distance = np.hypot(y, x)
    result = raw._enhanced(image).astype(float)
    assert result.shape == (540, 540, 3)
    assert np.abs(result - expected)[distance < 269].max() <= 4  # the blur is rounded before it is multiplied
    assert (result[distance > 271] == 128).all()
    assert (result[distance < 269].std(axis=0) > 20).all()


@pytest.mark.parametrize(("height", "width", "radius"), [(240, 300, 100), (900, 1000, 450)])
def test_retina_is_scaled_to_one_size(height, width, radius):
    result = raw.decode_retina(encoded(eye(height, width, radius)))
    assert result.shape == (540, 540, 3)
    assert result.dtype == np.uint8
    for corner in (result[:20, :20], result[-20:, :20], result[:20, -20:], result[-20:, -20:]):
        assert (corner == 128).all()


def test_retina_that_the_photograph_cuts_off_stays_lower():
    result = raw.decode_retina(encoded(eye(120, 300, 100), "PNG"))
    assert result.shape == (round(120 * 300 / 100.5), 540, 3)  # 201 bright pixels in the middle row
    assert (result[:16, :32] == 128).all()
    assert (result[:20, 240:300] != 128).any()


def test_a_retina_keeps_its_colours_in_place():
    image = np.where(eye(240, 300, 100) > 0, np.uint8(100), np.uint8(0))
    image[98:106, 146:154] = (255, 100, 100)  # a red spot, 18 pixels above the centre
    result = raw.decode_retina(encoded(image, "PNG")).astype(int)
    spot = result[270 - 57 : 270 - 51, 267:273].mean((0, 1))
    assert spot[0] > spot[2] + 60
    assert abs(spot[1] - spot[2]) < 10


def test_a_black_photograph_counts_its_height_as_the_eyeball():
    assert raw._eyeball_radius(np.zeros((80, 100, 3), np.uint8)) == 40
    result = raw.decode_retina(encoded(np.zeros((80, 100, 3), np.uint8)))
    assert result.shape == (540, 540, 3)
    assert (result == 128).all()


def test_retina_is_encoded_at_quality_72(monkeypatch):
    seen = []
    encode = cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda *given: seen.append(given) or encode(*given))
    raw.decode_retina(encoded(eye(120, 120, 50)))
    assert [(given[0], given[1].dtype, given[2]) for given in seen] == [
        (".jpg", np.uint8, [cv2.IMWRITE_JPEG_QUALITY, 72])
    ]


@pytest.mark.parametrize("data", [b"", b"no image"])
def test_a_retina_that_is_no_image(data):
    with pytest.raises(BadImage, match="cannot be decoded"):
        raw.decode_retina(data)


def test_a_retina_that_does_not_fit_in_memory_is_named(monkeypatch):
    def refuse(*_, **__):
        raise cv2.error("Insufficient memory")

    monkeypatch.setattr(cv2, "resize", refuse)
    with pytest.raises(BadImage, match="cannot be scaled to an eyeball of 300 pixels"):
        raw.decode_retina(encoded(eye(120, 120, 50)))
