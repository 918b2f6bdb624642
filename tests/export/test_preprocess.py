"""What the graph makes of a picture is what the evaluation of a run makes of it, bit for bit."""

import numpy as np
import pytest
import torch

from helpers.exported import IMAGES
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.export.preprocess import Preprocess

SIDES = [(32, 32), (28, 28), (31, 57), (100, 64), (300, 201), (7, 9), (33, 500), (37, 50), (3, 2), (1, 1)]
SETTINGS = [
    {},
    {"interpolation": "bicubic"},
    {"resampling": "tf1"},
    {"resampling": "tf2"},
    {"resampling": "tf2", "interpolation": "bicubic"},
    {"resampling": "tf1", "native": 28},
    {"resize": "short_side", "short_side": 37},
    {"resize": "short_side", "short_side": 37, "interpolation": "bicubic"},
    {"resize": "short_side", "short_side": 37, "resampling": "tf2"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [32, 33])
def test_pictures_of_any_size_become_the_same_input(settings, size):
    preprocessing = IMAGES | {"size": size} | settings
    module, draw = Preprocess(preprocessing), np.random.default_rng(0)
    for height, width in SIDES:
        picture = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        got = module(torch.from_numpy(picture)[None])[0]
        assert torch.equal(got, to_input(picture, preprocessing)), (height, width)


def test_a_batch_is_prepared_as_its_pictures_are():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 51, 3), dtype=np.uint8)
    got = Preprocess(IMAGES)(torch.from_numpy(pictures))
    assert torch.equal(got, torch.stack([to_input(picture, IMAGES) for picture in pictures]))


def test_a_state_that_says_too_little_is_refused():
    old = {name: value for name, value in IMAGES.items() if name != "resampling"}
    with pytest.raises(UserError, match="the tuned state does not say its resampling: an older version"):
        Preprocess(old)
