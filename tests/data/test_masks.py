import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.miniatures.masks import png
from visprompt.data.masks import decode_mask, encode_mask
from visprompt.data.sources.images import BadImage

VALUES = np.arange(16 * 20).reshape(16, 20) % 256


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["P", "L"])
def test_indices_and_grey_values_are_the_classes(mode, tmp_path):
    assert np.array_equal(decode_mask(png(VALUES, mode)), VALUES)
    (tmp_path / "mask.png").write_bytes(png(VALUES, mode))
    assert decode_mask(tmp_path / "mask.png").dtype == np.uint8


def test_a_bilevel_mask_has_0_and_1():
    assert np.array_equal(decode_mask(png(VALUES % 2, "1")), VALUES % 2)


def test_labels_survive_their_png():
    assert np.array_equal(decode_mask(encode_mask(VALUES.astype(np.uint8))), VALUES)


def test_16_bits_are_read_up_to_255():
    assert np.array_equal(decode_mask(encoded(Image.fromarray(VALUES.astype(np.uint16)))), VALUES)
    with pytest.raises(BadImage, match=r"^has the value 300, and masks have values from 0 to 255$"):
        decode_mask(encoded(Image.fromarray((VALUES % 100 + 201).astype(np.uint16))))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_refused(mode):
    with pytest.raises(
        BadImage,
        match=rf"^has colours \(Pillow's mode {mode}\) and not one number for each pixel: save it as an "
        "indexed or grey image of 8 bits, in which the number of a pixel is its class$",
    ):
        decode_mask(encoded(Image.new(mode, (20, 20))))


def test_damage_and_size_are_refused():
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode_mask(png(VALUES)[:60])
    with pytest.raises(BadImage, match="is 20 x 16 pixels, more than the 319 that are decoded"):
        decode_mask(png(VALUES), max_pixels=319)


@pytest.mark.parametrize(
    ("bits", "row", "expected"), [(4, b"\x01\x2f", [0, 1, 2, 15]), (2, b"\x1b", [0, 1, 2, 3])]
)
def test_grey_masks_of_few_bits_have_the_numbers_of_their_files(bits, row, expected):
    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    assert decode_mask(file).tolist() == [expected]
