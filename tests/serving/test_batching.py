"""The queue: batches of many tasks, in order, of which a failure harms nobody else."""

import threading
from types import SimpleNamespace

import pytest
import torch

import visprompt
from helpers.service import write_state
from visprompt.models.backbones import DEMO
from visprompt.serving.batching import Batcher, answers
from visprompt.serving.metrics import Metrics
from visprompt.serving.pictures import Input

TASKS = [SimpleNamespace(name=name) for name in ("a", "b")]


def image(value):
    return torch.full((1,), float(value))


class Compute:
    """Doubles numbers, but not below 0, and waits until it may."""

    def __init__(self):
        self.batches, self.go, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, images, tasks):
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([float(x) for x in images])
        if any(x < 0 for x in images):
            raise ValueError("below 0")
        return [2 * x for x in images]


@pytest.fixture
def compute():
    return Compute()


@pytest.fixture
def batcher(compute):
    batcher = Batcher(compute, size=4, wait=0.0, metrics=Metrics())
    yield batcher
    compute.go.set()
    batcher.close()


def test_what_comes_while_a_batch_is_computed_is_the_next_batch(batcher, compute):
    first = batcher.submit(image(0), TASKS[0])
    assert compute.begun.wait(30)
    rest = [batcher.submit(image(i), TASKS[i % 2]) for i in range(1, 7)]
    assert len(batcher) == 6
    compute.go.set()
    assert [float(job.result(30)) for job in (first, *rest)] == [0, 2, 4, 6, 8, 10, 12]
    assert compute.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert batcher.seconds_per_image > 0


def test_an_image_that_fails_fails_alone(batcher, compute):
    first = batcher.submit(image(0), TASKS[0])
    assert compute.begun.wait(30)
    jobs = [batcher.submit(image(value), TASKS[0]) for value in (1, -1, 2)]
    compute.go.set()
    assert float(first.result(30)) == 0
    assert [float(jobs[i].result(30)) for i in (0, 2)] == [2, 4]
    with pytest.raises(ValueError, match="below 0"):
        jobs[1].result(30)
    assert compute.batches == [[0], [1, -1, 2], [1], [-1], [2]]
    assert batcher.alive


def test_what_is_cancelled_before_its_batch_is_not_computed(batcher, compute):
    batcher.submit(image(0), TASKS[0])
    assert compute.begun.wait(30)
    cancelled, kept = batcher.submit(image(1), TASKS[0]), batcher.submit(image(2), TASKS[0])
    assert cancelled.cancel()
    compute.go.set()
    assert float(kept.result(30)) == 4
    assert compute.batches == [[0], [2]]


def test_closing_computes_what_waits_and_takes_nothing_more(compute):
    batcher = Batcher(compute, size=4, wait=60, metrics=Metrics())
    jobs = [batcher.submit(image(i), TASKS[0]) for i in range(6)]
    compute.go.set()
    batcher.close()  # the last two do not wait for others
    assert [float(job.result(0)) for job in jobs] == [0, 2, 4, 6, 8, 10]
    assert not batcher.alive
    with pytest.raises(RuntimeError, match="the queue is closed"):
        batcher.submit(image(1), TASKS[0])


def test_a_batch_waits_for_more_images_until_it_is_full(compute):
    compute.go.set()
    batcher = Batcher(compute, size=3, wait=60, metrics=Metrics())
    jobs = [batcher.submit(image(i), TASKS[0]) for i in range(3)]
    assert [float(job.result(30)) for job in jobs] == [0, 2, 4]
    assert compute.batches == [[0, 1, 2]]
    batcher.close()


def test_probabilities_are_those_of_the_state_an_image_was_given_also_after_it_was_replaced(tmp_path):
    """An answer pairs probabilities with class names, so both must be of one state."""
    bank = visprompt.Bank(DEMO)
    old = bank.add("a", write_state(tmp_path / "old.safetensors", 0, 3))
    new = bank.add("a", write_state(tmp_path / "new.safetensors", 1, 5))
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shares = answers(bank, [Input(image, (64, 64)) for image in images], [old, new, old, new])
    with torch.inference_mode():
        for row, x, name in zip(shares, images, ("old", "new") * 2, strict=True):
            alone = visprompt.load(tmp_path / f"{name}.safetensors")(x[None]).softmax(1)[0]
            assert torch.allclose(row, alone, atol=1e-5)
    bank.remove("a")
    assert torch.equal(bank(images[:1], old)[0].argmax(), shares[0].argmax())
