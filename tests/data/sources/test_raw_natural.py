import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from helpers.miniatures import natural as synthetic
from visprompt.data.catalog.class_names import class_names
from visprompt.data.sources import natural as raw
from visprompt.data.sources.archive import unpack
from visprompt.data.sources.content import decode_rgb
from visprompt.data.sources.images import BadImage
from visprompt.data.splits import md5_order
from visprompt.errors import UserError

COUNTS = {"train": 62, "validation": 9, "test": 11}
ALL = ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397")
IMAGES = {  # the file that holds a dataset's images
    "cifar": "cifar-100-binary.tar.gz",
    "caltech101": "caltech-101.zip",
    "dtd": "dtd-r1.0.1.tar.gz",
    "oxford_flowers102": "102flowers.tgz",
    "oxford_iiit_pet": "images.tar.gz",
    "svhn": "train_32x32.mat",
    "sun397": "SUN397.tar.gz",
}


def write(dataset, root, seed=0, counts=COUNTS):
    return getattr(synthetic, dataset)(root, counts, np.random.default_rng(seed))


def everything(content):
    return {split: list(part.keys) for split, part in content.parts.items()}


def read_all(dataset, root):
    content = getattr(raw, dataset)(root)
    return list(content.read(everything(content)))


def pixels(content, found):
    return found.image if isinstance(found.image, np.ndarray) else content.decode(found.image)


def repack(path, change, mode="w:gz"):
    """Rewrites a tar with `change(name, data)`, which returns None to leave a member out."""
    with tarfile.open(path) as archive:
        files = [(info.name, archive.extractfile(info).read()) for info in archive]
    files = [(name, new) for name, data in files if (new := change(name, data)) is not None]
    path.write_bytes(synthetic.tar_bytes(files, packed=mode == "w:gz"))


@pytest.mark.parametrize("dataset", ALL)
def test_a_miniature_reads_back(tmp_path, dataset):
    written = write(dataset, tmp_path)
    content = getattr(raw, dataset)(tmp_path)
    assert set(written) == set(content.parts)
    label_of = {}
    for split, part in content.parts.items():
        labels = part.labels[dataset]
        assert set(part.labels) == {dataset}
        assert labels.dtype == np.int64
        assert len(part.keys) == len(labels) == len(set(part.keys))
        label_of.update({(split, key): int(label) for key, label in zip(part.keys, labels, strict=True)})
    found = list(content.read(everything(content)))
    assert {split: sum(one.split == split for one in found) for split in written} == written
    assert len({(one.split, one.key) for one in found}) == len(found)
    for one in found:
        image = pixels(content, one)
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        colour = np.random.default_rng(label_of[one.split, one.key]).integers(40, 216, 3)
        assert np.abs(image.mean((0, 1)) - colour).max() < 8  # the noise is 23 wide, over a thousand pixels


@pytest.mark.parametrize("dataset", ALL)
def test_a_miniature_depends_on_its_seed_alone(tmp_path, dataset):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        write(dataset, tmp_path / name, seed)
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two", "other")
    }
    assert files["one"] == files["two"]
    assert files["one"] != files["other"]


@pytest.mark.parametrize("dataset", ALL)
def test_only_the_wanted_images_come(tmp_path, dataset):
    write(dataset, tmp_path)
    content = getattr(raw, dataset)(tmp_path)
    every = {(one.split, one.key): one for one in content.read(everything(content))}
    some = list(every)[1::7]
    wanted = {split: [key for where, key in some if where == split] for split in content.parts}
    found = list(content.read(wanted))
    assert [(one.split, one.key) for one in found] == some
    assert all(np.array_equal(one.image, every[one.split, one.key].image) for one in found)
    assert list(content.read({})) == []
    assert list(content.read({"train": []})) == []


@pytest.mark.parametrize("dataset", ALL)
def test_a_missing_file_is_named(tmp_path, dataset):
    write(dataset, tmp_path)
    (tmp_path / IMAGES[dataset]).unlink()
    with pytest.raises(
        UserError, match=f"there is no file .*{IMAGES[dataset]}: get it, or run prepare.py again"
    ):
        list(getattr(raw, dataset)(tmp_path).read({"train": ["0", "gone"]}))


@pytest.mark.parametrize("dataset", ALL)
def test_a_truncated_file_is_named(tmp_path, dataset):
    write(dataset, tmp_path)
    path = tmp_path / IMAGES[dataset]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{IMAGES[dataset]} is truncated or damaged"):
        read_all(dataset, tmp_path)


@pytest.mark.parametrize("dataset", ["dtd", "oxford_flowers102", "oxford_iiit_pet", "sun397"])
def test_an_image_that_only_the_list_has_is_left_out(tmp_path, dataset):
    write(dataset, tmp_path)
    content = getattr(raw, dataset)(tmp_path)
    first = next(content.read(everything(content))).key
    total = len(list(content.read(everything(content))))
    repack(tmp_path / IMAGES[dataset], lambda name, data: None if name.endswith(first) else data)
    found = [one.key for one in getattr(raw, dataset)(tmp_path).read(everything(content))]
    assert first not in found
    assert len(found) == total - 1


def test_cifar_rows(tmp_path):
    # more than are read at once
    images = np.random.default_rng(5).integers(0, 256, (2500, 32, 32, 3), np.uint8)
    rows = b"".join(
        bytes([7, row % 100]) + image.transpose(2, 0, 1).tobytes() for row, image in enumerate(images)
    )
    files = [("cifar-100-binary/test.bin", rows[: 3074 * 3]), ("cifar-100-binary/train.bin", rows)]
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(synthetic.tar_bytes(files))
    content = raw.cifar(tmp_path)
    assert content.parts["train"].keys[:3] == ["0", "1", "2"]
    assert content.parts["train"].labels["cifar"].tolist() == [row % 100 for row in range(2500)]
    assert len(content.parts["test"].keys) == 3
    found = list(content.read({"train": {"0", "999", "1000", "2499"}, "test": ["2"]}))
    assert [(one.split, one.key) for one in found] == [
        ("test", "2"),
        ("train", "0"),
        ("train", "999"),
        ("train", "1000"),
        ("train", "2499"),
    ]
    for one in found:
        np.testing.assert_array_equal(one.image, images[int(one.key)])


def test_cifar_refuses_half_an_image_a_wrong_label_and_a_missing_file(tmp_path):
    path = tmp_path / "cifar-100-binary.tar.gz"
    write("cifar", tmp_path)
    repack(path, lambda name, data: data[:-1] if name.endswith("test.bin") else data)
    with pytest.raises(UserError, match=r"damaged \(cifar-100-binary/test\.bin ends within an image\)"):
        raw.cifar(tmp_path)
    write("cifar", tmp_path)
    repack(
        path, lambda name, data: data[:3075] + b"\x64" + data[3076:] if name.endswith("train.bin") else data
    )
    with pytest.raises(UserError, match=r"\(train\) gives image 1 the label 100, outside 0\.\.99"):
        raw.cifar(tmp_path)
    repack(path, lambda name, data: None if name.endswith("train.bin") else data)
    with pytest.raises(UserError, match=r"holds no images in cifar-100-binary/train\.bin"):
        raw.cifar(tmp_path)


def caltech(root, folders, extra=()):
    files = [(f"101_ObjectCategories/{folder}/{name}", b"x") for folder, names in folders for name in names]
    inner = synthetic.tar_bytes([*files, *extra])
    synthetic.write_zip(root / "caltech-101.zip", [("caltech-101/101_ObjectCategories.tar.gz", inner)])


def jpgs(count):
    return [f"image_{number:04d}.jpg" for number in range(1, count + 1)]


def test_caltech_draws_thirty_of_each_class_whatever_the_order_of_the_archive(tmp_path):
    (tmp_path / "b").mkdir()
    litter = [("101_ObjectCategories/ant/._image_0001.jpg", b""), ("101_ObjectCategories/ant/.DS_Store", b"")]
    caltech(tmp_path, [("ant", [*jpgs(33), "tmp"]), ("BACKGROUND_Google", jpgs(30))], litter)
    caltech(tmp_path / "b", [("BACKGROUND_Google", jpgs(30)[::-1]), ("ant", jpgs(33)[::-1])])
    content = raw.caltech101(tmp_path)
    assert everything(content) == everything(raw.caltech101(tmp_path / "b"))
    assert [len(part.keys) for part in content.parts.values()] == [60, 3]
    # one generator for all classes, capital letters first
    draw = np.random.RandomState(1234)
    first = draw.permutation(30)
    second = draw.permutation(33)
    assert content.parts["train"].keys[:30] == sorted(f"BACKGROUND_Google/{jpgs(30)[row]}" for row in first)
    assert content.parts["train"].keys[30:] == sorted(f"ant/{jpgs(33)[row]}" for row in second[:30])
    assert content.parts["test"].keys == sorted(f"ant/{jpgs(33)[row]}" for row in second[30:])
    assert content.parts["train"].labels["caltech101"].tolist() == [4] * 30 + [3] * 30
    assert class_names("caltech101")[3:5] == ("ant", "background_google")


def test_caltech_refuses_strange_archives(tmp_path):
    caltech(tmp_path, [("ant", jpgs(29))])
    with pytest.raises(UserError, match="holds 29 images of ant, fewer than the 30 that train takes"):
        raw.caltech101(tmp_path)
    caltech(tmp_path, [("Unicorn", jpgs(30))])
    with pytest.raises(
        UserError, match=r"Unicorn/image_0001\.jpg, whose class 'unicorn' is not one of the 102 of calt"
    ):
        raw.caltech101(tmp_path)
    caltech(tmp_path, [])
    with pytest.raises(UserError, match="holds no images in 101_ObjectCategories"):
        raw.caltech101(tmp_path)
    synthetic.write_zip(tmp_path / "caltech-101.zip", [("caltech-101/readme", b"")])
    with pytest.raises(UserError, match=r"holds no caltech-101/101_ObjectCategories\.tar\.gz"):
        raw.caltech101(tmp_path)


def test_a_damaged_archive_within_caltechs_zip_is_named_by_the_zip(tmp_path):
    write("caltech101", tmp_path)
    with zipfile.ZipFile(tmp_path / "caltech-101.zip") as archive:
        inner = archive.read("caltech-101/101_ObjectCategories.tar.gz")
    synthetic.write_zip(
        tmp_path / "caltech-101.zip", [("caltech-101/101_ObjectCategories.tar.gz", inner[: len(inner) // 2])]
    )
    with pytest.raises(UserError, match=r"caltech-101\.zip is truncated or damaged"):
        raw.caltech101(tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_dtd_is_a_plain_or_a_packed_tar(tmp_path, mode):
    write("dtd", tmp_path)
    repack(tmp_path / "dtd-r1.0.1.tar.gz", lambda name, data: data, mode)
    content = raw.dtd(tmp_path)
    assert content.parts["validation"].keys[:2] == ["banded/banded_0063.jpg", "blotchy/blotchy_0064.jpg"]
    assert content.parts["validation"].labels["dtd"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert len(list(content.read(everything(content)))) == 82


def test_dtd_refuses_an_unknown_class_and_a_missing_list(tmp_path):
    write("dtd", tmp_path)
    path = tmp_path / "dtd-r1.0.1.tar.gz"
    repack(
        path, lambda name, data: data.replace(b"blotchy/", b"shiny/") if name.endswith("val1.txt") else data
    )
    with pytest.raises(
        UserError, match=r"shiny/blotchy_0064\.jpg, whose class 'shiny' is not one of the 47 of dtd"
    ):
        raw.dtd(tmp_path)
    repack(path, lambda name, data: None if name.endswith("val1.txt") else data)
    with pytest.raises(UserError, match=r"holds no dtd/labels/val1\.txt"):
        raw.dtd(tmp_path)


def test_flowers_lists_keep_the_order_of_the_official_ids(tmp_path):
    synthetic.write_mat(tmp_path / "imagelabels.mat", labels=np.array([[102, 1, 7, 7, 50]], np.uint8))
    ids = {"trnid": np.array([[5, 1]]), "valid": np.array([[2]]), "tstid": np.array([[4, 3]])}
    synthetic.write_mat(tmp_path / "setid.mat", **ids)
    lists = raw.flowers_lists(tmp_path)
    assert {split: (names, labels.tolist()) for split, (names, labels) in lists.items()} == {
        "train": (["image_00005.jpg", "image_00001.jpg"], [49, 101]),
        "validation": (["image_00002.jpg"], [0]),
        "test": (["image_00004.jpg", "image_00003.jpg"], [6, 6]),
    }


def test_flowers_refuse_lists_that_do_not_fit(tmp_path):
    ids = {"trnid": np.array([[1]]), "valid": np.array([[2]]), "tstid": np.array([[3]])}
    synthetic.write_mat(tmp_path / "setid.mat", **ids)
    synthetic.write_mat(tmp_path / "imagelabels.mat", labels=np.array([[1, 2]], np.uint8))
    with pytest.raises(
        UserError, match=r"setid\.mat names images outside the 1\.\.2 that .*imagelabels\.mat labels"
    ):
        raw.flowers_lists(tmp_path)
    synthetic.write_mat(tmp_path / "imagelabels.mat", labels=np.array([[1, 103, 2]], np.uint8))
    with pytest.raises(UserError, match=r"gives image image_00002\.jpg the label 102, outside 0\.\.101"):
        raw.flowers_lists(tmp_path)
    synthetic.write_mat(tmp_path / "imagelabels.mat", names=np.array([[1, 2, 3]], np.uint8))
    with pytest.raises(
        UserError, match=r"imagelabels\.mat is truncated or damaged \(it holds no variable labels\)"
    ):
        raw.flowers_lists(tmp_path)
    (tmp_path / "imagelabels.mat").write_bytes(b"<html>404</html>" * 20)
    with pytest.raises(UserError, match=r"imagelabels\.mat is truncated or damaged"):
        raw.flowers_lists(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b" 4 1 1",
            b" 38 1 1",
            r"\(annotations/trainval\.txt\) gives image .*_4\.jpg the label 37, outside 0\.\.36",
        ),
        (b" 4 1 1", b" 0 1 1", r"gives image .*_4\.jpg the label -1, outside 0\.\.36"),
        (
            b" 4 1 1",
            b" four 1 1",
            "trainval.txt has the line '.*_4 four 1 1' instead of name, class, species",
        ),
        (b" 4 1 1", b" 4", "trainval.txt has the line '.*_4 4' instead of name, class, species and breed"),
    ],
)
def test_pets_refuse_wrong_lists(tmp_path, old, new, message):
    write("oxford_iiit_pet", tmp_path)
    repack(tmp_path / "annotations.tar.gz", lambda name, data: data.replace(old, new))
    with pytest.raises(UserError, match=message):
        raw.oxford_iiit_pet(tmp_path)


def test_pets_keys_and_official_splits(tmp_path):
    write("oxford_iiit_pet", tmp_path)
    parts = raw.oxford_iiit_pet(tmp_path).parts
    assert list(parts) == ["train", "test"]
    assert parts["train"].keys[0] == "Abyssinian_1.jpg"
    assert parts["test"].keys[0] == "Abyssinian_63.jpg"
    assert parts["test"].labels["oxford_iiit_pet"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


def test_svhn_pixels_and_the_digit_ten(tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (32, 32, 3, 4), np.uint8)
    for split in ("train", "test"):
        synthetic.write_mat(
            tmp_path / f"{split}_32x32.mat", X=images, y=np.array([[10], [1], [9], [10]], np.uint8)
        )
    content = raw.svhn(tmp_path)
    assert content.parts["test"].labels["svhn"].tolist() == [0, 1, 9, 0]
    found = list(content.read({"test": ["3", "1"]}))
    assert [one.key for one in found] == ["1", "3"]
    np.testing.assert_array_equal(found[1].image, images[..., 3])


def test_svhn_refuses_a_wrong_label_and_images_that_do_not_fit(tmp_path):
    images = np.zeros((32, 32, 3, 4), np.uint8)
    for split in ("train", "test"):
        synthetic.write_mat(tmp_path / f"{split}_32x32.mat", X=images, y=np.array([[1], [1], [11]], np.uint8))
    with pytest.raises(UserError, match=r"train_32x32\.mat gives image 2 the label 11, outside 0\.\.9"):
        raw.svhn(tmp_path)
    for split in ("train", "test"):
        synthetic.write_mat(tmp_path / f"{split}_32x32.mat", X=images, y=np.array([[1], [1], [2]], np.uint8))
    with pytest.raises(UserError, match=r"its images are uint8 \(32, 32, 3, 4\), its labels 3"):
        list(raw.svhn(tmp_path).read({"train": ["0"]}))


def test_the_shipped_lists_of_sun397_give_the_golden_labels(tmp_path):
    parts = raw.sun397(tmp_path).parts  # the lists need no images
    assert {split: len(part.keys) for split, part in parts.items()} == {
        "train": 800,
        "validation": 200,
        "test": 21_750,
    }
    train, val, test = (parts[split].labels["sun397"] for split in ("train", "validation", "test"))
    assert train[:3].tolist() == [307, 358, 48]
    assert val[:3].tolist() == [54, 302, 236]
    assert len(set(train)) == 309
    assert len({*train, *val}) == 325
    assert len(set(test)) == 397
    for split, part in parts.items():
        assert part.keys == md5_order(part.keys, split)
    every = {key for part in parts.values() for key in part.keys}
    assert len(every) == 22_750
    assert (
        not {"/c/church/outdoor/sun_bhenjvsvrtumjuri.jpg", "/t/track/outdoor/sun_aophkoiosslinihb.jpg"}
        & every
    )


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 60)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(300, 400, (300, 400)), (600, 800, (300, 400)), (301, 400, (300, 399)), (90, 30, (90, 30))],
)
def test_sun397_is_shrunk_to_120000_pixels(height, width, expected):
    image = smooth(height, width)
    decoded = raw.decode_sun397(synthetic.encoded(image, "PNG"))
    assert decoded.shape == (*expected, 3)
    assert expected[0] * expected[1] <= 120_000
    reference = np.asarray(Image.fromarray(image).resize(expected[::-1], Image.Resampling.BILINEAR), np.int64)
    # the JPEG's loss on a smooth picture; red and blue are in place
    assert np.abs(decoded - reference).max() <= 7


def test_sun397_is_encoded_once_more_at_opencvs_default_quality():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling="4:2:0")  # OpenCV's documented default
    decoded = raw.decode_sun397(synthetic.encoded(image, "PNG")).astype(int)
    assert np.abs(decoded - decode_rgb(file.getvalue())).max() <= 1
    assert np.abs(decoded - image).max() > 20


def test_sun397_grey_transparent_and_gif_files():
    grey = raw.decode_sun397(synthetic.encoded(np.full((20, 30), 77, np.uint8), "PNG"))
    assert (grey == 77).all()
    clear = raw.decode_sun397(synthetic.encoded(np.full((20, 30, 4), (200, 100, 50, 0), np.uint8), "PNG"))
    assert np.abs(clear.astype(int) - (200, 100, 50)).max() <= 2
    gif = raw.decode_sun397(synthetic.encoded(np.full((20, 30, 3), (200, 100, 50), np.uint8), "GIF"))
    # as in the official task: red and blue swapped
    assert np.abs(gif.astype(int) - (50, 100, 200)).max() <= 2
    with pytest.raises(BadImage, match="not an image of a known format"):
        raw.decode_sun397(b"no image")
    with pytest.raises(BadImage, match="cannot be decoded"):
        raw.decode_sun397(b"")


def test_sun397_archive_with_backslashes(tmp_path):
    key = raw.sun397_keys()["validation"][0]
    name = ("SUN397" + key).replace("/", "\\")
    (tmp_path / "SUN397.tar.gz").write_bytes(gzip.compress(synthetic.tar_bytes([(name, b"1")], packed=False)))
    found = list(raw.sun397(tmp_path).read({"train": [], "validation": [key]}))
    assert [(one.split, one.key, one.image) for one in found] == [("validation", key, b"1")]


def test_sun397_unpacked(tmp_path):
    write("sun397", tmp_path)
    before = read_all("sun397", tmp_path)
    unpack(tmp_path / "SUN397.tar.gz", tmp_path)  # makes SUN397/
    (tmp_path / "SUN397.tar.gz").unlink()
    assert read_all("sun397", tmp_path) == before
