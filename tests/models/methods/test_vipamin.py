"""VIPAMIN's first prompts, against the paper's steps on timm's own forward."""

import pytest
import timm
import torch
from torch.nn import functional as F

from helpers.tiny import geometry, images, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.models.api import build
from visprompt.models.methods import build_method, inits
from visprompt.models.methods.describe import member

PLACES = [
    ("vpt_deep", {}),
    ("vpt_deep", {"depth": 2}),
    ("vpt_deep", {"depth": 2, "depth_from": "last"}),
    ("vpt_shallow", {}),
    ("vpt_deep", {"shared": "intra"}),
]


def initialised(share, patches=3, batches=None, seed=42, method="vpt_deep", model=None, **options):
    """The method, and the prompts that it was drawn with."""
    options = {
        "num_tokens": 5,
        "init": "vipamin",
        "matched_patches": patches,
        "orthogonal_share": share,
    } | options
    classifier = tiny_classifier(method, model=model, **options).eval()
    drawn = [p.detach().clone() for p in classifier.method.prompts]
    inits.initialise(classifier.method, classifier.backbone, images(6) if batches is None else batches, seed)
    return classifier.method, drawn


def hooked(module, run):
    """What a module gets and gives while something runs."""
    passed = []
    hook = module.register_forward_hook(lambda _, args, out: passed.append((args[0], out)))
    run()
    hook.remove()
    ((before, after),) = passed
    return before.double(), after.double()


@torch.no_grad()
def matched(model, drawn, first, patches, x, num_tokens=5):
    """Prompts by way of timm's blocks, with prompts behind the class and register tokens, as the code has them."""
    prefix, heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
    x, made = model.norm_pre(model._pos_embed(model.patch_embed(x))), []
    for i, block in enumerate(model.blocks[: first + len(drawn)]):
        if i < first:
            x = block(x)
            continue
        own = drawn[i - first].expand(num_tokens, -1)
        both = torch.cat([x[:, :prefix], own.expand(len(x), -1, -1), x[:, prefix:]], dim=1)
        _, joint = hooked(block.attn.qkv, lambda both=both, block=block: block(both))
        k = joint.unflatten(-1, (3, heads, -1))[:, :, 1]
        keys = k.mean(2).mean(0)[prefix:]
        states = x.double().mean(0)[prefix:]
        rows = []
        for j in range(len(drawn[i - first])):
            cosines = F.cosine_similarity(keys[j][None], keys[num_tokens:])
            rows.append(states[cosines.argsort(descending=True)[:patches]].mean(0))
        made.append(torch.stack(rows))
        x = block(both)
        x = torch.cat([x[:, :prefix], x[:, prefix + num_tokens :]], dim=1)
    return made


@torch.no_grad()
def outputs(model, x):
    """Attention outputs of each block before the output projection, means over images, [n, width]."""
    return [hooked(b.attn.proj, lambda: model.forward_features(x))[0].mean(0) for b in model.blocks]


def values(block, prompts):
    """Of prompts, by rows of the joint projection."""
    width = block.attn.qkv.in_features
    weight, bias = block.attn.qkv.weight[2 * width :].double(), block.attn.qkv.bias[2 * width :].double()
    return F.linear(prompts.double(), weight, bias)


def share_inside(rows, span):
    """The part of rows [p, d] that lies in the span of others [n, d], relative to their lengths."""
    found = torch.linalg.lstsq(span.T, rows.T).solution
    return ((span.T @ found).T.norm(dim=1) / rows.norm(dim=1)).max().item()


@pytest.mark.parametrize(("method", "options"), PLACES)
def test_matched_prompts_are_the_nearest_patches_by_the_keys(method, options):
    own, drawn = initialised(0.0, method=method, **options)
    expected = matched(tiny_model(), drawn, own.first_block, 3, images(6))
    for prompts, wanted in zip(own.prompts, expected, strict=True):
        assert (prompts - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", [{"reg_tokens": 4}, {"global_pool": "avg", "class_token": False}])
def test_class_and_register_tokens_are_no_patches(kind):
    own, drawn = initialised(0.0, model=tiny_model(**kind))
    for prompts, wanted in zip(own.prompts, matched(tiny_model(**kind), drawn, 0, 3, images(6)), strict=True):
        assert (prompts - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_all_patches_give_their_mean():
    own, drawn = initialised(0.0, patches=16)
    assert torch.pdist(own.prompts[0]).max() < 1e-5
    assert torch.pdist(drawn[0]).min() > 1


@pytest.mark.parametrize(("method", "options"), PLACES[:4])
def test_the_values_of_orthogonal_prompts_lie_outside_the_attention_outputs(method, options):
    own, _ = initialised(1.0, method=method, **options)
    model = tiny_model()
    spans = outputs(model, images(6))
    for block, prompts in zip(own.prompted_blocks, own.prompts, strict=True):
        made = values(model.blocks[block], prompts)
        assert share_inside(made, spans[block]) < 1e-4
        others = values(model.blocks[block], torch.randn(5, 32))
        assert share_inside(others, spans[block]) > 0.3


def test_the_inverse_is_that_of_the_transposed_matrix():
    """The released code's other one leaves the values where they were."""
    own, _ = initialised(1.0, method="vpt_shallow")
    model = tiny_model()
    block, (span, *_) = model.blocks[0], outputs(model, images(6))
    weight, bias = block.attn.qkv.weight[64:].double(), block.attn.qkv.bias[64:].double()
    wanted = values(block, own.prompts[0]) - bias
    released = wanted @ torch.linalg.pinv(weight)
    right = wanted @ torch.linalg.inv(weight.T)
    assert (right - own.prompts[0]).abs().max() < 1e-4 * right.abs().max()
    assert share_inside(values(block, released), span) > 0.3


def test_the_parts_are_added_by_their_shares():
    inside, outside, both = (initialised(share)[0].prompts for share in (0.0, 1.0, 0.25))
    assert torch.allclose(both, 0.75 * inside + 0.25 * outside, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_seed_decides_and_batches_do_not(share):
    one = initialised(share)[0].prompts
    assert one.requires_grad
    assert torch.equal(one, initialised(share)[0].prompts)
    assert torch.allclose(one, initialised(share, batches=list(images(6).split(4)))[0].prompts, atol=1e-4)
    assert torch.equal(one, initialised(share, seed=1)[0].prompts) == (share == 0)


def test_frozen_prompts_and_a_tuned_bias_start_so_too():
    frozen = initialised(1.0, frozen=True)[0].prompts
    assert not frozen.requires_grad
    assert torch.equal(frozen, initialised(1.0)[0].prompts)
    assert initialised(0.5, method="vpt_deep_bias")[0].prompts.std() > 0


def test_a_projection_without_bias_will_do():
    own, _ = initialised(1.0, model=tiny_model(qkv_bias=False))
    model = tiny_model(qkv_bias=False)
    made = own.prompts[0].double() @ model.blocks[0].attn.qkv.weight[64:].double().T
    assert share_inside(made, outputs(model, images(6))[0]) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "vipamin", "matched_patches": 0}, "method.matched_patches=0 is too small: give at least 1"),
        (
            {"init": "vipamin", "orthogonal_share": 1.5},
            "method.orthogonal_share=1.5 is not a share: give a number",
        ),
        (
            {"matched_patches": 2},
            "method.matched_patches=2 is for method.init=vipamin, and has no effect with "
            "method.init=random: give method.init=vipamin, or method.matched_patches=8",
        ),
        ({"init": "cls", "orthogonal_share": 0}, "method.orthogonal_share=0 is for method.init=vipamin"),
        ({"init": "vipamin", "project": 4}, "method.init=vipamin gives prompts of the backbone's width"),
        (
            {"init": "vipamin", "location": "add"},
            "method.init=vipamin gives tokens, which method.location=add does",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_method("vpt_deep", geometry(), **options)


def test_more_patches_than_there_are_is_one_sentence():
    sentence = "method.matched_patches=17 is more than the 16 patches of an image: give at most that many"
    with pytest.raises(UserError, match=sentence):
        initialised(0.5, patches=17)
    with pytest.raises(UserError, match=sentence):
        initialised(0.5, patches=17, model=tiny_model(dynamic_img_size=True))


def test_a_width_that_the_tokens_span_is_one_sentence():
    sentence = "no direction outside the attention outputs of block 0, whose 17 tokens span all 16: give method.ortho"
    with pytest.raises(UserError, match=sentence):
        initialised(0.5, model=tiny_model(embed_dim=16))
    assert initialised(0.0, model=tiny_model(embed_dim=16))[0].prompts.shape == (4, 5, 16)


@pytest.mark.parametrize("family", ["Swin", "EVA-02", "DINOv3"])
def test_other_attentions_are_refused(family):
    message = (
        "method.init=vipamin reads the attention of plain ViT blocks, and block 0 of this backbone, of class "
    )
    with pytest.raises(UserError, match=message):
        build(member(family), "vpt_deep", 3, init="vipamin")
    parallel = timm.models.vision_transformer.ParallelScalingBlock
    with pytest.raises(UserError, match=message):
        initialised(0.5, model=tiny_model(block_fn=parallel))
