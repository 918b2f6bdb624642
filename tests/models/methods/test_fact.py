"""FacT: the update of the activations is that of the weights, from factors that all blocks share."""

import copy

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch.func import functional_call
from torch.nn import functional as F

from helpers.tiny import (
    NUM_CLASSES,
    SIZE,
    VIT_B_SIZE,
    geometry,
    images,
    measured,
    relative_error,
    tiny_model,
    worst_error,
)
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.layers import Wrapped
from visprompt.models.methods.fact import FacT

VIT_B = geometry(**VIT_B_SIZE)
MODELS = {
    "class token": {},
    "average, narrow": {"global_pool": "avg", "class_token": False, "mlp_ratio": 2.0},
    "registers, map": {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
}
each_form = pytest.mark.parametrize("form", ["tt", "tk"])


def build(random=True, model=None, **options):
    backbone = ViT(tiny_model() if model is None else model)
    torch.manual_seed(1)
    classifier = Classifier(backbone, FacT(backbone, **options), NUM_CLASSES)
    if random:
        with torch.no_grad():
            for parameter in classifier.method.parameters():
                parameter.normal_(0, 0.3)
    return classifier


def naive_logits(classifier, model, x):
    """Through the plain model with every updated weight in full: slices of width x width, U Sigma V each."""
    method, weights = classifier.method, dict(model.named_parameters())
    ratio = model.blocks[0].mlp.fc1.out_features // 32
    for i in range(len(model.blocks)):
        if method.form == "tt":
            middles = list(method.sigma[i])
        else:
            middles = [sum(m[p] * method.core[p] for p in range(method.rank)) for m in method.mix[i]]
        maps = [(method.scale * method.u @ middle @ method.v).T for middle in middles]  # as weights [out, in]
        updates = {
            "attn.qkv": torch.cat(maps[:3], 0),
            "attn.proj": maps[3],
            "mlp.fc1": torch.cat(maps[4 : 4 + ratio], 0),
            "mlp.fc2": torch.cat(maps[4 + ratio :], 1),
        }
        for path, update in updates.items():
            weights[f"blocks.{i}.{path}.weight"] = weights[f"blocks.{i}.{path}.weight"] + update
    return classifier.head(functional_call(model, weights, x))


@each_form
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_and_gradients_are_those_of_the_updated_weights(options, form):
    model = tiny_model(**options)
    classifier = build(model=copy.deepcopy(model), rank=3, form=form, scale=0.8).eval()
    x = images(3)
    fast, naive = (
        measured(classifier, f(x)) for f in (classifier, lambda x: naive_logits(classifier, model, x))
    )
    assert worst_error(fast, naive) < 1e-5


@each_form
def test_the_start_is_the_backbone(form):
    model, x = tiny_model(), images(3)
    plain = model(x)
    classifier = build(random=False, model=model, form=form)
    assert torch.allclose(classifier.train().features(x), plain, rtol=1e-5, atol=1e-5)
    assert not classifier.method.v.any()
    assert all(p.any() for name, p in classifier.method.named_parameters() if name != "v")


@each_form
def test_merged_equals_unmerged(form):
    model, x = tiny_model(), images(3)
    classifier = build(model=copy.deepcopy(model), rank=3, form=form).eval()
    merged = copy.deepcopy(classifier)
    for name, module in list(merged.named_modules()):
        if isinstance(module, Wrapped):
            merged.set_submodule(name, module.merged())
    assert merged.backbone.model.state_dict().keys() == model.state_dict().keys()
    assert relative_error(merged(x), classifier(x)) < 1e-5
    assert relative_error(merged.head(merged.backbone.model(x)), classifier(x)) < 1e-5
    assert FacT.can_merge


@pytest.mark.parametrize(
    ("form", "rank", "count"),
    [
        # 2 * width * r for U and V, then r * r for each of 12 slices in 12 blocks; or the core and 144
        # columns of r
        ("tt", 16, 2 * 768 * 16 + 144 * 16**2),
        ("tt", 8, 21_504),
        ("tk", 16, 2 * 768 * 16 + 16**3 + 144 * 16),
        ("tk", 8, 13_952),
    ],
)
def test_the_count_is_the_papers_formula(form, rank, count):
    with torch.device("meta"):
        backbone = ViT(VisionTransformer(num_classes=0))
        classifier = Classifier(backbone, FacT(backbone, rank=rank, form=form), 100)
    assert sum(p.numel() for p in classifier.method.parameters()) == count


def test_initial_values():
    method = build(random=False, rank=16).method
    assert method.u.abs().max().item() == pytest.approx(32**-0.5, rel=0.02)
    assert method.sigma[:, :8].abs().max().item() == pytest.approx(1 / 4, rel=0.01)
    # a layer of four times the inputs
    assert method.sigma[:, 8:].abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    method = build(random=False, rank=16, form="tk").method
    assert method.core.abs().max().item() == pytest.approx(3**0.5 / 16, rel=0.01)
    assert method.mix.abs().max().item() == pytest.approx((6 / (4 * 12 + 16)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("form", "own"), [("tt", {"sigma": [4, 12, 3, 3]}), ("tk", {"core": [3, 3, 3], "mix": [4, 12, 3]})]
)
def test_saved_keys_and_tuned_names(form, own):
    classifier = build(rank=3, form=form)
    shapes = {name: list(tensor.shape) for name, tensor in classifier.tuned_state().items()}
    assert shapes == own | {"u": [32, 3], "v": [3, 32], "head.weight": [5, 32], "head.bias": [5]}
    F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == classifier.tuned_names
    assert classifier.summary().backbone == sum(p.numel() for p in tiny_model().parameters())


def test_dropout_only_in_training():
    classifier, x = build(rank=3, dropout=0.5), images(3)
    plain = [classifier.eval()(x) for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(classifier.train()(x), plain[0])


def test_backbones_that_cannot_be_sliced_are_named():
    message = "method fact cannot work on this backbone: its ParallelScalingBlock has no linear layer attn.qkv; choose"
    with pytest.raises(UserError, match=message):
        build(model=tiny_model(block_fn=ParallelScalingBlock))
    message = (
        "mlp.fc1 maps 32 to 80, which slices of width 32 do not fill; choose a backbone whose hidden width"
    )
    with pytest.raises(UserError, match=message):
        build(model=tiny_model(**SIZE | {"mlp_ratio": 2.5}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank=0 is too small: give at least 1"),
        ({"rank": 769}, "method.rank=769 is larger than the width 768 of the layers"),
        ({"scale": 0.0}, "method.scale=0.0 is not a positive finite number: give a number above 0"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability"),
        ({"form": "cp"}, "unknown method.form 'cp': choose one of tk, tt"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        FacT(VIT_B, **options)
