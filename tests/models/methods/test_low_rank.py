"""Low-rank prompts: VPT on a product of two matrices."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import (
    NUM_CLASSES,
    VIT_B_SIZE,
    geometry,
    images,
    measured,
    naive_features,
    tiny_model,
    worst_error,
)
from visprompt.errors import UserError
from visprompt.models.api import build
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods import inits
from visprompt.models.methods.describe import member
from visprompt.models.methods.low_rank import LowRankVPT

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
    naive = model.head(
        naive_features(model.backbone.model, images(), prompts, method.first_block, method.carry_over)
    )
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
        (
            {"num_tokens": 100, "rank": 75, "depth": 1, "carry_over": True},
            65_100,
        ),  # the paper's shallow setting
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
        ({"whitening": "froze"}, "unknown method.whitening 'froze': did you mean frozen"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        LowRankVPT(TINY, **options)


# --- whitening


def whitened(whitening="tuned", seed=42, batches=None, model=None, **options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model() if model is None else model)
    method = LowRankVPT(
        backbone, **{"num_tokens": 5, "rank": 3, "dropout": 0.0, "whitening": whitening} | options
    )
    built = Classifier(backbone, method, NUM_CLASSES).eval()
    assert method.needs_images
    inits.initialise(method, backbone, images(6) if batches is None else batches, seed)
    return built


@torch.no_grad()
def met(model, x):
    """What prompts meet in each block, W_q W_k^T X^T [width, patches], mean over images, by PyTorch's own layers."""
    entering, hooks, found = [], [], []
    for block in model.blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: entering.append(args[0])))
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    for block, tokens in zip(model.blocks, entering, strict=True):
        width = tokens.shape[-1]
        query, key = (block.attn.qkv.weight[i * width : (i + 1) * width].double() for i in (0, 1))
        patches = tokens[:, model.num_prefix_tokens :].double()
        # the score of each unit prompt as a query with each patch as a key
        scores = F.linear(torch.eye(width).double(), query) @ F.linear(patches, key).transpose(1, 2)
        found.append(scores.mean(0))
    return found


def whitening_of(matrix):
    """Of its rows' second moments, by eigenvalues, on the span of its columns."""
    width, rank = len(matrix), torch.linalg.matrix_rank(matrix)
    values, vectors = torch.linalg.eigh(matrix @ matrix.T / width)
    values, vectors = values[-rank:], vectors[:, -rank:]
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T


@pytest.mark.parametrize("kind", [{}, {"reg_tokens": 4}, {"global_pool": "avg", "class_token": False}])
def test_the_whitening_matrix_whitens_what_prompts_meet(kind):
    """With all 32 columns every row of the right matrix's transpose is a row of the matrix, in another order."""
    model = tiny_model(**kind)
    method = whitened(num_tokens=32, rank=32, model=model).method
    for own, matrix in zip(method.right, met(tiny_model(**kind), images(6)), strict=True):
        wanted = whitening_of(matrix)
        moments = wanted @ (matrix @ matrix.T / 32) @ wanted
        span = matrix @ torch.linalg.pinv(matrix)
        assert torch.linalg.matrix_rank(matrix) == 16
        assert (moments - span).abs().max() < 1e-6
        sorted_rows = (rows.double().sort(1).values for rows in (own.T, wanted))
        made, expected = sorted_rows
        assert (made - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("options", PLACES)
def test_every_row_of_the_whitening_matrix_gives_numbers_of_its_own_choice(options):
    method = whitened(**options).method
    matrices = [whitening_of(matrix) for matrix in met(tiny_model(), images(6))]
    for own, block in zip(method.right, method.prompted_blocks, strict=True):
        distances = (own.T.double()[:, :, None] - matrices[block][:, None]).abs()  # [width, rank, width]
        assert distances.min(2).values.max() < 1e-4 * matrices[block].abs().max()
        columns = distances.argmin(2)
        assert all(len(set(row.tolist())) == 3 for row in columns)
        assert len({tuple(row.tolist()) for row in columns}) > 20


@pytest.mark.parametrize("whitening", ["frozen", "tuned"])
@pytest.mark.parametrize("options", PLACES)
def test_logits_and_gradients_with_whitening_are_those_of_the_product(whitening, options):
    model = whitened(whitening, **options)
    method = model.method
    with torch.no_grad():
        method.left.normal_()
    prompts = torch.einsum("lpr,lrd->lpd", method.left, method.right)
    naive = model.head(
        naive_features(model.backbone.model, images(), prompts, method.first_block, method.carry_over)
    )
    assert worst_error(measured(model, model(images())), measured(model, naive)) < 1e-5


def test_a_frozen_right_matrix_is_saved_and_never_tuned():
    model = whitened("frozen")
    assert model.tuned_names == {"method.left", "head.weight", "head.bias"}
    assert model.summary().tuned == 4 * 5 * 3
    assert whitened("tuned").summary().tuned == 4 * 3 * (5 + 32)
    assert {name: list(t.shape) for name, t in model.tuned_state().items()} == {
        "left": [4, 5, 3],
        "right": [4, 3, 32],
        "head.weight": [5, 32],
        "head.bias": [5],
    }


@pytest.mark.parametrize("whitening", ["frozen", "tuned"])
def test_a_state_loads_without_images(whitening):
    model = whitened(whitening)
    torch.manual_seed(7)
    backbone = ViT(tiny_model())
    method = LowRankVPT(backbone, num_tokens=5, rank=3, dropout=0.0, whitening=whitening)
    other = Classifier(backbone, method, NUM_CLASSES).eval()
    assert not torch.allclose(other(images()), model(images()))
    other.load_tuned_state(model.tuned_state())
    assert torch.equal(other(images()), model(images()))


def test_without_whitening_nothing_is_drawn_otherwise_and_no_images_are_needed():
    model = classifier()
    before = model.method.right.detach().clone()
    inits.initialise(model.method, model.backbone, iter(()))
    assert not model.method.needs_images
    assert torch.equal(model.method.right, before)


def test_a_seed_decides_and_batches_do_not():
    one = whitened().method
    assert torch.equal(one.right, whitened("frozen").method.right)
    assert torch.equal(one.left, whitened(seed=1).method.left)
    assert not torch.equal(one.right, whitened(seed=1).method.right)
    scale = one.right.abs().max()
    assert (one.right - whitened(batches=list(images(6).split(4))).method.right).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("family", ["Swin", "EVA-02"])
def test_whitening_of_other_attentions_is_refused(family):
    message = "method.whitening=frozen reads the attention of plain ViT blocks, and block 0 of this backbone, of class "
    with pytest.raises(UserError, match=message):
        build(member(family), "vpt_low_rank", 3, whitening="frozen")
    build(member(family), "vpt_low_rank", 3)
