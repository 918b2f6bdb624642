"""Low-rank prompts: VPT on a product of two matrices."""

import pytest
import torch

from tiny import NUM_CLASSES, VIT_B_SIZE, geometry, images, measured, naive_features, tiny_model, worst_error
from visprompt.backbones.vit import ViT
from visprompt.classifier import Classifier
from visprompt.errors import UserError
from visprompt.methods.low_rank import LowRankVPT

TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)
PLACES = [{}, {"depth": 1, "carry_over": True}, {"depth": 2}, {"depth": 2, "depth_from": "last"}]


def classifier(**options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model())
    method = LowRankVPT(backbone, **{"num_tokens": 5, "rank": 2, "dropout": 0.0} | options)
    with torch.no_grad():
        method.left.normal_()
        method.right.normal_()
    return Classifier(backbone, method, NUM_CLASSES)


@pytest.mark.parametrize("options", PLACES)
def test_logits_and_gradients_are_those_of_prompts_that_are_the_product(options):
    model = classifier(**options)
    method = model.method
    prompts = torch.einsum("lpr,lrd->lpd", method.left, method.right)
    naive = model.head(naive_features(model.backbone.model, images(), prompts, method.first_block, method.carry_over))
    assert worst_error(measured(model, model(images())), measured(model, naive)) < 1e-5


def test_prompts_have_the_rank_and_are_not_stored():
    model = classifier(rank=2)
    assert torch.linalg.matrix_rank(model.method.tokens(0, images())[0]) == 2
    shapes = {name: list(tensor.shape) for name, tensor in model.tuned_state().items()}
    assert shapes == {"left": [4, 5, 2], "right": [4, 2, 32], "head.weight": [5, 32], "head.bias": [5]}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_tokens": 50, "rank": 10}, 12 * 10 * (50 + 768)),
        ({"num_tokens": 100, "rank": 75, "depth": 1, "carry_over": True}, 65_100),  # the paper's shallow setting
    ],
)
def test_counts_are_rank_times_tokens_and_width(options, count):
    assert sum(p.numel() for p in LowRankVPT(VIT_B, **options).parameters()) == count


def test_the_matrices_are_drawn_as_in_the_released_code():
    torch.manual_seed(0)
    method = LowRankVPT(VIT_B, num_tokens=50, rank=50)
    bound = (6 / (50 + 768)) ** 0.5
    assert method.left.std().item() == pytest.approx(0.02, rel=0.02)
    assert bound * 0.999 < method.right.abs().max() <= bound


def test_dropout_is_on_the_prompts_and_only_in_training():
    method = classifier(dropout=0.5).method.train()
    product = (method.left[1] @ method.right[1]).detach()
    tokens = method.tokens(1, torch.zeros(3, 5, 32)).detach()
    kept = tokens != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert not torch.equal(kept[0], kept[1])
    assert torch.allclose(tokens[kept], (2 * product).expand(3, -1, -1)[kept])
    assert torch.equal(method.eval().tokens(1, torch.zeros(3, 5, 32))[0], product)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank=0 does not fit: give 1 to 10, the smaller of num_tokens and the width"),
        ({"rank": 11}, "method.rank=11 does not fit: give 1 to 10"),
        ({"rank": 33, "num_tokens": 40}, "method.rank=33 does not fit: give 1 to 32"),
        ({"depth": 5}, "method.depth=5 does not fit"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        LowRankVPT(TINY, **options)
