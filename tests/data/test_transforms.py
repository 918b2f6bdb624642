import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from helpers.resizing import tensorflow
from visprompt.data.transforms import (
    center_crop,
    check_resizing,
    in_present_words,
    mean_and_std,
    normalise,
    resize,
    resize_short_side,
    squash,
    to_input,
)
from visprompt.errors import UserError


def test_normalise_scales_shifts_and_divides():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    result = normalise(images, 4, (0.5, 0.1, 0.0), (0.5, 0.1, 2.0))
    assert result.dtype == torch.float32
    assert result[0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, 0.5])


def test_normalise_squashes_other_sizes():
    images = torch.arange(3 * 8 * 12, dtype=torch.uint8).view(1, 3, 8, 12)
    expected = F.interpolate(images.float(), (4, 4), mode="bilinear", antialias=True)
    result = 255 * normalise(images, 4, [0.0] * 3, [1.0] * 3)
    assert torch.equal(result, result.round()), "Pillow's values are whole"
    assert (result - expected).abs().max() <= 1.01, "Pillow rounds after each of two passes"


def test_center_crop_of_odd_margins():
    image = np.arange(7)[:, None, None] * np.ones((1, 6, 3), np.int64)
    assert center_crop(image, 4)[:, 0, 0].tolist() == [2, 3, 4, 5]


def test_prediction_squashes_or_crops_as_the_run_did():
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    given = {"size": 16, "short_side": None, "resize": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    given |= {"interpolation": "bilinear", "resampling": "pillow", "native": None}
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    assert torch.equal(to_input(image, given), normalise(planes, 16, [0.5] * 3, [0.5] * 3)[0])
    cropped = to_input(image[:30, :30], {**given, "resize": "short_side", "short_side": 30})
    middle = planes[:, :, 7:23, 7:23]
    assert torch.equal(cropped, normalise(middle, 16, [0.5] * 3, [0.5] * 3)[0])


def test_a_state_that_does_not_say_how_is_refused():
    image = np.zeros((4, 4, 3), np.uint8)
    given = {"size": 4, "resize": "squash", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    with pytest.raises(
        UserError, match=r"the tuned state does not say its resampling: an older version wrote it, tune"
    ):
        to_input(image, given)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (300, 200), (1, 5), (224, 28), (51, 224), (411, 37)])
def test_antialiased_resizing_is_pillow_s_bit_for_bit(interpolation, shape):
    draw = np.random.default_rng(0)
    extremes = draw.choice(np.array([0, 255], np.uint8), (1, 3, *shape))  # where a cubic filter overshoots
    images = np.concatenate([extremes, draw.integers(0, 256, (3, 3, *shape), np.uint8)])
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = [np.asarray(Image.fromarray(i.transpose(1, 2, 0)).resize((224, 224), method)) for i in images]
    found = resize(torch.from_numpy(images), 224, interpolation, resampling="pillow")
    assert np.array_equal(found.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    assert np.array_equal(
        squash(images[0].transpose(1, 2, 0), 224, interpolation, "pillow"), found[0].numpy()
    )


@pytest.mark.parametrize("resampling", ["tf1", "tf2"])
@pytest.mark.parametrize("shape", [(8, 8), (33, 50), (20, 7), (24, 24), (1, 1), (1, 9), (75, 1), (375, 1242)])
def test_bilinear_without_antialias_is_tensorflow_s(shape, resampling):
    """At up- and downscaling, odd sizes and sides of one pixel; 375 x 1242 is a photograph of KITTI."""
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    expected = tensorflow(image, 24, half_pixel_centres=resampling == "tf2")
    found = resize(torch.from_numpy(image)[None, None], 24, "bilinear", resampling)[0, 0].numpy()
    assert np.abs(found - expected).max() < 1e-3
    stored = squash(image[:, :, None], 24, "bilinear", resampling)[0]
    assert np.abs(stored - expected).max() <= 0.5 + 1e-3, "a store is within half a step of 1/255"


def test_an_image_of_one_pixel_and_a_result_of_one():
    image = torch.tensor([[7, 9], [1, 3]], dtype=torch.uint8)[None, None]
    assert resize(image[..., :1, :1], 3, "bilinear", "tf1").unique().tolist() == [7]
    assert resize(image, 1, "bilinear", "tf1").item() == 7, "the first pixel"
    assert resize(image, 1, "bilinear", "tf2").item() == 5, "the mean of the two in the middle"


def test_tensorflow_1_shifts_an_enlarged_image():
    """From 32 to 224 pixels by (224 / 32 - 1) / 2 = 3 output pixels, where nothing runs over the edge."""
    image = torch.randint(
        0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    one, two = (resize(image, 224, "bilinear", way) for way in ("tf1", "tf2"))
    assert torch.allclose(one[..., :-6, :-6], two[..., 3:-3, 3:-3], atol=1e-3)
    assert 25 < (one - two).abs().mean() < 45, "measured against TensorFlow: 36 of 255 on noise"


@pytest.mark.parametrize(
    ("interpolation", "resampling"), [("bilinear", "tf1"), ("bilinear", "tf2"), ("bicubic", "tf2")]
)
def test_the_short_side_without_antialias_is_tensorflow_s_too(interpolation, resampling):
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    square = resize(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], 24, interpolation, resampling)
    found = resize_short_side(image, 24, interpolation, resampling)
    assert np.array_equal(found, square[0].round().numpy().transpose(1, 2, 0))
    assert not np.array_equal(found, resize_short_side(image, 24, interpolation))
    assert resize_short_side(image[:40], 20, interpolation, resampling).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("bilnear", "tf1"), "unknown interpolation 'bilnear': did you mean bilinear"),
        (("bilinear", "tf"), "unknown resampling 'tf': did you mean tf2 or tf1"),
        (
            ("bicubic", "tf1"),
            "^resampling=tf1 is bilinear only: give interpolation=bilinear, or resampling=pillow",
        ),
    ],
)
def test_a_way_of_resizing_that_is_not_there_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        check_resizing(*given)


@pytest.mark.parametrize(("given", "word"), [(True, "pillow"), (False, "tf2")])
def test_what_earlier_versions_wrote_is_read_in_present_words(given, word):
    assert in_present_words({"size": 4, "antialias": given}) == {"size": 4, "resampling": word}
    assert in_present_words({"resampling": "tf1"}) == {"resampling": "tf1"}


def test_half_pixel_centres_by_hand():
    """Two pixels made four: new centres lie at -1/4, 1/4, 3/4 and 5/4 of the old ones."""
    image = torch.tensor([[0, 200]], dtype=torch.uint8).view(1, 1, 1, 2)
    assert resize(image, 4, "bilinear", resampling="tf2")[0, 0, 0].tolist() == [0.0, 50.0, 150.0, 200.0]


def test_shrinking_without_antialias_reads_the_nearest_pixels_only():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., ::4] = 255  # every fourth column: seen with antialias, not between
    assert resize(image, 2, "bilinear", resampling="tf2").max() == 0
    assert resize(image, 2, "bilinear", resampling="pillow").min() > 0


def test_one_channel_is_repeated():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert normalise(image, 2, [0.0] * 3, [1.0, 0.5, 0.25])[0, :, 0, 1].tolist() == [1.0, 2.0, 4.0]


def test_normalisations():
    model = ([0.1] * 3, [0.2] * 3)
    assert mean_and_std("none", model) == ((0.0,) * 3, (1.0,) * 3)
    assert mean_and_std("inception", model) == ((0.5,) * 3, (0.5,) * 3)
    assert mean_and_std("imagenet", model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert mean_and_std("model", model) == ((0.1,) * 3, (0.2,) * 3)
    with pytest.raises(UserError, match="unknown normalisation 'image_net': did you mean imagenet"):
        mean_and_std("image_net", model)
