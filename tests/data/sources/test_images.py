import numpy as np
import pytest
from PIL import Image

from helpers.miniatures import write_folder
from visprompt.data.sources.images import BadImage, decode


def gradient(height=20, width=30):
    """A picture whose top left corner is dark and whose red grows to the right, green downwards."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 240, width)
    image[..., 1] = np.linspace(0, 240, height)[:, None]
    return image


def test_grey_is_repeated_and_16_bits_are_scaled(tmp_path):
    Image.fromarray(gradient()[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(decode(tmp_path / "grey.png"), np.repeat(gradient()[..., :1], 3, axis=2))
    deep = gradient()[..., 0].astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(decode(tmp_path / name), np.repeat(gradient()[..., :1], 3, axis=2))


def test_one_bit(tmp_path):
    Image.fromarray(gradient()[..., 0] > 100).save(tmp_path / "bit.png")
    assert np.array_equal(decode(tmp_path / "bit.png")[..., 1], np.where(gradient()[..., 0] > 100, 255, 0))


def test_transparency_lies_over_white(tmp_path):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:10] = 0
    expected = np.where(alpha == 0, 255, gradient())
    image = Image.fromarray(np.concatenate([gradient(), alpha], axis=2))
    image.save(tmp_path / "alpha.PNG")
    assert np.array_equal(decode(tmp_path / "alpha.PNG"), expected)
    image.convert("LA").save(tmp_path / "la.png")
    assert (decode(tmp_path / "la.png")[:10] == 255).all()
    palette = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8)[:, None], 20, axis=1).repeat(10, axis=0))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=0)
    pixels = decode(tmp_path / "palette.png")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[19, 0].tolist() == [0, 0, 255]


def test_cmyk(tmp_path):
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert np.abs(decode(tmp_path / "print.jpg").astype(int) - gradient()).max() < 12


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "turned.png"), np.rot90(gradient(), -1))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(tmp_path / name)[5, 5, 2] < 5 < 250 < decode(tmp_path / name)[5, 5, 0]


def test_files_that_are_no_images_say_why(tmp_path):
    write_folder(tmp_path, ("a",), 1, size=(40, 15))
    with pytest.raises(BadImage, match=r"^is 40 x 15 pixels, less than 16 on the short side$"):
        decode(tmp_path / "a" / "0000.png")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(BadImage, match=r"^cannot be decoded \(not an image of a known format\)$"):
        decode(tmp_path / "text.jpg")
    Image.fromarray(gradient(200, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(BadImage, match=r"cannot be decoded .*truncated"):
        decode(tmp_path / "cut.jpg")
    Image.fromarray(gradient()[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImage, match="floating-point"):
        decode(tmp_path / "float.tif")
    Image.fromarray(gradient()[..., 0].astype(np.int32) * 1000).save(tmp_path / "wide.tif")
    with pytest.raises(
        BadImage, match=r"has integer pixels above 65535: set data.white_level to the value of white"
    ):
        decode(tmp_path / "wide.tif")
    with pytest.raises(BadImage, match=r"^cannot be decoded \(No such file or directory\)$"):
        decode(tmp_path / "gone.png")
