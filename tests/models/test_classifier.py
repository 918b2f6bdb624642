"""Backbone, method and head as one module: what is counted, saved and loaded."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import images, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier, Summary
from visprompt.models.methods import Method, build_method


def test_logits_are_the_head_on_the_features():
    classifier = tiny_classifier("vpt_deep").eval()
    x = images(3)
    features = classifier.features(x)
    assert features.shape == (3, 32)
    expected = features @ classifier.head.weight.T + classifier.head.bias
    assert torch.allclose(classifier(x), expected, atol=1e-6)


def test_the_head_starts_as_in_the_released_code():
    torch.manual_seed(0)
    backbone = ViT(tiny_model())
    head = Classifier(backbone, build_method("linear", backbone), 500).head
    assert head.weight.shape == (500, 32)
    assert head.bias.tolist() == [pytest.approx(-math.log(99))] * 500
    assert torch.sigmoid(head.bias[0]).item() == pytest.approx(0.01)
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)  # kaiming, fan out


def test_the_head_may_start_at_zero():
    backbone = ViT(tiny_model())
    classifier = Classifier(backbone, build_method("linear", backbone), 3, head_init="zeros")
    assert classifier(images()).abs().max() == 0
    with pytest.raises(UserError, match="unknown head_init 'zero': did you mean zeros"):
        Classifier(backbone, build_method("linear", backbone), 3, head_init="zero")


@pytest.mark.parametrize("count", [-1, 0, 2.5, 2.0, True, "3", None])
def test_a_number_of_classes_is_a_whole_number_of_1_or_more(count):
    backbone = ViT(tiny_model())
    message = f"^num_classes={count} is not a number of classes: give a whole number of 1 or more$"
    with pytest.raises(UserError, match=message):
        Classifier(backbone, build_method("linear", backbone), count)
    assert Classifier(backbone, build_method("linear", backbone), np.int64(1))(images()).shape == (2, 1)


BACKBONE = sum(p.numel() for p in tiny_model().parameters())


@pytest.mark.parametrize(
    ("name", "options", "tuned"),
    [
        ("linear", {}, 0),
        ("vpt_shallow", {"num_tokens": 50}, 50 * 32),
        ("vpt_deep", {"num_tokens": 50}, 4 * 50 * 32),
        ("vpt_deep", {"num_tokens": 7, "depth": 2, "depth_from": "last"}, 2 * 7 * 32),
        ("full", {}, BACKBONE),
    ],
)
def test_the_summary_counts_the_head_beside_the_tuned(name, options, tuned):
    classifier = tiny_classifier(name, **options)
    summary = classifier.summary()
    assert (summary.tuned, summary.head, summary.backbone) == (tuned, 5 * 32 + 5, BACKBONE)
    assert sum(summary.parts.values()) == tuned + summary.head
    assert summary.bytes == 4 * (tuned + summary.head)
    assert summary.parts["head.weight"] == 5 * 32
    assert classifier.training, "it is left as it was"
    assert summary.share == pytest.approx(tuned / BACKBONE)


def test_the_share_on_vit_b_is_the_papers():
    """460,800 of ViT-B/16's 85.8 M without its head, 0.537 %; Jia et al. print 0.53."""
    vit_b = 768 * 16 * 16 * 3 + 768 + 768 + 197 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert Summary(460_800, 0, vit_b, {}, 0, 0).share == pytest.approx(0.00537, abs=0.00001)


def altered(state, **changes):
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": None},
            r"it lacks \['prompts'\] and has nothing in addition; build it with the state's method",
        ),
        ({"vectors": torch.zeros(1)}, r"it lacks nothing and has \['vectors'\] in addition"),
        (
            {"head.bias": None, "bias": torch.zeros(5)},
            r"it lacks \['head.bias'\] and has \['bias'\] in addition",
        ),
        (
            {"prompts": torch.zeros(4, 9, 32)},
            r"prompts is \(4, 9, 32\) in the state and \(4, 10, 32\) here; build it with the state's options",
        ),
        ({"head.weight": torch.zeros(6, 32)}, r"head.weight is \(6, 32\) in the state and \(5, 32\) here"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_loaded(changes, message):
    classifier = tiny_classifier("vpt_deep")
    before = {name: tensor.clone() for name, tensor in classifier.tuned_state().items()}
    state = altered({name: torch.full_like(tensor, 7.0) for name, tensor in before.items()}, **changes)
    with pytest.raises(UserError, match="the tuned state does not fit this classifier: .*" + message):
        classifier.load_tuned_state(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.tuned_state().items())


def test_a_saved_state_has_the_names_it_is_documented_with():
    classifier = tiny_classifier("vpt_deep")
    assert set(classifier.tuned_state()) == {"prompts", "head.weight", "head.bias"}
    assert not any(tensor.requires_grad for tensor in classifier.tuned_state().values())
    assert torch.equal(classifier.tuned_state()["prompts"], classifier.method.prompts)


class Masked(Method):
    """Tunes a scale, with a mask that training must not change, statistics of its own, and a table made anew."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.norm = nn.BatchNorm1d(3)


def test_buffers_of_tuned_modules_are_saved_beside_what_is_tuned():
    backbone = ViT(tiny_model())
    backbone.model.register_buffer("frozen", torch.ones(2))
    classifier = Classifier(backbone, Masked(backbone), 5)
    head = {"head.weight", "head.bias"}
    assert classifier.tuned_names == head | {"method.scale", "method.norm.weight", "method.norm.bias"}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    state = {name: tensor.clone() for name, tensor in classifier.tuned_state().items()}
    assert set(state) == head | {"scale", "mask", "norm.weight", "norm.bias"} | statistics
    other = Classifier(backbone, Masked(backbone), 5)
    other.load_tuned_state(state | {"mask": torch.zeros(3), "norm.num_batches_tracked": torch.tensor(9)})
    assert other.method.mask.tolist() == [0.0, 0.0, 0.0]
    assert other.method.norm.num_batches_tracked.item() == 9
    assert torch.equal(other.head.weight, classifier.head.weight)


def test_a_loaded_state_is_a_copy():
    classifier, state = tiny_classifier("vpt_deep"), tiny_classifier("vpt_deep").tuned_state()
    classifier.load_tuned_state(state)
    state["prompts"].zero_()
    assert classifier.method.prompts.abs().max() > 0
