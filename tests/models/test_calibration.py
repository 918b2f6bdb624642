"""The temperature: against another optimiser, and where it is applied and where not."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from helpers.tiny import images, tiny_classifier
from visprompt.errors import UserError
from visprompt.models.kind import MULTI_LABEL, SINGLE_LABEL
from visprompt.models.tuned_state import TunedState, load_state, save_state


def drawn(scale, count=600, classes=5):
    """Logits whose softmax is the distribution of the labels, times a scale."""
    noise = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=noise)
    labels = torch.multinomial(logits.softmax(1), 1, generator=noise)[:, 0]
    return scale * logits, labels


def by_lbfgs(logits, labels):
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(logits.double() / log_temperature.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return float(log_temperature.detach().exp())


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_is_that_of_another_optimiser_and_near_the_scale(scale):
    logits, labels = drawn(scale)
    found = SINGLE_LABEL.fit_temperature(logits, labels)
    assert found == pytest.approx(by_lbfgs(logits, labels), rel=1e-4)
    assert found == pytest.approx(scale, rel=0.15)
    assert found == float(f"{found:.6g}")
    before, after = (
        multiclass_calibration_error(SINGLE_LABEL.probabilities(logits, t), labels, 5) for t in (1.0, found)
    )
    assert after < 0.07
    assert scale == 1 or before > 2 * after


def test_without_mistakes_or_hits_there_is_no_temperature():
    logits = torch.eye(3)
    assert SINGLE_LABEL.fit_temperature(logits, torch.arange(3)) is None
    assert SINGLE_LABEL.fit_temperature(logits, torch.tensor([1, 2, 0])) is None
    assert SINGLE_LABEL.fit_temperature(torch.full((3, 3), math.nan), torch.arange(3)) is None
    assert SINGLE_LABEL.fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) is None


def test_the_calibration_error_is_torchmetrics_over_batches_without_fillers():
    logits, labels = drawn(3.0)
    figures = SINGLE_LABEL.figures(5)
    for part, of_part in zip(logits.split(250), labels.split(250), strict=True):
        filled = torch.cat([part, part[:3]]), torch.cat([of_part, of_part[:3]])
        figures.update(*filled, torch.tensor([1.0] * len(part) + [0.0] * 3))
    expected = float(multiclass_calibration_error(logits.softmax(1), labels, 5, n_bins=15, norm="l1"))
    assert figures.compute()["ece"] == pytest.approx(expected, abs=1e-7)
    figures.reset()
    figures.update(logits[:50], labels[:50], torch.ones(50))
    expected = float(
        multiclass_calibration_error(logits[:50].softmax(1), labels[:50], 5, n_bins=15, norm="l1")
    )
    assert figures.compute()["ece"] == pytest.approx(expected, abs=1e-7), "earlier images are forgotten"


def test_logits_that_are_not_finite_break_nothing():
    figures = SINGLE_LABEL.figures(3)
    figures.update(torch.full((2, 3), math.nan), torch.tensor([0, 1]), torch.ones(2))
    assert figures.compute()["count"] == 2


def test_a_temperature_changes_probabilities_and_not_logits():
    classifier = tiny_classifier(num_tokens=2).eval()
    with torch.no_grad():
        logits = classifier(images(2))
        assert torch.equal(classifier.probabilities(logits), logits.softmax(1))
        classifier.temperature = 2.5
        assert torch.equal(classifier(images(2)), logits)
        assert torch.equal(classifier.probabilities(logits), (logits / 2.5).softmax(1))


RECORD = {
    "method": {"name": "linear"},
    "task": "own",
    "class_names": ("a", "b"),
    "preprocessing": {"size": 32, "resize": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
    "backbone": {
        "name": "vit64_tiny_imagenet_100",
        "pretrained": True,
        "image_size": None,
        "global_pool": None,
    }
    | {"exact": False, "kwargs": {}, "sha256": "a" * 64},
    "versions": {},
}


def test_a_state_keeps_its_temperature_and_one_without_is_as_before(tmp_path):
    tensors = {"head.weight": torch.zeros(2, 3)}
    save_state(tmp_path / "old", TunedState(tensors=tensors, **RECORD))
    save_state(tmp_path / "new", TunedState(tensors=tensors, **RECORD, temperature=1.25))
    assert b"temperature" not in (tmp_path / "old").read_bytes()
    assert load_state(tmp_path / "old").temperature is None
    assert load_state(tmp_path / "new").temperature == 1.25


@pytest.mark.parametrize("wrong", [0.0, -1.0, 1e9, math.inf, "1", True])
def test_a_temperature_that_is_not_one_is_refused(tmp_path, wrong):
    save_state(tmp_path / "state", TunedState(tensors={}, **RECORD, temperature=wrong))
    with pytest.raises(UserError, match=r"state is refused: temperature .*; do not use this file"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_temperature_of_several_classes_is_near_the_scale(scale):
    noise = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(2000, 4, generator=noise)
    labels = (torch.rand(2000, 4, generator=noise) < logits.sigmoid()).long()
    found = MULTI_LABEL.fit_temperature(scale * logits, labels)
    assert found == pytest.approx(scale, rel=0.1)
    around = [
        float(MULTI_LABEL.loss(scale * logits / t, labels).mean())
        for t in (0.97 * found, found, 1.03 * found)
    ]
    assert around[1] == min(around)
