"""Tuning numbers of the backbone itself, alone or with prompts: which, with what gradients, and how many."""

import pytest
import torch
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import visprompt
from helpers.tiny import built, images, measured, naive_logits, timm_logits, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.baselines import MLP, Linear, Partial
from visprompt.models.methods.sidetune import SideTune
from visprompt.models.methods.weights import Bias, LayerNorm, VPTBias


def blocks(*indices):
    """Names of the parameters of blocks of the tiny ViT."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return {f"blocks.{i}.{layer}.{kind}" for i in indices for layer in layers for kind in ("weight", "bias")}


NORM = {"norm.weight", "norm.bias"}
AVERAGE = {"global_pool": "avg"}
TUNED = [  # of the backbone
    (Partial, {}, {}, blocks(3) | NORM),
    (Partial, {"num_blocks": 2}, {}, blocks(2, 3) | NORM),
    (Partial, {"num_blocks": 4}, AVERAGE, blocks(0, 1, 2, 3) | {"fc_norm.weight", "fc_norm.bias"}),
    (
        Bias,
        {},
        {},
        {n for n in blocks(0, 1, 2, 3) if n.endswith("bias")} | {"norm.bias", "patch_embed.proj.bias"},
    ),
    (LayerNorm, {}, {}, {n for n in blocks(0, 1, 2, 3) if "norm" in n} | NORM),
    (
        LayerNorm,
        {},
        AVERAGE | {"pre_norm": True, "qk_norm": True},
        {n for n in blocks(0, 1, 2, 3) if "norm" in n}
        | {f"blocks.{i}.attn.{q}_norm.{kind}" for i in range(4) for q in "qk" for kind in ("weight", "bias")}
        | {f"{n}.{kind}" for n in ("norm_pre", "fc_norm") for kind in ("weight", "bias")},
    ),
]


@pytest.mark.parametrize(("method", "options", "model", "expected"), TUNED)
def test_exactly_the_named_weights_are_tuned_and_saved(method, options, model, expected):
    classifier = built(method, tiny_model(**model), **options)
    names = {f"backbone.model.{name}" for name in expected} | {"head.weight", "head.bias"}
    assert set(classifier.tuned_names) == names == set(classifier.tuned_state())
    classifier(images()).square().sum().backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == names
    assert not classifier.backbone.training


def test_bias_may_tune_the_tables_of_relative_positions_too():
    """As VPT's released code does on Swin, where every name with "bias" in it is tuned."""
    model = SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    )
    classifier = visprompt.build(model, "bias", 3, relative_positions=True)
    tuned = {name for name in classifier.tuned_names if name.startswith("backbone.")}
    assert tuned == {
        name for name, _ in classifier.named_parameters() if name.startswith("backbone.") and "bias" in name
    }
    tables = {name for name in tuned if name.endswith("relative_position_bias_table")}
    assert len(tables) == 2
    assert set(visprompt.build(model, "bias", 3).tuned_names) == set(classifier.tuned_names) - tables
    classifier(images()).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in classifier.named_parameters() if n in tables)
    with pytest.raises(UserError, match=r"^this backbone has no tables of relative positions to tune"):
        visprompt.build(tiny_model(), "bias", 3, relative_positions=True)


@pytest.mark.parametrize(("method", "options", "model", "expected"), TUNED)
def test_tuned_weights_give_what_timm_gives(method, options, model, expected):
    classifier, x = built(method, tiny_model(**model), **options), images(3)
    found, reference = measured(classifier, classifier(x)), measured(classifier, timm_logits(classifier, x))
    # softmax sees no bias of normed keys: both gradients are rounding
    seen = [n for n in reference if not n.endswith("k_norm.bias")]
    assert worst_error(found, reference, seen) < 1e-5


@pytest.mark.parametrize(
    ("method", "what"), [(Bias, "biases"), (VPTBias, "biases"), (LayerNorm, "layer or batch norms")]
)
def test_a_backbone_with_nothing_to_tune_is_named(method, what):
    model = tiny_model(norm_layer=RmsNorm)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(UserError, match=f"this backbone has no {what} to tune: choose another method"):
        built(method, model)


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1, "carry_over": True}, {"depth": 2}], ids=["deep", "shallow", "first two"]
)
def test_prompts_with_biases_equal_the_naive_ones(options):
    classifier, x = built(VPTBias, num_tokens=3, dropout=0.0, **options), images(3)
    biases = {f"backbone.{n}" for n, _ in classifier.backbone.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 4 * 6 + 2
    assert set(classifier.tuned_names) == biases | {"method.prompts", "head.weight", "head.bias"}
    assert set(classifier.tuned_state()) == biases | {"prompts", "head.weight", "head.bias"}
    reference = measured(classifier, naive_logits(classifier, x))
    assert worst_error(measured(classifier, classifier(x)), reference) < 1e-5


def test_biases_below_the_prompts_are_tuned_so_nothing_is_frozen():
    classifier = built(VPTBias, num_tokens=3, depth=1, depth_from="last")
    assert not classifier.has_frozen_part
    classifier(images()).square().sum().backward()
    assert classifier.backbone.model.patch_embed.proj.bias.grad.abs().max() > 0


@pytest.mark.parametrize("pool", [None, "cls", "image", "prompt", "image_prompt"])
def test_biases_that_the_loss_cannot_see_are_left_alone(pool):
    """Those of an attention pooling, where another pooling takes its place."""
    classifier = built(VPTBias, tiny_model(global_pool="map"), num_tokens=3, pool=pool)
    pooling = {name for name in classifier.tuned_names if ".attn_pool." in name}
    assert bool(pooling) == (pool is None)
    assert pooling <= set(classifier.tuned_state())
    classifier(images(3)).square().sum().backward()
    graded = {n for n, p in classifier.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert graded == set(classifier.tuned_names)
    assert classifier.summary().tuned == 4 * 3 * 32 + sum(
        p.numel() for n, p in classifier.tuned_parameters() if n.startswith("backbone.")
    )


# on ViT-B/16; parameters beside a linear head; the total for 24 tasks over one backbone (VPT, table 1)
PAPER = [
    (Linear, {}, 0, 1.02),
    (MLP, {"num_layers": 3}, 2 * (768 * 768 + 3 * 768), 1.35),
    (Partial, {"num_blocks": 1}, 7_087_872 + 1_536, 3.00),
    (SideTune, {}, 2_469_696 + 9216 * 768 + 1, 3.69),
    (Bias, {}, 102_912, 1.05),
    (LayerNorm, {}, 38_400, None),  # 0.038 M
    (VPTBias, {"num_tokens": 50}, 102_912 + 460_800, None),
    (VPTBias, {"num_tokens": 50, "depth": 1}, 102_912 + 38_400, None),
]


@pytest.mark.parametrize(("method", "options", "count", "total"), PAPER)
def test_counts_are_the_papers(method, options, count, total):
    with torch.device("meta"):
        backbone = ViT(VisionTransformer(weight_init="skip"))
        classifier = Classifier(backbone, method(backbone, **options), 100)
    tuned = sum(p.numel() for _, p in classifier.tuned_parameters()) - 100 * 769
    assert tuned == count
    if total is not None:
        heads = 2113 * 769  # classes of all 24 tasks
        assert round(1 + (24 * tuned + heads) / 85_798_656, 2) == total
