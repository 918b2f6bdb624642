from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from visprompt.data.datasets import ArrayDataset, RaggedDataset, Ticket, as_is
from visprompt.data.sampler import GlobalBatches


@dataclass
class Plain:
    """Images in memory whose pixels tell their place.

    Red is the line, green the column, blue the row of the store.
    """

    labels: np.ndarray
    keys: tuple[str, ...] = ("k0", "k1", "k2", "k3")
    released: int = 0

    def release(self):
        self.released += 1

    def image(self, row):
        image = np.zeros((20 + row, 30, 3), np.uint8)
        image[..., 0] = np.arange(20 + row)[:, None]
        image[..., 1] = np.arange(30)
        image[..., 2] = row
        return image


def ragged(**options):
    given = {"size": 16, "seed": 5, "random_crop": True, "flip": 0.5, **options}
    return RaggedDataset(Plain(np.array([3, 1, 4, 1])), np.array([3, 0, 2]), **given)


def test_an_array_answers_tickets_in_their_order():
    images = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
    dataset = ArrayDataset(images, np.array([5, 6, 7, 8]), list("abcd"))
    batch = dataset.__getitems__([Ticket(2, None, 1.0), Ticket(0, None, 0.5)])
    assert torch.equal(batch.images, torch.from_numpy(images[[2, 0]]))
    assert batch.labels.tolist() == [7, 5]
    assert batch.rows.tolist() == [2, 0]
    assert batch.weights.tolist() == [1.0, 0.5]
    kinds = [torch.uint8, torch.int64, torch.int64, torch.float32, torch.float32]
    assert [tensor.dtype for tensor in batch] == kinds
    batch.images.zero_()
    assert images.any()


def test_a_memory_map_answers_too(tmp_path):
    images = np.memmap(tmp_path / "pixels", np.uint8, mode="w+", shape=(2, 3, 4, 4))
    images[1] = 9
    assert ArrayDataset(images, np.array([0, 1]), ["0", "1"])[
        Ticket(1, None, 1.0)
    ].images.unique().tolist() == [9]


def test_evaluation_takes_the_middle():
    batch = ragged().__getitems__([Ticket(row, None, 1.0) for row in range(3)])
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.labels.tolist() == [1, 3, 4]
    assert batch.images[:, 2, 0, 0].tolist() == [3, 0, 2]
    assert batch.images[:, 1, 0, 0].tolist() == [7, 7, 7]
    assert batch.images[1, 0, 0, 0] == 2


def test_training_views_depend_on_seed_epoch_and_row_only():
    def view(dataset, row, epoch):
        return dataset[Ticket(row, epoch, 1.0)].images[0]

    dataset = ragged()
    together = dataset.__getitems__([Ticket(row, 1, 1.0) for row in (2, 1, 0)]).images
    for place, row in enumerate((2, 1, 0)):
        assert torch.equal(together[place], view(ragged(), row, 1))
    other_epochs = [view(dataset, 0, epoch) for epoch in range(8)]
    assert len({tuple(image.flatten().tolist()) for image in other_epochs}) > 4
    assert not torch.equal(view(dataset, 0, 1), view(ragged(seed=6), 0, 1))


def test_crops_reach_every_place_and_flips_mirror():
    dataset = ragged(flip=0.5)
    images = [dataset[Ticket(1, epoch, 1.0)].images[0].int() for epoch in range(300)]
    tops = {int(image[0, 0, 0]) for image in images}
    mirrored = [image for image in images if image[1, 0, 0] > image[1, 0, -1]]
    lefts = {int(image[1, 0].min()) for image in images}
    assert tops == set(range(5))
    assert lefts == set(range(15))
    assert 110 < len(mirrored) < 190


def test_without_crop_and_flip_training_equals_evaluation():
    dataset = ragged(random_crop=False, flip=0.0)
    assert torch.equal(dataset[Ticket(0, 7, 1.0)].images, dataset[Ticket(0, None, 1.0)].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_what_is_seen(workers):
    dataset = ragged()
    batches = GlobalBatches(num_rows=3, batch_size=2, seed=1, epoch=lambda: 4, training=True)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=as_is, num_workers=workers)
    seen = list(loader)
    assert len(seen) == 2
    for batch, tickets in zip(seen, batches, strict=True):
        assert torch.equal(batch.images, dataset.__getitems__(tickets).images)


def test_subsets_keep_labels_keys_and_views():
    dataset = ragged()
    part = dataset.subset(np.array([2, 0]))
    assert part.labels.tolist() == [4, 1]
    assert part.keys == ["k2", "k3"]
    assert torch.equal(part[Ticket(0, 3, 1.0)].images, dataset[Ticket(2, 3, 1.0)].images), (
        "crops go with the image"
    )
    images = np.arange(3 * 3 * 2 * 2, dtype=np.uint8).reshape(3, 3, 2, 2)
    array = ArrayDataset(images, np.array([5, 6, 7]), ["a", "b", "c"]).subset(np.array([2]))
    assert (array.labels.tolist(), array.keys, array.images.tolist()) == ([7], ["c"], [images[2].tolist()])


def test_memory_is_let_go_once_per_batch():
    dataset = ragged()
    dataset.__getitems__([Ticket(row, None, 1.0) for row in range(3)])
    assert dataset.store.released == 1
