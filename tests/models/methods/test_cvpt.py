"""CVPT: cross attention to prompts through frozen copies of the blocks' attention."""

import copy

import pytest
import torch
from torch import nn

from helpers.tiny import NUM_CLASSES, VIT_B_SIZE, geometry, images, measured, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.contract import Flow
from visprompt.models.methods.cvpt import CVPT

TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)
BACKBONES = [
    {},
    {"global_pool": "avg", "class_token": False},
    {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5},
    {"qkv_bias": False},
]


def classifier(exact=True, dropout=0.0, **model_options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model(**model_options), exact=exact)
    method = CVPT(backbone, num_tokens=3, dropout=dropout)
    with torch.no_grad():
        method.prompts.normal_()
    return Classifier(backbone, method, NUM_CLASSES)


def cross_attention(attn, x, prompts):
    """As the released code reads.

    Separate copies of the projections, the softmax written out, no norm before.
    """
    width, layers = x.shape[-1], []
    for rows in range(3):
        layer = nn.Linear(width, width, bias=attn.qkv.bias is not None)
        part = slice(rows * width, (rows + 1) * width)
        layer.load_state_dict({n: t[part] for n, t in attn.qkv.state_dict().items()})
        layers.append(layer.requires_grad_(False))
    prompts = prompts.expand(len(x), -1, -1)
    heads = [
        layer(y).view(len(x), -1, attn.num_heads, width // attn.num_heads).transpose(1, 2)
        for layer, y in zip(layers, (x, prompts, prompts), strict=True)
    ]
    q, k, v = attn.q_norm(heads[0]), attn.k_norm(heads[1]), heads[2]
    weights = (q @ k.transpose(-2, -1) * (width // attn.num_heads) ** -0.5).softmax(-1)
    return copy.deepcopy(attn.proj)((weights @ v).transpose(1, 2).reshape(x.shape))


def naive_logits(model, x):
    vit, prompts = model.backbone.model, model.method.prompts
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for block, own in zip(vit.blocks, prompts, strict=True):
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + cross_attention(block.attn, x, own)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.head(vit.forward_head(vit.norm(x), pre_logits=True))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("options", BACKBONES, ids=str)
def test_logits_and_gradients_are_those_of_the_naive_branch(options, exact):
    model = classifier(exact=exact, **options)
    assert (
        worst_error(measured(model, model(images())), measured(model, naive_logits(model, images()))) < 1e-5
    )


def test_only_prompts_and_head_are_tuned_and_saved():
    model = classifier()
    shapes = {name: list(tensor.shape) for name, tensor in model.tuned_state().items()}
    assert shapes == {"prompts": [4, 3, 32], "head.weight": [5, 32], "head.bias": [5]}
    model(images()).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.tuned_names)
    assert sum(p.numel() for p in CVPT(VIT_B, num_tokens=10).parameters()) == 12 * 10 * 768


def test_prompts_never_enter_the_sequence():
    assert set(classifier().method.token_flow()) == {Flow.KEEP}


def test_the_branch_alone_changes_the_backbone():
    """Not even prompts of zero leave it as it was: the values' and the projection's biases stay."""
    model = classifier()
    with torch.no_grad():
        model.method.prompts.zero_()
    vit = model.backbone.model
    plain = model.head(vit.forward_head(vit.forward_features(images()), pre_logits=True))
    assert not torch.allclose(model(images()), plain, atol=1e-2)


def test_prompts_are_drawn_as_in_the_released_code():
    torch.manual_seed(0)
    bound = (6 / ((12 + 10) * 768)) ** 0.5
    assert bound * 0.999 < CVPT(VIT_B, num_tokens=10).prompts.abs().max() <= bound


def test_dropout_is_drawn_in_training_only():
    model = classifier(dropout=0.5)
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))
    assert (
        worst_error(measured(model, model(images())), measured(model, naive_logits(model, images()))) < 1e-5
    )


def test_a_copy_reads_the_prompts_through_its_own_backbone():
    model = classifier()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    assert all(
        a is block.attn for a, block in zip(twin.method._attentions, twin.backbone.model.blocks, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "method.num_tokens=0 is too small: give at least 1, or use method=linear"),
        ({"dropout": 1.0}, "method.dropout=1.0 is not a probability: give a number from 0 to below 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        CVPT(TINY, **options)
