"""Adapters: where each stands in the block, how it starts, what is dropped while it is trained."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, VIT_B_SIZE, geometry, images, measured, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Place
from visprompt.models.methods.adapters import Adapter, AdapterPlus, AdaptFormer

VIT_B = geometry(**VIT_B_SIZE)
METHODS = [Adapter, AdaptFormer, AdapterPlus]
MODELS = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "registers, map": {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
    "pre-norm": {"pre_norm": True},
}


def build(cls, random=True, model=None, **options):
    backbone = ViT(tiny_model() if model is None else model)
    torch.manual_seed(1)
    method = cls(backbone, **options)
    if random:
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.normal_(0, 0.3)
    return Classifier(backbone, method, NUM_CLASSES)


def naive_logits(classifier, x):
    """As the equations read: one nn.Linear for each matrix, all tokens through timm's own attention and MLP."""
    model, method = classifier.backbone.model, classifier.method
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for i, block in enumerate(model.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        out = block.mlp(block.norm2(x))

        def through(z, activation, i=i):
            hidden = activation(z @ method.down[i] + method.down_bias[i])
            return hidden @ method.up[i] + method.up_bias[i]

        if isinstance(method, Adapter):
            x = x + block.ls2(out + through(out, nn.GELU()))
        elif isinstance(method, AdaptFormer):
            x = x + block.ls2(out) + through(x, nn.ReLU()) * method.scale
        else:
            x = x + block.ls2(out)
            x = x + through(x, nn.GELU()) * method.scale[i]
    return classifier.head(model.forward_head(model.norm(x), pre_logits=True))


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_and_gradients_are_those_of_the_equations(cls, options):
    classifier = build(cls, model=tiny_model(**options), bottleneck=6).eval()
    x = images(3)
    fast, naive = (measured(classifier, f(x)) for f in (classifier, lambda x: naive_logits(classifier, x)))
    assert worst_error(fast, naive) < 1e-5


@pytest.mark.parametrize("cls", METHODS)
def test_the_start_is_the_backbone(cls):
    model, x = tiny_model(), images(3)
    plain = model(x)
    classifier = build(cls, random=False, model=model)
    assert torch.allclose(classifier.train().features(x), plain, rtol=1e-5, atol=1e-5)
    assert classifier.method.down.abs().min() > 0
    assert not any(
        p.any() for p in (classifier.method.up, classifier.method.down_bias, classifier.method.up_bias)
    )


def test_up_learns_from_the_first_step_and_down_from_the_second():
    classifier = build(Adapter, random=False)
    for step in range(2):
        classifier.zero_grad()
        F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
        assert classifier.method.up.grad.any()
        assert classifier.method.down.grad.any() == (step > 0)
        with torch.no_grad():
            classifier.method.up -= 0.1 * classifier.method.up.grad


def test_zeroing_both_as_the_released_vpt_code_does_leaves_a_bias_alone_to_learn():
    classifier = build(Adapter, random=False)
    method = classifier.method
    nn.init.zeros_(method.down)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
        optimizer.step()
    assert method.up_bias.any()
    assert not any(p.any() for p in (method.down, method.up, method.down_bias))


@pytest.mark.parametrize(
    ("cls", "options", "count"),
    [
        # blocks * (2 * width * r + r + width)
        (Adapter, {}, 12 * (2 * 768 * 96 + 96 + 768)),
        (Adapter, {"bottleneck": 8}, 12 * (2 * 768 * 8 + 8 + 768)),
        (Adapter, {"bottleneck": 256}, 12 * (2 * 768 * 256 + 256 + 768)),
        (AdaptFormer, {}, 1_189_632),  # 12 * (2 * 768 * 64 + 64 + 768)
        (AdapterPlus, {}, 12 * (2 * 768 * 8 + 8 + 768) + 12 * 768),  # and one scale per channel
    ],
)
def test_counts_are_the_papers_formulas(cls, options, count):
    assert sum(p.numel() for p in cls(VIT_B, **options).parameters()) == count


def test_the_published_count():
    """AdaptFormer-64 with a head of 100 classes: 1.26 M in its paper's table, which cuts the rest off."""
    assert int((1_189_632 + 768 * 100 + 100) / 1e4) / 100 == 1.26


@pytest.mark.parametrize("cls", METHODS)
def test_saved_keys_and_tuned_names(cls):
    classifier = build(cls, bottleneck=3)
    own = {"down": [4, 32, 3], "down_bias": [4, 3], "up": [4, 3, 32], "up_bias": [4, 32]}
    own |= {"scale": [4, 32]} if cls is AdapterPlus else {}
    shapes = {name: list(tensor.shape) for name, tensor in classifier.tuned_state().items()}
    assert shapes == own | {"head.weight": [5, 32], "head.bias": [5]}
    F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == classifier.tuned_names


def test_the_papers_places_and_defaults():
    assert [cls.places for cls in METHODS] == [{Place.OUTPUT}, {Place.MLP}, {Place.AFTER}]
    assert Adapter(VIT_B).down.shape[-1] == 96
    adaptformer, plus = AdaptFormer(VIT_B), AdapterPlus(VIT_B)
    assert (adaptformer.down.shape[-1], adaptformer.scale, adaptformer.dropout.p) == (64, 0.1, 0.1)
    assert (plus.down.shape[-1], plus.drop_path.drop_prob) == (8, 0.1)
    assert torch.equal(plus.scale, torch.ones(12, 768))


def test_down_is_drawn_as_stated():
    torch.manual_seed(0)
    bound = 768**-0.5
    down = Adapter(VIT_B).down
    assert bound * 0.999 < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    plus, houlsby = AdapterPlus(VIT_B), AdapterPlus(VIT_B, init="houlsby")
    for weight in (plus.down, houlsby.down, houlsby.up):
        assert 0.0195 < weight.abs().max() <= 0.02
        # of a normal cut at two standard deviations
        assert weight.std().item() == pytest.approx(0.0088, rel=0.02)
    assert not plus.up.any()


def test_stochastic_depth_skips_whole_branches_image_by_image_in_training_only():
    method = build(AdapterPlus, bottleneck=6, drop_path=0.5).method
    x = torch.randn(200, 7, 32)
    kept = method.eval().branch(Place.AFTER, 1, x, None)
    dropped = method.train().branch(Place.AFTER, 1, x, None)
    skipped = (dropped == 0).flatten(1).all(1)
    assert 60 < skipped.sum() < 140
    assert torch.allclose(dropped[~skipped], 2 * kept[~skipped], rtol=1e-5)


def test_without_stochastic_depth_training_draws_nothing():
    method = build(AdapterPlus, drop_path=0.0).method.train()
    before = torch.get_rng_state()
    method.branch(Place.AFTER, 0, torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0)), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_adaptformer_drops_hidden_units_in_training_only():
    method = build(AdaptFormer, bottleneck=6, dropout=0.5).method
    x = torch.randn(3, 7, 32)
    plain = [method.eval().branch(Place.MLP, 0, x, None) for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(method.train().branch(Place.MLP, 0, x, None), plain[0])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (
            Adapter,
            {"bottleneck": 0},
            "method.bottleneck=0 is too small: give at least 1, or use method=linear",
        ),
        (AdaptFormer, {"bottleneck": -3}, "method.bottleneck=-3 is too small"),
        (
            AdaptFormer,
            {"scale": 0.0},
            "method.scale=0.0 is not a positive finite number: give a number above 0",
        ),
        (AdaptFormer, {"scale": float("nan")}, "method.scale=nan is not a positive"),
        (
            AdaptFormer,
            {"dropout": 1.0},
            "method.dropout=1.0 is not a probability: give a number from 0 to below 1",
        ),
        (AdapterPlus, {"drop_path": -0.1}, "method.drop_path=-0.1 is not a probability"),
        (AdapterPlus, {"init": "zeros"}, "unknown method.init 'zeros': did you mean zero"),
    ],
)
def test_options_out_of_range_are_named(cls, options, message):
    with pytest.raises(UserError, match=message):
        cls(VIT_B, **options)


@pytest.mark.parametrize("cls", METHODS)
def test_a_batch_of_two_equals_two_singles(cls):
    classifier, x = build(cls, bottleneck=6).eval(), images(2)
    assert torch.allclose(
        classifier(x), torch.cat([classifier(x[:1]), classifier(x[1:])]), atol=1e-4, rtol=1e-5
    )
