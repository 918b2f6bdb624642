import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visprompt.data.pixels import center_crop, normalise, to_input


def test_normalise_scales_shifts_and_divides():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    result = normalise(images, 4, (0.5, 0.1, 0.0), (0.5, 0.1, 2.0))
    assert result.dtype == torch.float32
    assert result[0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, 0.5])


def test_normalise_squashes_other_sizes():
    images = torch.arange(3 * 8 * 12, dtype=torch.uint8).view(1, 3, 8, 12)
    expected = F.interpolate(images.float() / 255, (4, 4), mode="bilinear", antialias=True)
    assert torch.allclose(normalise(images, 4, [0.0] * 3, [1.0] * 3), expected, rtol=0, atol=1e-7)


def test_center_crop_of_odd_margins():
    image = np.arange(7)[:, None, None] * np.ones((1, 6, 3), np.int64)
    assert center_crop(image, 4)[:, 0, 0].tolist() == [2, 3, 4, 5]


def test_prediction_squashes_or_crops_as_the_run_did():
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    given = {"size": 16, "short_side": None, "resize": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    assert torch.equal(to_input(image, given), normalise(planes, 16, [0.5] * 3, [0.5] * 3)[0])
    cropped = to_input(image[:30, :30], {**given, "resize": "short_side", "short_side": 30})
    middle = planes[:, :, 7:23, 7:23]
    assert torch.equal(cropped, normalise(middle, 16, [0.5] * 3, [0.5] * 3)[0])
