"""Sliding windows over images of any size."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import tiny_model
from visprompt.errors import UserError
from visprompt.models.api import build
from visprompt.models.windows import places, slide


def images(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("length", "window", "expected"),
    [
        (683, 512, [0, 171]),  # mmsegmentation's windows of 512 at a stride of 341
        (853, 512, [0, 341]),
        (854, 512, [0, 341, 342]),
        (512, 512, [0]),
        (2048, 512, [0, 341, 682, 1023, 1364, 1536]),
        (500, 480, [0, 20]),
    ],
)
def test_windows_stand_two_thirds_of_their_size_apart_and_the_last_ends_with_the_image(
    length, window, expected
):
    assert places(length, window) == expected


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 100), (150, 64), (90, 141)])
def test_windows_of_a_network_of_single_pixels_are_one_whole_pass(height, width):
    calls = []

    def network(x):
        calls.append(len(x))
        assert x.shape[-2:] == (64, 64)
        return torch.cat([x, x.square()], dim=1)

    x = images(height, width)
    torch.testing.assert_close(slide(network, x, 64, 64), torch.cat([x, x.square()], dim=1))
    assert sum(calls) == 2 * len(places(height, 64)) * len(places(width, 64))
    assert max(calls) <= 8


def test_logits_of_a_pixel_are_the_mean_of_its_windows():
    def network(x):  # gives each window the value of its first pixel
        return x[:, :1, :1, :1].expand(-1, 1, 6, 6)

    x = torch.arange(8.0).expand(1, 3, 6, 8)
    row = slide(network, x, 6, 6)[0, 0, 3]  # windows at 0 and 2
    assert row.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_an_image_smaller_than_a_window_is_padded_with_zeros():
    seen = []

    def network(x):
        seen.append(x)
        return x

    x = images(20, 40)
    torch.testing.assert_close(slide(network, x, 32, 32), x)
    torch.testing.assert_close(torch.cat(seen)[:2], F.pad(x[..., :32], (0, 0, 0, 12)))


def test_a_classifier_of_pixels_takes_images_of_any_size_in_evaluation_only():
    classifier = build(tiny_model(), "vpt_deep", 4, kind="segmentation", num_tokens=2).eval()
    x = images(32, 50)
    with torch.no_grad():
        logits = classifier(x)
        first, second = classifier(x[..., :32]), classifier(x[..., 18:])
    assert logits.shape == (2, 4, 32, 50)
    torch.testing.assert_close(logits[..., :18], first[..., :18])
    torch.testing.assert_close(logits[..., 18:32], (first[..., 18:] + second[..., :14]) / 2)
    torch.testing.assert_close(logits[..., 32:], second[..., 14:])
    with pytest.raises(UserError, match="images of size 32 x 32 only and got 32 x 50"):
        classifier.train()(x)
