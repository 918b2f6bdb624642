"""Gated prompt tuning: the gate's two limits, and the attention's temperature."""

import copy

import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock
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
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.gated import GatedVPT

TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)
BACKBONES = [
    {},
    {"global_pool": "avg", "class_token": False, "fc_norm": False},
    {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5},
]


def classifier(exact=True, gates=None, temperatures=None, dropout=0.0, model=None, **options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model() if model is None else model, exact=exact)
    method = GatedVPT(backbone, num_tokens=3, dropout=dropout, **options)
    with torch.no_grad():
        method.prompts.normal_()
        if gates is not None:
            method.gates.copy_(torch.as_tensor(gates))
        if temperatures is not None:
            method.temperatures.copy_(torch.as_tensor(temperatures))
    return Classifier(backbone, method, NUM_CLASSES)


def attention(attn, x, temperature):
    """The softmax written out, as the paper reads."""
    qkv = attn.qkv(x).view(*x.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q_norm = getattr(attn.q_norm, "base", attn.q_norm)
    scores = q_norm(qkv[0]) @ attn.k_norm(qkv[1]).transpose(-2, -1) * attn.scale
    return attn.proj(((scores / temperature).softmax(-1) @ qkv[2]).transpose(1, 2).reshape(x.shape))


def naive_logits(model, x):
    vit, method = model.backbone.model, model.method
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    x = torch.cat([method.prompts.expand(len(x), -1, -1), x], dim=1)
    for i, block in enumerate(vit.blocks):
        entered = x[:, :3]
        x = x + block.ls1(attention(block.attn, block.norm1(x), method.temperatures[i]))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if i < 3:
            gate = torch.sigmoid(method.gates[i])
            x = torch.cat([gate * x[:, :3] + (1 - gate) * entered, x[:, 3:]], dim=1)
    if method.pool == "image_prompt":
        return model.head(
            torch.cat([vit.norm(x[:, :3]), vit.norm(x[:, 3 + vit.num_prefix_tokens :])], 1).mean(1)
        )
    return model.head(vit.forward_head(vit.norm(x[:, 3:]), pre_logits=True))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("pool", [None, "image_prompt"])
@pytest.mark.parametrize("options", BACKBONES, ids=str)
def test_logits_and_gradients_are_those_of_the_naive_gates(options, pool, exact):
    gates, temperatures = [0.3, -0.7, 1.5], [0.8, 1.3, 2.0, 0.6]
    model = classifier(exact, gates, temperatures, model=tiny_model(**options), pool=pool)
    assert (
        worst_error(measured(model, model(images())), measured(model, naive_logits(model, images()))) < 1e-5
    )


@pytest.mark.parametrize("exact", [True, False])
def test_an_open_gate_is_vpt_shallow_and_a_shut_one_shares_one_prompt_over_all_blocks(exact):
    model = classifier(exact, gates=[100.0] * 3)
    prompts = model.method.prompts
    plain = tiny_model()  # without the temperatures, which are all one
    shallow = model.head(naive_features(plain, images(), prompts, 0, True))
    assert worst_error({"logits": model(images())}, {"logits": shallow}) < 1e-5
    with torch.no_grad():
        model.method.gates.fill_(-200.0)
    deep = model.head(naive_features(plain, images(), prompts.expand(4, -1, -1), 0, False))
    assert worst_error({"logits": model(images())}, {"logits": deep}) < 1e-5
    assert not torch.allclose(shallow, deep, atol=0.1)


def test_gates_start_nearly_shut_and_temperatures_at_one():
    method = classifier().method
    assert method.gates.sigmoid().tolist() == pytest.approx([0.00669] * 3, rel=1e-3)
    assert method.temperatures.tolist() == [1.0] * 4
    assert GatedVPT(TINY, gate_init=0.0).gates.tolist() == [0.0] * 3


def test_a_temperature_stays_in_its_range_and_can_come_back():
    outside = classifier(temperatures=[-1.0, 1.0, 50.0, 1.0])
    inside = classifier(temperatures=[0.01, 1.0, 10.0, 1.0])
    assert torch.allclose(outside(images()), inside(images()), atol=1e-6)
    F.cross_entropy(outside(images()), torch.tensor([0, 1])).backward()
    assert outside.method.temperatures.grad[2] != 0
    assert outside.method.temperatures.tolist() == [-1.0, 1.0, 50.0, 1.0]


def test_names_shapes_and_count():
    shapes = {name: list(tensor.shape) for name, tensor in classifier().tuned_state().items()}
    expected = {
        "prompts": [1, 3, 32],
        "gates": [3],
        "temperatures": [4],
        "head.weight": [5, 32],
        "head.bias": [5],
    }
    assert shapes == expected
    without = classifier(temperature=False)
    assert list(without.tuned_state()) == ["prompts", "gates", "head.weight", "head.bias"]
    assert not any("base" in name for name, _ in without.named_modules())
    assert sum(p.numel() for p in GatedVPT(VIT_B, num_tokens=100).parameters()) == 100 * 768 + 11 + 12
    model = classifier()
    model(images()).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(model.tuned_names)


def test_dropout_is_drawn_once_where_prompts_enter():
    model = classifier(dropout=0.5, gates=[-200.0] * 3, exact=False)
    seen = []
    for block in model.backbone.model.blocks:
        block.register_forward_hook(lambda _, args, __: seen.append(args[0][:, -3:].detach()))
    model(images())
    assert (seen[0] == 0).float().mean() == pytest.approx(0.5, abs=0.15)
    assert not torch.equal(seen[0][0], seen[0][1])
    assert all(torch.equal(entering, seen[0]) for entering in seen)


def test_a_forward_leaves_nothing_behind():
    model = classifier(gates=[0.5] * 3, exact=False)
    first = model(images())
    broken = model.backbone.model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(5))
    broken.remove()
    assert torch.equal(model(images()), first)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), first)
    with torch.no_grad():
        twin.method.temperatures.fill_(3.0)
    assert torch.equal(model(images()), first)
    assert not torch.allclose(twin(images()), first, atol=1e-3)


@pytest.mark.slow
def test_compiled_logits_and_gradients_are_the_same():
    model = classifier(gates=[0.3, -0.7, 1.5], temperatures=[0.8, 1.3, 2.0, 0.6])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (images(), images().flip(0)):
        assert worst_error(measured(model, compiled(batch)), measured(model, model(batch))) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gate_init": -30.0},
            "method.gate_init=-30.0 leaves a gate that cannot move: give a number from -20 to 20",
        ),
        ({"num_tokens": 0}, "method.num_tokens=0 is too small"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        GatedVPT(TINY, **options)


def test_a_block_without_a_place_for_a_temperature_is_named():
    model = tiny_model(block_fn=ParallelThingsBlock)
    with pytest.raises(UserError, match="no place for a temperature in a ParallelThingsBlock: give"):
        classifier(model=model)
    assert classifier(model=tiny_model(block_fn=ParallelThingsBlock), temperature=False)(images()).shape == (
        2,
        5,
    )
