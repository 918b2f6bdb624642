"""Frozen weights in autocast's type: the same numbers to the bit, half the memory, and nobody else's weights."""

import pytest
import timm
import torch

import visprompt
from helpers.cli import tensors, tiny_run
from helpers.pairs import options, works
from helpers.tiny import images, tiny_classifier, tiny_model
from helpers.wide import REPRESENTATIVES, case
from visprompt.models import tuning_module
from visprompt.models.frozen_weights import cast_frozen
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import MEMBERS, attempt
from visprompt.runs import run

OTHERS = [
    ("vpt_deep", family) for family in MEMBERS if family not in ("ViT", "ResNet")
]  # convolutions are slow
PAIRS = [*((method, "ViT") for method in METHODS if works(method, "ViT")), *OTHERS, ("lora", "Swin")]


def numbers(classifier, dtype):
    """Logits and gradients of a training step, and logits of an evaluation, also from the frozen part's output."""
    torch.manual_seed(0)
    classifier.train().zero_grad(set_to_none=True)
    side = classifier.backbone.image_size
    x = images(3, side)
    with torch.autocast("cpu", dtype):
        logits = classifier(x)
    classifier.losses(logits.float(), torch.tensor([0, 1, 2]), torch.full((3,), 1 / 3)).mean().backward()
    found = {name: p.grad for name, p in classifier.tuned_parameters() if p.grad is not None}
    classifier.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        found |= {"training": logits.detach(), "evaluation": classifier(x)}
        if classifier.has_frozen_part:
            found |= {"frozen": classifier.frozen(x), "from frozen": classifier(classifier.frozen(x))}
    return found


def assert_same(one, two):
    assert one.keys() == two.keys()
    differ = [n for n in one if one[n].dtype != two[n].dtype or not torch.equal(one[n], two[n])]
    assert differ == []


@pytest.mark.parametrize(
    ("method", "family"),
    [case(m, f, fast=m in REPRESENTATIVES and f == "ViT", id=f"{m}, {f}") for m, f in PAIRS],
)
def test_numbers_are_those_of_autocast_to_the_bit(method, family):
    plain, cast = (attempt(method, family, **options(method, family)) for _ in range(2))
    cast_frozen(cast, torch.bfloat16)
    assert_same(numbers(cast, torch.bfloat16), numbers(plain, torch.bfloat16))


@pytest.mark.parametrize("method", ["sa2vp", "da_vpt", "vpt_deep"])
def test_a_model_that_pools_by_attention_is_cast_too(method):
    """sa2vp pools its prompts outside autocast."""
    sides = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_siglip_224", **sides)
        both.append(visprompt.build(model, method, num_classes=3))
    cast_frozen(both[0], torch.bfloat16)
    assert_same(*(numbers(classifier, torch.bfloat16) for classifier in both))


def test_numbers_in_float16_are_those_of_autocast_also_where_a_weight_is_beyond_it():
    plain, cast = (tiny_classifier(num_tokens=3, dropout=0.0) for _ in range(2))
    cast_frozen(cast, torch.float16)
    assert_same(numbers(cast, torch.float16), numbers(plain, torch.float16))
    plain, cast = (tiny_classifier(num_tokens=3, dropout=0.0) for _ in range(2))
    for classifier in (plain, cast):
        with torch.no_grad():
            classifier.backbone.blocks[0].mlp.fc2.bias[0] = 1e5
    cast_frozen(cast, torch.float16)
    one, two = numbers(cast, torch.float16)["evaluation"], numbers(plain, torch.float16)["evaluation"]
    assert torch.equal(one.isnan(), two.isnan())
    assert two.isnan().any()


def test_frozen_matrices_take_half_the_memory_and_all_else_stays_as_it_is():
    bias = tiny_classifier("bias", model=tiny_model())
    cast_frozen(bias, torch.bfloat16)
    kept = {n for n, p in bias.backbone.named_parameters() if p.dtype == torch.float32}
    assert {n.rpartition(".")[2] for n in kept} == {"weight", "bias", "cls_token", "pos_embed"}
    assert {n for n in kept if n.endswith("weight")} == {
        n for n in kept if "norm" in n and n.endswith("weight")
    }, "the biases are tuned"
    assert {p.dtype for _, p in bias.tuned_parameters()} == {torch.float32}
    before, deep = (tiny_classifier(model=tiny_model()) for _ in range(2))
    cast_frozen(deep, torch.bfloat16)
    size = sum(p.nbytes for p in deep.backbone.parameters())
    assert size < 0.55 * sum(p.nbytes for p in before.backbone.parameters())
    full = tiny_classifier("full", model=tiny_model())
    cast_frozen(full, torch.bfloat16)
    assert {p.dtype for p in full.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_run_leaves_the_backbone_that_runs_share_and_its_result_as_they_were(tmp_path, monkeypatch):
    words = ("+trainer.limit_train_batches=2", "+trainer.limit_test_batches=1", "recipe.epochs=2")
    words = (*words, "precision=bf16-mixed", "callbacks=none")
    one = tiny_run(tmp_path / "cast", *words)
    seen, original = [], tuning_module.cast_for

    def watched(classifier, precision):
        original(classifier, precision)
        seen.append({p.dtype for p in classifier.backbone.model.blocks[0].attn.qkv.parameters()})

    monkeypatch.setattr(tuning_module, "cast_for", watched)
    cast = run.run_job(one)
    assert seen == [{torch.bfloat16}] * 2, "before training and before the test"
    assert {p.dtype for p in one.backbone.module.parameters()} == {torch.float32}
    monkeypatch.setattr(tuning_module, "cast_for", lambda *_: None)
    two = tiny_run(tmp_path / "plain", *words)
    plain = run.run_job(two)
    assert (cast.metrics, cast.tuned["sha256"]) == (plain.metrics, plain.tuned["sha256"])
    ours, theirs = tensors(one.folder), tensors(two.folder)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert_same(ours, theirs)
