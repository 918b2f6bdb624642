"""SSF: scaling and shifting behind a layer is scaling and shifting the layer."""

import copy

import pytest
import torch
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, geometry, images, measured, relative_error, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.layers import Wrapped
from visprompt.models.methods import build_method
from visprompt.models.methods.ssf import SSF

IN_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
MODELS = {  # and where the last norm is
    "class token": ({}, {"norm": "norm"}),
    "average": ({"global_pool": "avg", "class_token": False}, {"fc_norm": "fc_norm"}),
    "registers, map": (
        {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5}, {"norm": "norm"},
    ),
    "pre-norm": ({"pre_norm": True}, {"norm": "norm", "norm_pre": "norm_pre"}),
}  # fmt: skip
each_model = pytest.mark.parametrize(("options", "beside"), MODELS.values(), ids=MODELS)


def build(random=True, model=None):
    backbone = ViT(tiny_model() if model is None else model)
    torch.manual_seed(1)
    classifier = Classifier(backbone, SSF(backbone), NUM_CLASSES)
    if random:
        with torch.no_grad():
            for name, parameter in classifier.method.named_parameters():
                parameter.normal_(1.0 if name.startswith("gamma") else 0.0, 0.2)
    return classifier


def naive_logits(classifier, model, beside, x):
    """Through the plain model, whose weights and biases are scaled and shifted."""
    method, model = classifier.method, copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(len(module.weight)))  # for the shift
    weights = dict(model.named_parameters())
    rows = {"patch_embed.proj": ("patch", ...)} | {path: (name, ...) for name, path in beside.items()}
    rows |= {
        f"blocks.{i}.{path}": (name, i) for i in range(len(model.blocks)) for name, path in IN_BLOCK.items()
    }
    for path, (name, row) in rows.items():
        gamma, beta = method.gamma[name][row], method.beta[name][row]
        weight = weights[f"{path}.weight"]
        weights[f"{path}.weight"] = (
            (weight.flatten(1) if weight.ndim > 1 else weight[:, None]).mul(gamma[:, None]).view_as(weight)
        )
        weights[f"{path}.bias"] = weights[f"{path}.bias"] * gamma + beta
    return classifier.head(functional_call(model, weights, x))


@each_model
def test_logits_and_gradients_are_those_of_scaled_layers(options, beside):
    model = tiny_model(**options)
    classifier = build(model=copy.deepcopy(model)).eval()
    x = images(3)
    fast, naive = (
        measured(classifier, f(x)) for f in (classifier, lambda x: naive_logits(classifier, model, beside, x))
    )
    assert worst_error(fast, naive) < 1e-5


@each_model
def test_merged_equals_unmerged(options, beside):
    model, x = tiny_model(**options), images(3)
    classifier = build(model=copy.deepcopy(model)).eval()
    merged = copy.deepcopy(classifier)
    for name, module in list(merged.named_modules()):
        if isinstance(module, Wrapped):
            merged.set_submodule(name, module.merged())
    added = merged.backbone.model.state_dict().keys() - model.state_dict().keys()
    # timm leaves that bias out there
    assert added == ({"patch_embed.proj.bias"} if "pre_norm" in options else set())
    assert [type(m) for m in merged.backbone.model.modules()] == [type(m) for m in model.modules()]
    assert relative_error(merged(x), classifier(x)) < 1e-5
    assert relative_error(merged.head(merged.backbone.model(x)), classifier(x)) < 1e-5
    assert SSF.can_merge


def test_merging_gives_a_layer_without_bias_one():
    model, x = tiny_model(qkv_bias=False), images(3)
    classifier = build(model=model).eval()
    before = classifier(x)
    for block in classifier.backbone.model.blocks:
        block.attn.qkv = block.attn.qkv.merged()
        assert isinstance(block.attn.qkv.bias, nn.Parameter)
    assert relative_error(classifier(x), before) < 1e-5


def test_a_norm_that_cannot_shift_does_not_merge():
    classifier = build(model=tiny_model(norm_layer=RmsNorm))
    assert torch.isfinite(classifier(images())).all()
    with pytest.raises(UserError, match="method ssf cannot be merged into an RmsNorm, which has no bias"):
        classifier.backbone.model.norm.merged()


def test_a_scale_of_one_and_a_shift_of_zero_is_the_backbone():
    model, x = tiny_model(), images(3)
    plain = model(x)
    classifier = build(random=False, model=model)
    # the paper's start is drawn around it
    assert not torch.allclose(classifier.features(x), plain, atol=1e-2)
    with torch.no_grad():
        for name, parameter in classifier.method.named_parameters():
            parameter.fill_(1.0 if name.startswith("gamma") else 0.0)
    assert torch.allclose(classifier.features(x), plain, rtol=1e-5, atol=1e-5)


def test_initial_values_are_the_papers_and_the_seeds():
    first, second = build(random=False), build(random=False)
    gamma, beta = (
        torch.cat([p.flatten() for p in part.values()]) for part in (first.method.gamma, first.method.beta)
    )
    assert (gamma.mean().item(), gamma.std().item()) == (
        pytest.approx(1, abs=0.003),
        pytest.approx(0.02, rel=0.1),
    )
    assert (beta.mean().item(), beta.std().item()) == (
        pytest.approx(0, abs=0.003),
        pytest.approx(0.02, rel=0.1),
    )
    for name, tensor in first.tuned_state().items():
        assert torch.equal(tensor, second.tuned_state()[name])


def test_the_count_is_the_papers():
    """2 * (12 blocks * 11 * 768 + patch embedding and last norm).

    0.28 M with the head of 100 classes, as published.
    """
    with torch.device("meta"):
        backbone = ViT(VisionTransformer(num_classes=0))
        classifier = Classifier(backbone, SSF(backbone), 100)
    count = sum(p.numel() for p in classifier.method.parameters())
    assert count == 2 * (12 * (3 + 1 + 4 + 1 + 1 + 1) * 768 + 2 * 768) == 205_824
    assert round((count + sum(p.numel() for p in classifier.head.parameters())) / 1e6, 2) == 0.28


@each_model
def test_saved_keys_and_tuned_names(options, beside):
    classifier = build(model=tiny_model(**options))
    own = {
        "norm1": [4, 32],
        "qkv": [4, 96],
        "proj": [4, 32],
        "norm2": [4, 32],
        "fc1": [4, 128],
        "fc2": [4, 32],
    }
    own |= {"patch": [32]} | {name: [32] for name in beside}
    shapes = {name: list(tensor.shape) for name, tensor in classifier.tuned_state().items()}
    expected = {f"{part}.{name}": shape for part in ("gamma", "beta") for name, shape in own.items()}
    assert shapes == expected | {"head.weight": [5, 32], "head.bias": [5]}
    F.cross_entropy(classifier(images(3)), torch.arange(3)).backward()
    assert {n for n, p in classifier.named_parameters() if p.grad is not None} == classifier.tuned_names
    assert classifier.summary().backbone == sum(p.numel() for p in tiny_model(**options).parameters())


def test_blocks_without_the_layers_are_named():
    with pytest.raises(UserError, match="method ssf cannot work on this backbone: it needs the site modules"):
        build_method("ssf", ViT(tiny_model(block_fn=ParallelScalingBlock)))


def test_it_needs_the_site():
    assert SSF.sites == {"modules"}
    assert SSF(geometry()).state_dict() == {}
