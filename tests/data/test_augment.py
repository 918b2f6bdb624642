"""Augmentation is torchvision's, and is drawn from seed, epoch and image alone."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from visprompt.data.augment import Augmentation, check
from visprompt.data.datasets import ArrayDataset, AugmentedDataset, RaggedDataset, Ticket, as_is
from visprompt.data.sampler import GlobalBatches
from visprompt.errors import UserError

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
NAMED = {"light": lambda: v2.ColorJitter(0.2, 0.2, 0.2), "randaugment": lambda: v2.RandAugment(2, 9)}


@dataclass
class Stored:
    """Images in memory."""

    labels: np.ndarray
    keys: tuple[str, ...] = ("a", "b", "c", "d")

    def image(self, row):
        return COLOURS[row]

    def release(self):
        pass


def ragged(choice="light", **options):
    given = {"size": 24, "seed": 5, "random_crop": True, "flip": 0.5, **options}
    rows = np.array([3, 0, 2])
    return RaggedDataset(Stored(np.arange(4)), rows, **given, augmentation=Augmentation(choice))


def square(choice="light"):
    images = np.ascontiguousarray(COLOURS[:, :32, :32].transpose(0, 3, 1, 2))
    return AugmentedDataset(ArrayDataset(images, np.arange(4), "abcd"), Augmentation(choice), seed=5)


@pytest.mark.parametrize("choice", NAMED)
def test_a_view_is_torchvisions_crop_flip_and_change_with_the_seeds_of_the_image(choice):
    for epoch in range(6):
        draw = np.random.default_rng([5, epoch, 3])
        mirrors = draw.random(3)[2] < 0.5
        torch.manual_seed(int(draw.integers(2**32)))
        view = v2.RandomResizedCrop(24, scale=(0.5, 1.0))(torch.from_numpy(COLOURS[3]).permute(2, 0, 1))
        view = v2.functional.hflip(view) if mirrors else view
        torch.manual_seed(int(draw.integers(2**32)))
        expected = NAMED[choice]()(view)
        assert torch.equal(ragged(choice)[Ticket(0, epoch, 1.0)].images[0], expected), epoch


@pytest.mark.parametrize("dataset", [ragged, square])
def test_views_depend_on_seed_epoch_row_and_repetition_only(dataset):
    tickets = [Ticket(row, 1, 1.0) for row in (2, 1, 0)]
    together = dataset().__getitems__(tickets).images
    for place, ticket in enumerate(tickets):
        assert torch.equal(together[place], dataset()[ticket].images[0])
    part = dataset().subset(np.array([2, 0]))
    assert torch.equal(part[Ticket(0, 1, 1.0)].images[0], together[0]), "it goes with the image"
    others = [Ticket(2, 1, 1.0, repeat=1), Ticket(2, 1, 1.0, repeat=2), Ticket(2, 2, 1.0)]
    views = [together[0], *(dataset()[ticket].images[0] for ticket in others)]
    assert len({view.numpy().tobytes() for view in views}) == 4


@pytest.mark.parametrize("dataset", [ragged, square])
def test_evaluation_is_not_augmented(dataset):
    tickets = [Ticket(row, None, 1.0) for row in range(3)]
    images = dataset().__getitems__(tickets).images.numpy()
    middle = COLOURS[[3, 0, 2], 8:32, 18:42] if dataset is ragged else COLOURS[:3, :32, :32]
    assert np.array_equal(images, middle.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_what_is_seen(workers):
    batches = GlobalBatches(num_rows=3, batch_size=2, seed=1, epoch=lambda: 4, training=True)
    loader = DataLoader(ragged("randaugment"), batch_sampler=batches, collate_fn=as_is, num_workers=workers)
    for batch, tickets in zip(loader, batches, strict=True):
        assert torch.equal(batch.images, ragged("randaugment").__getitems__(tickets).images)


def test_the_middle_and_no_flip_leave_only_the_change():
    dataset = ragged("light", random_crop=False, flip=0.0)
    draw = np.random.default_rng([5, 7, 3])
    draw.random(3)
    torch.manual_seed(int(draw.integers(2**32)))
    middle = torch.from_numpy(COLOURS[3, 8:32, 18:42]).permute(2, 0, 1)
    expected = v2.ColorJitter(0.2, 0.2, 0.2)(middle)
    assert torch.equal(dataset[Ticket(0, 7, 1.0)].images[0], expected)


def states():
    return str((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()))  # noqa: NPY002


class Noise(torch.nn.Module):
    """Draws from every generator that a transform may use."""

    def forward(self, image):
        noise = [float(torch.rand(())), random.random(), float(np.random.random())]  # noqa: NPY002
        return image.clone().fill_(int(255 * noise[len(image) % 3]))


class Other(torch.nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, image):
        return self.result


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_module_of_the_user_draws_from_seeded_generators_which_are_restored(channels):
    image = np.zeros((channels, 4, 4), np.uint8)
    before = states()
    one, two = (Augmentation(Noise()).changed(image, np.random.default_rng(3)) for _ in range(2))
    assert states() == before
    assert np.array_equal(one, two)
    assert not np.array_equal(one, Augmentation(Noise()).changed(image, np.random.default_rng(4)))


@pytest.mark.parametrize(
    ("result", "form"),
    [
        (torch.zeros(3, 24, 24), r"torch.float32 \[3, 24, 24\]"),
        (torch.zeros(3, 24, 23, dtype=torch.uint8), r"torch.uint8 \[3, 24, 23\]"),
        ("no image", "str"),
    ],
)
def test_a_module_that_returns_something_else_is_refused(result, form):
    sentence = (
        rf"^data.augment=Other returns {form} for an image that is torch.uint8 \[3, 24, 24\]: return an image of "
        "the same type and shape$"
    )
    with pytest.raises(UserError, match=sentence):
        ragged(Other(result))[Ticket(0, 1, 1.0)]


def test_only_known_names_and_modules_are_a_choice():
    for choice in ("none", "light", "randaugment", Noise()):
        check(choice)
    with pytest.raises(UserError, match=r"unknown data\.augment 'ligth': did you mean light"):
        check("ligth")
