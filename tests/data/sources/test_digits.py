from hashlib import sha256

import numpy as np
import pytest
from scipy.ndimage import distance_transform_cdt

from visprompt.data.catalog import SUITES, TASKS
from visprompt.data.sources.digits import _neighbour, compose, split_rows
from visprompt.errors import UserError

# sha256 over pixels and labels (little-endian int64) of train800, val200, test, one after the other.
GOLDEN = {
    "digits": "6fa78a3629735a66f498c39a501c89f24703eb8be4300123d8515e760760aec9",
    "digits_crowded": "2feff5be43bb4868b326bcb2e3cd0633b93e4417954375e5af58a6b5f152fa24",
    "digits_loc": "e4060b7eb9306d02a312b514bcd969dfedcfedaf36639de26a2c378ed7053504",
    "digits_masks": "3b4b399004d484ef14eac56e42637e91edb4e0a42261646ebe9d2154864f9523",
}


@pytest.mark.parametrize("task", GOLDEN)
def test_pixels_and_labels_never_change(task):
    digest = sha256()
    for split_set, size in TASKS[task].split_sizes.items():
        images, labels, keys = compose(task, split_set)
        assert images.shape == (size, 3, 64, 64)
        assert images.dtype == np.uint8
        assert len(keys) == len(labels) == size
        assert set(labels.ravel().tolist()) == set(range(TASKS[task].num_classes))
        digest.update(images.tobytes())
        digest.update(labels.astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN[task]


def test_rows_are_dealt_once_in_md5_order():
    assert split_rows("train800")[:5] == (1680, 1456, 499, 837, 1647)
    rows = [row for split_set in ("train800", "val200", "test") for row in split_rows(split_set)]
    assert sorted(rows) == list(range(1797))


@pytest.mark.parametrize("side", ["left", "right"])
def test_neighbours_are_others_of_the_same_set(side):
    rows = split_rows("val200")
    picked = [_neighbour(rows, place, side) for place in range(200)]
    assert set(picked) <= set(rows)
    assert all(row != other for row, other in zip(rows, picked, strict=True))
    assert len(set(picked)) > 100


def test_crowded_halves_come_from_whole_digits():
    images, _, keys = compose("digits_crowded", "val200")
    rows = [int(key) for key in keys]
    middle = {row: image[0, 16:48, 16:48] for row, image in zip(rows, images, strict=True)}
    left = middle[_neighbour(tuple(rows), 7, "left")]
    right = middle[_neighbour(tuple(rows), 7, "right")]
    assert np.array_equal(images[7, 0, 16:48, :16], left[:, 16:])
    assert np.array_equal(images[7, 0, 16:48, 48:], right[:, :16])
    assert not images[:, :, :16].any()
    assert not images[:, :, 48:].any()


def test_the_located_scan_is_in_its_cell_only():
    images, labels, _ = compose("digits_loc", "val200")
    light = images[:, 0].reshape(200, 4, 16, 4, 16).sum(axis=(2, 4), dtype=np.int64).reshape(200, 16)
    assert np.array_equal(light.argmax(axis=1), labels)
    assert np.array_equal((light > 0).sum(axis=1), np.ones(200))


def test_the_mask_is_the_digit_in_the_middle_of_a_crowded_image():
    images, labels, keys = compose("digits_masks", "val200")
    crowded, digits, rows = compose("digits_crowded", "val200")
    assert SUITES["demo"] == ("digits", "digits_crowded", "digits_loc"), "whose scores can be averaged"
    assert np.array_equal(images, crowded)
    assert keys == rows
    assert labels.shape == (200, 64, 64)
    middle, inked = labels[:, 16:48, 16:48], images[:, 0, 16:48, 16:48] >= 48
    assert not labels.sum() - middle.sum(), "background around it"
    for found, ink, digit in zip(middle, inked, digits, strict=True):
        assert set(found.ravel().tolist()) == {0, digit + 1}
        assert (found[ink] == digit + 1).all()
        far = distance_transform_cdt(~ink, metric="chessboard")
        assert np.array_equal(found > 0, far <= 3)


def test_unknown_names():
    with pytest.raises(UserError, match="unknown demo task 'digit': did you mean digits"):
        compose("digit", "test")
    with pytest.raises(UserError, match="unknown split set 'val': did you mean val200"):
        compose("digits", "val")
