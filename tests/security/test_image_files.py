"""A stranger's images: read by a few of Pillow's readers alone, and bounded before a pixel is decoded."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from visprompt.data.folder_datamodule import FolderDataModule
from visprompt.data.sources.content import decode_rgb
from visprompt.data.sources.decoders import DECODERS, decoder_of
from visprompt.data.sources.images import EXTENSIONS, FORMATS, MAX_PIXELS, BadImage, decode
from visprompt.data.sources.specialized import decode_retina
from visprompt.errors import UserError

LARGE = (
    "is {0} x {0} pixels, more than the {1} that are decoded: if it is meant to be so large, raise "
    "data.max_pixels, or for src/predict.py max_pixels"
)
SIZES = {
    "root": "x",
    "batch_size": 4,
    "split": "final",
    "seed": 0,
    "image_size": 32,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}


def png(width, height):
    """A few bytes that say they are a picture of any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_eps_by_any_name_is_not_read(tmp_path, decoder):
    """Pillow gives EPS to Ghostscript, which is a program of its own."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(owned) (w) file closefile\n%%EOF\n"
    for name in ("a.png", "a.eps", "a.jpg"):
        (tmp_path / name).write_bytes(eps)
        with pytest.raises(BadImage, match=r"^cannot be decoded \(not an image of a known format\)$"):
            DECODERS[decoder](tmp_path / name)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix", ["pcx", "tga", "ico", "psd", "sgi", "im", "dds"])
def test_other_formats_of_pillow_are_not_read_by_a_usual_name(tmp_path, suffix, decoder):
    writable = {"psd": b"8BPS\0\1" + bytes(100)}
    path = tmp_path / f"a.{suffix}"
    if suffix in writable:
        path.write_bytes(writable[suffix])
    else:
        Image.new("RGB", (32, 32)).save(path)
    (tmp_path / "a.png").write_bytes(path.read_bytes())
    with pytest.raises(BadImage, match=r"^cannot be decoded \(not an image of a known format\)$"):
        DECODERS[decoder](tmp_path / "a.png")


def test_every_documented_format_is_read(tmp_path):
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".pgm": "PPM", ".ppm": "PPM"}
    for suffix in EXTENSIONS:
        Image.new("L" if suffix == ".pgm" else "RGB", (20, 20), "white").save(tmp_path / f"a{suffix}")
        assert decode(tmp_path / f"a{suffix}").min() == 255
        assert kinds.get(suffix, suffix[1:].upper()) in FORMATS


def test_the_photographs_of_a_phone_are_read(tmp_path):
    """Two pictures in one file, which Pillow calls MPO."""
    Image.new("RGB", (20, 20), "red").save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (20, 20))]
    )
    assert decode(tmp_path / "a.jpg")[0, 0, 0] > 200


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_picture_that_says_it_is_huge_is_refused_before_it_is_decoded(tmp_path, decoder):
    (tmp_path / "a.png").write_bytes(png(60000, 60000))
    with pytest.raises(BadImage) as caught:
        DECODERS[decoder](tmp_path / "a.png")
    assert str(caught.value) == LARGE.format(60000, MAX_PIXELS)
    with pytest.raises(BadImage) as caught:
        decoder_of({"decode": decoder}, max_pixels=1024)(saved(tmp_path / "b.png", 33))
    assert str(caught.value) == LARGE.format(33, 1024)
    if decoder != "retina":  # which wants an eye in it
        assert decoder_of({"decode": decoder}, max_pixels=33**2)(saved(tmp_path / "b.png", 33)).shape == (
            33,
            33,
            3,
        )


def saved(path, side):
    Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(path)
    return path


def test_the_originals_of_a_dataset_are_bounded_too():
    for reader in (decode_rgb, decode_retina):
        with pytest.raises(
            BadImage, match=rf"^is 60000 x 60000 pixels, more than the {MAX_PIXELS} that are decoded"
        ):
            reader(png(60000, 60000))


def test_pillows_own_bound_stands_for_everybody_else(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    decode(saved(tmp_path / "a.png", 20), max_pixels=10**12)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("cut", [0, 1, 8, 20, 33, 40, 60])
def test_what_is_cut_is_refused_in_a_word(tmp_path, cut):
    content = saved(tmp_path / "a.png", 40).read_bytes()
    (tmp_path / "a.png").write_bytes(content[:cut])
    with pytest.raises(BadImage, match=r"^cannot be decoded \(.*\)$") as caught:
        decode(tmp_path / "a.png")
    assert str(tmp_path) not in str(caught.value)


def test_a_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    packed = zlib.compress(bytes(100_000_000), 9)
    body = b"zTXt" + b"Comment\0\0" + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    content = png(20, 20)
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(BadImage, match=r"^cannot be decoded \("):
        decode(tmp_path / "a.png")


def test_own_images_are_bounded_by_data_max_pixels(tmp_path):
    for name in "abcd":
        (tmp_path / "x" / ("one" if name < "c" else "two")).mkdir(parents=True, exist_ok=True)
        for split in range(10):
            saved(tmp_path / "x" / ("one" if name < "c" else "two") / f"{name}{split}.png", 40)
    saved(tmp_path / "x" / "one" / "large.png", 50)
    options = SIZES | {"root": str(tmp_path / "x"), "store_dir": str(tmp_path / "stores")}
    module = FolderDataModule(**options, max_pixels=1600)
    with pytest.raises(
        UserError, match=r"large\.png.*is 50 x 50 pixels, more than the 1600 that are decoded: if it is"
    ):
        _ = module.store
    assert module.preprocessing["max_pixels"] == 1600
    usual = FolderDataModule(**options)
    assert len(usual.store.labels) == 41
    assert "max_pixels" not in usual.preprocessing
    less = FolderDataModule(**options, max_pixels=1600, skip_bad=True)
    assert len(less.store.labels) == 40
    assert less.store_folder != usual.store_folder
