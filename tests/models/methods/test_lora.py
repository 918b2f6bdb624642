"""LoRA: the update of the activations is that of the weights, and merges into them."""

import copy

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from helpers.tiny import (
    NUM_CLASSES,
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
from visprompt.models.methods.lora import LoRA

VIT_B = geometry(**VIT_B_SIZE)
MODELS = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "no bias": {"qkv_bias": False},
    "registers, map": {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
}


def build(random=True, model=None, **options):
    backbone = ViT(tiny_model() if model is None else model)
    torch.manual_seed(1)
    method = LoRA(backbone, **options)
    if random:
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.normal_(0, 0.3)
    return Classifier(backbone, method, NUM_CLASSES)


def naive_logits(classifier, model, x):
    """Through the plain model with weights W + (alpha / r) B A, computed in full."""
    method, weights = classifier.method, dict(model.named_parameters())
    for i in range(len(model.blocks)):
        name = f"blocks.{i}.attn.qkv.weight"
        rows = list(weights[name].chunk(3))
        for j, target in enumerate(method.targets):
            rows["qkv".index(target)] = (
                rows["qkv".index(target)] + method.scale * method.b[i, j] @ method.a[i, j]
            )
        weights[name] = torch.cat(rows)
    return classifier.head(functional_call(model, weights, x))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("targets", ["qkv", "vq", "k"])
def test_logits_and_gradients_are_those_of_the_updated_weights(options, targets):
    model = tiny_model(**options)
    classifier = build(model=copy.deepcopy(model), rank=3, alpha=4.0, targets=targets).eval()
    x = images(3)
    fast, naive = (
        measured(classifier, f(x)) for f in (classifier, lambda x: naive_logits(classifier, model, x))
    )
    assert worst_error(fast, naive) < 1e-5


def test_the_start_is_the_backbone():
    model, x = tiny_model(), images(3)
    plain = model(x)
    classifier = build(random=False, model=model)
    assert torch.allclose(classifier.features(x), plain, rtol=1e-5, atol=1e-5)
    assert not classifier.method.b.any()
    bound = 32**-0.5
    assert bound * 0.95 < classifier.method.a.abs().max() <= bound


def test_merged_equals_unmerged():
    model, x = tiny_model(), images(3)
    classifier = build(model=copy.deepcopy(model), rank=3, alpha=5.0, dropout=0.2).eval()
    merged = copy.deepcopy(classifier)
    for name, module in list(merged.named_modules()):
        if isinstance(module, Wrapped):
            merged.set_submodule(name, module.merged())
    assert {type(b.attn.qkv) for b in merged.backbone.model.blocks} == {nn.Linear}
    assert merged.backbone.model.state_dict().keys() == model.state_dict().keys()
    assert relative_error(merged(x), classifier(x)) < 1e-5
    assert relative_error(merged.head(merged.backbone.model(x)), classifier(x)) < 1e-5
    assert LoRA.can_merge


def test_merging_in_training_drops_nothing_and_leaves_training_on():
    classifier = build(rank=3, dropout=0.5)
    layer = classifier.backbone.model.blocks[1].attn.qkv
    while_training = layer.merged().weight
    assert classifier.method.training
    assert classifier.method.dropout.training
    classifier.eval()
    assert torch.equal(while_training, layer.merged().weight)
    assert not torch.equal(while_training, layer.base.weight)


@pytest.mark.parametrize(("targets", "count"), [("qkv", 442_368), ("qv", 294_912)])
def test_the_count_is_the_papers_formula(targets, count):
    """Blocks * matrices * rank * (inputs + outputs).

    0.29 M for queries and values, as published for rank 8.
    """
    assert sum(p.numel() for p in LoRA(VIT_B, targets=targets).parameters()) == count
    assert count == 12 * len(targets) * 8 * (768 + 768)


def test_saved_keys_and_tuned_names():
    classifier = build(rank=3, targets="qv")
    assert {name: list(tensor.shape) for name, tensor in classifier.tuned_state().items()} == {
        "a": [4, 2, 3, 32],
        "b": [4, 2, 32, 3],
        "head.weight": [5, 32],
        "head.bias": [5],
    }
    F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == classifier.tuned_names
    assert classifier.summary().backbone == sum(p.numel() for p in tiny_model().parameters())


def test_no_gradient_of_the_size_of_the_weight_is_computed():
    """Neither W nor a sum W + B A takes part in the backward pass with a gradient."""
    classifier, shapes = build(rank=3), set()
    loss = F.cross_entropy(classifier(images(3)), torch.arange(3))
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            shapes.add(tuple(node.variable.shape))
        else:
            node.register_hook(
                lambda inputs, _: shapes.update(tuple(t.shape) for t in inputs if t is not None)
            )
        nodes += [parent for parent, _ in node.next_functions]
    loss.backward()
    assert (4, 3, 3, 32) in shapes  # A of all blocks: the walk sees what there is
    assert not shapes & {(96, 32), (32, 96)}


def test_dropout_only_in_training():
    classifier, x = build(rank=3, dropout=0.5), images(3)
    plain = [classifier.eval()(x) for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(classifier.train()(x), plain[0])


def test_alpha_over_rank_scales_the_update():
    assert LoRA(VIT_B).scale == 1
    assert LoRA(VIT_B, rank=4, alpha=16).scale == 4


def test_a_copy_is_tuned_by_its_own_parameters():
    classifier, x = build(rank=3).eval(), images(2)
    before, other = classifier(x), copy.deepcopy(classifier)
    with torch.no_grad():
        other.method.b.zero_()
    assert torch.equal(classifier(x), before)
    assert not torch.equal(other(x), before)


def test_blocks_without_the_layer_are_named():
    message = "method lora cannot work on this backbone: its ParallelScalingBlock has no linear layer attn.qkv; choose"
    with pytest.raises(UserError, match=message):
        build(model=tiny_model(block_fn=ParallelScalingBlock))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank=0 is too small: give at least 1"),
        (
            {"alpha": 0.0},
            "method.alpha=0.0 is not a positive finite number: give a number above 0, or null for rank",
        ),
        ({"dropout": -1.0}, "method.dropout=-1.0 is not a probability"),
        (
            {"targets": "qx"},
            "method.targets='qx' does not name matrices: give letters of qkv, such as qv, each once",
        ),
        ({"targets": "qq"}, "method.targets='qq'"),
        ({"targets": ""}, "method.targets=''"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        LoRA(VIT_B, **options)


def test_a_rank_beyond_the_width_is_refused():
    assert LoRA(geometry(width=32), rank=32).rank == 32
    sentence = (
        r"^method\.rank=33 is larger than the width 32 of the layers, which bounds the rank of an update: "
    )
    with pytest.raises(UserError, match=sentence):
        LoRA(geometry(width=32), rank=33)
    with pytest.raises(UserError, match=r"^method\.rank=17 is larger than the width 16 "):
        LoRA(geometry(widths=(16, 16, 32, 32)), rank=17)
