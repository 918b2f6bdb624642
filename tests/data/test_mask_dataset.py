import pickle

import numpy as np
import pytest
import torch

from helpers.miniatures.masks import COLOURS, png, quarters, write_masks
from visprompt.data.datasets import Ticket
from visprompt.data.mask_dataset import MaskDataset
from visprompt.data.masks import IGNORED
from visprompt.data.sources.mask_folders import find_masks
from visprompt.data.stores.masked import open_masks

PLAIN = {"size": 32, "short_side": 32, "seed": 0, "scale": (0.5, 2.0), "flip": 0.5, "jitter": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    return open_masks(find_masks(write_masks(folder / "own", 10)), folder / "store")


def data(store, **options):
    rows = np.arange(len(store.keys))
    return MaskDataset(store, rows, **PLAIN | {"fill": (0.5, 0.5, 0.5)} | options)


def ticket(row, epoch=0, repeat=0):
    return Ticket(row, epoch, 1.0, 1.0, repeat)


def shown(images):
    """Classes, int64 [b, h, w], that the colours of the pixels tell, and how far the nearest colour is off."""
    colours = torch.tensor(COLOURS[:3]).float()
    distance = (images.float()[:, None] - colours[None, :, :, None, None]).abs().amax(2)
    return distance.argmin(1), distance.amin(1)


@pytest.mark.parametrize("changes", [{}, {"scale": None, "flip": 1.0}, {"scale": (1.0, 1.0), "flip": 0.0}])
def test_the_mask_moves_with_the_image(store, changes):
    dataset = data(store, **changes)
    for epoch in range(4):
        batch = dataset.__getitems__([ticket(row, epoch) for row in range(10)])
        assert batch.images.shape == (10, 3, 32, 32)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.shape == (10, 32, 32)
        assert batch.labels.dtype == torch.uint8
        classes, off = shown(batch.images)
        clear = (off < 8) & (batch.labels != IGNORED)  # neither an edge nor padding
        assert clear.float().mean() > 0.4
        # nearest labels and filtered colours differ by a pixel at edges
        assert (classes == batch.labels)[clear].float().mean() > 0.99


def test_changes_depend_on_seed_epoch_row_and_repetition_alone(store):
    dataset = data(store, jitter=True)
    torch.manual_seed(1)
    together = dataset.__getitems__([ticket(row) for row in range(4)])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    alone = dataset.__getitems__([ticket(2)])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert torch.equal(together.images[2], alone.images[0])
    assert torch.equal(together.labels[2], alone.labels[0])
    part = dataset.subset(np.array([5, 2]))
    assert torch.equal(part.__getitems__([ticket(1)]).images, alone.images)
    worker = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(worker.__getitems__([ticket(2)]).images, alone.images)
    for other in (ticket(2, epoch=1), ticket(2, repeat=1)):
        assert not torch.equal(dataset.__getitems__([other]).images, alone.images)
    assert not torch.equal(data(store, jitter=True, seed=1).__getitems__([ticket(2)]).images, alone.images)


def test_jitter_changes_colours_and_not_labels(store):
    plain, changed = (data(store, jitter=jitter).__getitems__([ticket(1)]) for jitter in (False, True))
    assert torch.equal(plain.labels, changed.labels)
    assert not torch.equal(plain.images, changed.images)


def test_without_scale_flip_and_jitter_the_centre_is_taken(store):
    dataset = data(store, scale=None, flip=0.0)
    batch = dataset.__getitems__([ticket(0)])
    whole = torch.from_numpy(store.mask(0).copy())  # 48 x 64, resized to 32 x 43
    rows = ((torch.arange(32) + 0.5) * 48 / 32).long()
    columns = ((torch.arange(6, 38) + 0.5) * 64 / 43).long()
    assert torch.equal(batch.labels[0], whole[rows][:, columns].long())
    assert torch.equal(batch.images, dataset.__getitems__([ticket(0, epoch=7)]).images)


@pytest.mark.parametrize("scale", [None, (0.5, 0.5)])
def test_what_a_small_image_lacks_is_of_the_mean_colour_and_ignored(store, scale):
    dataset = data(store, short_side=16, scale=scale, flip=0.0, fill=(0.2, 0.4, 0.6))
    batch = dataset.__getitems__([ticket(0)])
    outside = (batch.images[0] == torch.tensor([51, 102, 153])[:, None, None]).all(0)
    assert outside.sum() > 32 * 8
    assert (batch.labels[0][outside] == IGNORED).all()
    height = 16 if scale is None else 8
    assert (batch.labels[0] != IGNORED).any(1).sum() == height


def test_a_crop_that_one_class_fills_is_drawn_again(tmp_path):
    root = write_masks(tmp_path / "own", 10, size=(64, 64))
    values = np.zeros((64, 64), np.int64)
    values[28:36] = 1  # a band: most crops of a quarter have more than 75 % of class 0
    for path in (root / "masks").iterdir():
        path.write_bytes(png(values))
    dataset = data(open_masks(find_masks(root), tmp_path / "store"), size=20, short_side=64, scale=(1.0, 1.0))
    batch = dataset.__getitems__([ticket(row, epoch) for row in range(10) for epoch in range(10)])
    share = (batch.labels == 0).float().mean((1, 2))
    assert (share <= 0.75).float().mean() > 0.9  # a single draw has it in 18 % of the crops


def test_evaluation_gives_the_whole_image_in_its_size(store):
    batch = data(store).__getitems__([Ticket(3, None, 1.0)])
    assert torch.equal(batch.images[0], torch.from_numpy(store.image(3).transpose(2, 0, 1).copy()))
    assert torch.equal(batch.labels[0], torch.from_numpy(store.mask(3).copy()).long())
    assert batch.rows.tolist() == [3]
    assert data(store).labels.tolist() == [0] * 10


def test_quarters_are_quarters():
    assert quarters([1, 2, 3, 4], 4, 4)[[0, 0, 2, 2], [0, 2, 0, 2]].tolist() == [1, 2, 3, 4]
