"""Merging: the plain timm model has the same logits, and what is no plain model is refused."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from helpers.tiny import NUM_CLASSES, built, images, relative_error, tiny_model
from visprompt.errors import UserError
from visprompt.models.layers import Wrapped
from visprompt.models.merge import merge
from visprompt.models.methods import Method
from visprompt.models.methods.baselines import MLP, Full, Linear, Partial
from visprompt.models.methods.sidetune import SideTune
from visprompt.models.methods.weights import Bias, LayerNorm, VPTBias

AVERAGE = {"global_pool": "avg"}


MERGED = [(Linear, {}), (Full, {}), (Partial, {"num_blocks": 2}), (Bias, {}), (LayerNorm, {})]


@pytest.mark.parametrize(("method", "options"), MERGED)
@pytest.mark.parametrize(
    "model", [{}, AVERAGE | {"reg_tokens": 2, "class_token": False}, {"global_pool": "map"}]
)
def test_merged_equals_unmerged(method, options, model):
    classifier = built(method, tiny_model(**model), **options).eval()
    before = {n: t.clone() for n, t in classifier.state_dict().items()}
    merged = merge(classifier)
    assert type(merged) is VisionTransformer
    assert not any(module.training for module in merged.modules())
    assert (merged.num_classes, type(merged.head)) == (NUM_CLASSES, nn.Linear)
    assert relative_error(merged(images(3)), classifier(images(3))) < 1e-5
    assert all(p.requires_grad for p in merged.parameters())
    with torch.no_grad():  # of its own memory
        for p in merged.parameters():
            p.zero_()
    assert all(torch.equal(t, before[n]) for n, t in classifier.state_dict().items())


class Doubled(Wrapped):
    """Twice a linear layer, through a number that belongs to the method."""

    def __init__(self, base, method):
        super().__init__(base)
        self.method = (method,)

    def forward(self, x):
        return self.base(x) * self.method[0].factor

    def merged(self):
        plain = nn.Linear(self.base.in_features, self.base.out_features)
        plain.weight.data, plain.bias.data = (
            p.data * self.method[0].factor.data for p in self.base.parameters()
        )
        return plain


class Doubling(Method):
    """Wraps fc1 of every block, twice."""

    can_merge = True
    wrapper = Doubled

    def __init__(self, backbone):
        super().__init__(backbone)
        self.factor = nn.Parameter(torch.tensor(2.0))

    def attach(self, backbone):
        for block in backbone.model.blocks:
            block.mlp.fc1 = self.wrapper(self.wrapper(block.mlp.fc1, self), self)

    def __deepcopy__(self, memo):
        raise AssertionError("the method is read, not copied")


def test_wrapped_layers_are_merged_from_the_inside():
    classifier = built(Doubling).eval()
    merged = merge(classifier)
    assert not any(isinstance(module, Wrapped) for module in merged.modules())
    assert relative_error(merged(images(3)), classifier(images(3))) < 1e-5
    assert merged.state_dict().keys() == tiny_model(num_classes=NUM_CLASSES).state_dict().keys()
    assert isinstance(classifier.backbone.model.blocks[0].mlp.fc1, Doubled), "the classifier stays as it was"


class Opaque(Wrapped):
    def __init__(self, base, method):
        super().__init__(base)


class Hiding(Doubling):
    wrapper = Opaque


class TwoLayers(Linear):
    def make_head(self, width, num_classes, init):
        return nn.Sequential(nn.Linear(width, width), nn.Linear(width, num_classes))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VPTBias, "VPTBias tunes more than weights of the backbone, so it cannot be merged: keep the tuned"),
        (SideTune, "SideTune tunes more than weights"),
        (MLP, "MLP tunes more than weights"),
        (TwoLayers, "a head of class Sequential cannot be merged, because a timm model"),
        (
            Hiding,
            r"blocks\.3\.mlp\.fc1\.base is wrapped in a Opaque, which cannot be merged into plain weights",
        ),
    ],
)
def test_what_is_no_plain_model_is_not_merged(method, message):
    with pytest.raises(UserError, match=message):
        merge(built(method))
