"""What prompts are compared with: heads on frozen features, the last blocks, and everything."""

import math

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn

import visprompt
from helpers.tiny import (
    NUM_IMAGE,
    built,
    images,
    measured,
    timm_logits,
    tiny_classifier,
    tiny_model,
    worst_error,
)
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.methods import Flow, Method, build_method
from visprompt.models.methods.baselines import MLP, Partial


def test_linear_tunes_the_head_on_features_that_never_change():
    classifier = tiny_classifier("linear")
    assert classifier.tuned_names == {"head.weight", "head.bias"}
    assert list(classifier.method.parameters()) == []
    assert classifier.has_frozen_part
    assert not tiny_classifier("vpt_deep").has_frozen_part
    assert not tiny_classifier("full").has_frozen_part
    assert torch.equal(classifier.features(images()), classifier.features(images()))
    assert not classifier.features(images()).requires_grad


def test_without_prompts_no_token_enters():
    method = build_method("linear", ViT(tiny_model()))
    assert method.token_flow() == (Flow.KEEP,) * 4
    with pytest.raises(LookupError, match="Linear has no tokens that enter before block 2"):
        method.tokens(2, torch.zeros(1, 5, 32))
    assert type(method).tokens is Method.tokens


def drop_rates(model):
    """Stochastic depth of each block's branches."""
    return [
        [
            module.drop_prob if isinstance(module, DropPath) else 0.0
            for name, module in block.named_modules()
            if "drop_path" in name
        ]
        for block in model.blocks
    ]


@pytest.mark.parametrize(
    ("options", "branches"),
    [({}, 2), ({"block_fn": ParallelScalingBlock}, 1), ({"block_fn": ParallelThingsBlock}, 4)],
)
def test_stochastic_depth_grows_linearly_over_the_blocks(options, branches):
    model = tiny_model(**options)
    tiny_classifier("full", model=model, drop_path=0.3)
    expected = [[pytest.approx(rate)] * branches for rate in (0.0, 0.1, 0.2, 0.3)]
    assert drop_rates(model) == expected
    assert drop_rates(tiny_model(drop_path_rate=0.3, **options)) == expected, "as timm's own option"


def test_no_stochastic_depth_where_none_is_asked_for():
    model = tiny_model(drop_path_rate=0.3)
    classifier = tiny_classifier("full", model=model, drop_path=0.0)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert isinstance(model.blocks[3].drop_path1, nn.Identity)
    assert torch.equal(classifier.train()(images()), classifier.eval()(images()))


def test_stochastic_depth_is_on_in_training_only():
    classifier = tiny_classifier("full", drop_path=0.5)
    with torch.no_grad():
        training, again = classifier(images()), classifier(images())
        assert not torch.equal(training, again)
        classifier.eval()
        assert torch.equal(classifier(images()), classifier(images()))


def test_full_drops_where_the_released_code_does_and_nowhere_else():
    """Behind the position embedding and behind both layers of every MLP; not in the attention."""
    model = tiny_model()
    classifier = tiny_classifier("full", model=model, drop_path=0.0, dropout=0.1)
    rates = {
        name: module.p
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and module.p
    }
    assert rates == {"pos_drop": 0.1} | {f"blocks.{i}.mlp.drop{k}": 0.1 for i in range(4) for k in (1, 2)}
    assert not torch.equal(classifier.train()(images()), classifier(images()))
    assert torch.equal(
        classifier.eval()(images()), tiny_classifier("full", model=model, drop_path=0.0).eval()(images())
    )


def test_dropout_where_there_is_no_place_for_it_is_refused():
    from timm.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=0)
    with pytest.raises(
        UserError, match=r"^method\.dropout=0\.1 needs transformer MLPs with dropout layers, which"
    ):
        visprompt.build(net, "full", 2, dropout=0.1)
    with pytest.raises(
        UserError, match=r"^method\.dropout=1\.0 is not a probability: give a number from 0 to below 1"
    ):
        build_method("full", ViT(tiny_model()), dropout=1.0)


def test_a_model_of_one_block_has_no_stochastic_depth():
    model = tiny_model(depth=1)
    tiny_classifier("full", model=model, drop_path=0.5)
    assert drop_rates(model) == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("rate", "problem"),
    [
        (1.0, "is not a probability: give a number from 0 to below"),
        (-0.1, "is not a probability: give a number from 0 to below"),
        (float("nan"), "is out of range: give a number up to 65536"),
    ],
)
def test_a_rate_out_of_range_is_named(rate, problem):
    with pytest.raises(UserError, match=f"method.drop_path={rate} {problem}"):
        build_method("full", ViT(tiny_model()), drop_path=rate)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_partial_goes_on_from_the_frozen_blocks(num_blocks):
    classifier, x = built(Partial, num_blocks=num_blocks), images(3)
    assert classifier.method.first_block == 4 - num_blocks
    tokens = classifier.frozen(x)
    assert tokens.shape == (3, NUM_IMAGE, 32)
    assert not tokens.requires_grad
    reference = measured(classifier, timm_logits(classifier, x))
    assert worst_error(measured(classifier, classifier(tokens)), reference) < 1e-5


@pytest.mark.parametrize("count", [0, 5])
def test_a_number_of_blocks_out_of_range_is_named(count):
    with pytest.raises(
        UserError, match=f"method.num_blocks={count} does not fit: give 1 to 4, the backbone's blocks"
    ):
        Partial(ViT(tiny_model()), num_blocks=count)


def naive_mlp(head, x, num_hidden):
    """Linear, ReLU, batch norm by the batch's own statistics; no dropout."""
    p = dict(head.named_parameters())
    for i in range(num_hidden):
        x = (x @ p[f"hidden.{4 * i}.weight"].T + p[f"hidden.{4 * i}.bias"]).clamp(min=0)
        centred = x - x.mean(0)
        normed = centred / (centred.square().mean(0) + 1e-5).sqrt()
        x = normed * p[f"hidden.{4 * i + 2}.weight"] + p[f"hidden.{4 * i + 2}.bias"]
    return x @ p["weight"].T + p["bias"]


@pytest.mark.parametrize("num_layers", [2, 3])
def test_mlp_equals_a_naive_head(num_layers):
    """In double precision: a hidden unit that a batch barely switches on divides by nearly nothing."""
    classifier = built(MLP, num_layers=num_layers, dropout=0.0).double()
    features = classifier.features(images(8).double())
    reference = measured(classifier, naive_mlp(classifier.head, features, num_layers - 1))
    assert worst_error(measured(classifier, classifier(features)), reference) < 1e-5
    assert set(reference) == {"logits"} | set(classifier.tuned_names)


def test_mlp_is_a_head_on_features_that_never_change():
    classifier = built(MLP)
    layers = [type(layer) for layer in classifier.head.hidden]
    assert [issubclass(t, nn.BatchNorm1d) for t in layers] == [False, False, True, False] * 2
    assert [t for t in layers if not issubclass(t, nn.BatchNorm1d)] == [nn.Linear, nn.ReLU, nn.Dropout] * 2
    assert {layer.p for layer in classifier.head.hidden if isinstance(layer, nn.Dropout)} == {0.1}
    assert classifier.has_frozen_part
    x = images(6)
    features = classifier.frozen(x)
    assert features.shape == (6, 32)
    classifier.eval()
    assert torch.equal(classifier(features), classifier(x))
    assert all(name.startswith("head.") for name in classifier.tuned_names)


def test_mlp_saves_the_statistics_of_its_batch_norms():
    classifier = built(MLP, num_layers=2)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert set(classifier.tuned_state()) == {
        "head.weight", "head.bias", "head.hidden.0.weight", "head.hidden.0.bias", *(f"head.hidden.2.{n}" for n in norm),
    }  # fmt: skip
    for _ in range(3):
        classifier(images(6))
    restored = built(MLP, num_layers=2)
    restored.load_tuned_state(classifier.tuned_state())
    assert restored.head.hidden[2].num_batches_tracked == 3
    assert torch.equal(restored.eval()(images()), classifier.eval()(images()))


def test_a_last_batch_of_one_image_has_no_statistics():
    classifier = built(MLP)
    classifier(images(6))
    state = {n: t.clone() for n, t in classifier.tuned_state().items()}
    classifier(images(1)).sum().backward()
    assert all(torch.equal(t, state[n]) for n, t in classifier.tuned_state().items())
    assert all(torch.isfinite(p.grad).all() for _, p in classifier.tuned_parameters())


def test_the_last_layer_of_mlp_is_drawn_as_every_head():
    torch.manual_seed(0)
    head = MLP(ViT(tiny_model())).make_head(256, 64, "vpt")
    assert torch.allclose(head.bias, torch.tensor(-math.log(99)))
    assert head.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert head.hidden[0].weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not MLP(ViT(tiny_model())).make_head(256, 64, "zeros").weight.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 1}, "method.num_layers=1 is too small: give at least 2, or use method=linear"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability: give a number from 0 to below 1"),
    ],
)
def test_options_of_mlp_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        MLP(ViT(tiny_model()), **options)
