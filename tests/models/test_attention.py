"""Attention weights read off the running model equal those of the equation over all tokens, and of timm's blocks."""

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock

from helpers.tiny import NUM_CLASSES, NUM_IMAGE, SIZE, images, relative_error, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.models.attention import last_attention
from visprompt.models.backbones.families import family
from visprompt.models.classifier import Classifier
from visprompt.models.methods import build_method

FLOAT32 = 1e-5
CLASS, MEAN = "the class token", "the mean over the {} tokens that are pooled"
PROMPTS = {"num_tokens": 3, "dropout": 0.0}
# method, its options, the model's, the tokens that are pooled (image tokens stand first), and what is said of
# them
CASES = {
    "deep": ("vpt_deep", PROMPTS, {}, slice(0, 1), CLASS),
    "shallow": ("vpt_shallow", PROMPTS, {}, slice(0, 1), CLASS),
    "dropped before": ("vpt_deep", PROMPTS | {"depth": 2}, {}, slice(0, 1), CLASS),
    "linear": ("linear", {}, {}, slice(0, 1), CLASS),
    "rows": ("e2vpt", PROMPTS | {"num_kv_tokens": 2, "kv_blocks": [3]}, {}, slice(0, 1), CLASS),
    "rows alone": (
        "e2vpt",
        PROMPTS | {"num_tokens": 0, "num_kv_tokens": 4, "kv_blocks": [3]},
        {},
        slice(0, 1),
        CLASS,
    ),
    "mean": ("vpt_deep", PROMPTS, {"global_pool": "avg"}, slice(1, 17), MEAN.format(16)),
    "mean, linear": ("linear", {}, {"global_pool": "avg"}, slice(1, 17), MEAN.format(16)),
    "no class": (
        "vpt_deep",
        PROMPTS,
        {"global_pool": "avg", "class_token": False},
        slice(0, 16),
        MEAN.format(16),
    ),
    "patches": ("vpt_deep", PROMPTS | {"pool": "image"}, {}, slice(1, 17), MEAN.format(16)),
    "prompts": ("vpt_deep", PROMPTS | {"pool": "prompt"}, {}, slice(17, 20), MEAN.format(3)),
    "both": ("vpt_shallow", PROMPTS | {"pool": "image_prompt"}, {}, slice(1, 20), MEAN.format(19)),
    "norms, registers": ("vpt_deep", PROMPTS, {"qk_norm": True, "reg_tokens": 2}, slice(0, 1), CLASS),
    "oblong": ("vpt_deep", PROMPTS, {"img_size": (32, 16)}, slice(0, 1), CLASS),
}


def pictures(model):
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(2))


def joined(found):
    """Weights [B, heads, keys] to the image tokens in their order, prompts, and rows."""
    return torch.cat([found.prefix, found.patches.flatten(-2), found.prompts, found.keys_values], dim=-1)


def equation(block, x, rows=None):
    """softmax(q k^T / sqrt(d)) of tokens [B, n, width] before a block."""
    attn = block.attn
    projected = attn.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, attn.num_heads, attn.head_dim)
    q, k = attn.q_norm(projected[:, :, 0].transpose(1, 2)), attn.k_norm(projected[:, :, 1].transpose(1, 2))
    if rows is not None:
        k = torch.cat([k, rows[0].expand(len(x), -1, -1, -1)], dim=2)
    return (q @ k.transpose(-2, -1) / attn.head_dim**0.5).softmax(-1)


def naive(classifier, x):
    """The equation with all tokens carried, prompts behind the class token.

    Then image tokens first, prompts, rows.
    """
    model, method = classifier.backbone.model, classifier.method
    prompts = getattr(method, "prompts", x.new_empty(0, 0, 32))
    first, place, count = method.first_block if len(prompts) else 0, int(model.has_class_token), 0
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for i, block in enumerate(model.blocks):
        own = first <= i < first + len(prompts)
        if own or (i == first + len(prompts) and not getattr(method, "carry_over", False)):
            x, count = torch.cat([x[:, :place], x[:, place + count :]], dim=1), 0
        if own:
            p = prompts[i - first].expand(len(x), -1, -1)
            x, count = torch.cat([x[:, :place], p, x[:, place:]], dim=1), p.shape[1]
        if i + 1 < len(model.blocks):
            x = block(x)
    weights, n = equation(block, x, method.keys_values(i)), x.shape[1]
    order = [*range(place), *range(place + count, n), *range(place, place + count)]
    return weights[:, :, order][..., [*order, *range(n, weights.shape[-1])]]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_equation_over_all_tokens(name, exact):
    method, options, kwargs, pooled, asking = CASES[name]
    model = tiny_model(**kwargs)
    classifier, x = tiny_classifier(method, exact, model, **options).eval(), pictures(model)
    found = last_attention(classifier, x)
    with torch.no_grad():
        expected = naive(classifier, x)[:, :, pooled].mean(2)
        assert torch.equal(found.logits, classifier(x))
    assert found.asking == asking
    assert found.block == 3
    assert relative_error(joined(found), expected) < FLOAT32
    assert (joined(found).sum(-1) - 1).abs().max() < 1e-6
    assert found.patches.shape == (2, 2, *model.patch_embed.grid_size)
    assert found.prefix.shape[-1] == model.num_prefix_tokens
    assert found.prompts.shape[-1] == (
        0 if name in ("linear", "mean, linear", "dropped before", "rows alone") else 3
    )
    assert found.keys_values.shape[-1] == {"rows": 2, "rows alone": 4}.get(name, 0)
    # flat maps, or such of one image, would hide mistakes
    assert found.patches.std() > 0.01
    assert relative_error(found.patches[0], found.patches[1]) > 0.1


@pytest.mark.parametrize("method", ["cvpt", "adaptformer", "convpass", "adapter"])
def test_branches_beside_the_attention_are_no_part_of_it(method):
    classifier = tiny_classifier(method).eval()
    last, seen = classifier.backbone.blocks[-1], []
    hook = last.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        classifier(images())
        hook.remove()
        expected = equation(last, torch.cat(seen, dim=1))[:, :, 0]
    assert expected.shape[-1] == NUM_IMAGE
    assert relative_error(joined(last_attention(classifier, images())), expected) < FLOAT32


def timms(classifier, x, rows):
    """The same from timm's own attention as it is without PyTorch's fused one, all tokens carried."""
    classifier.backbone.exact, seen = False, []
    attn = classifier.backbone.blocks[-1].attn
    attn.fused_attn = False
    hook = attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        classifier(x)
    hook.remove()
    attn.fused_attn, classifier.backbone.exact = True, True
    return seen[0][:, :, rows].mean(2)


@pytest.mark.parametrize(
    "method", ["lora", "ssf", "fact", "vpt_gated", "vpt_low_rank", "vfpt", "vapt", "bias"]
)
def test_what_is_wrapped_or_tempered_is_seen(method):
    classifier, x = tiny_classifier(method).eval(), images()
    assert relative_error(joined(last_attention(classifier, x)), timms(classifier, x, slice(0, 1))) < FLOAT32


EVA = {
    "rotary": {"global_pool": "token", "num_reg_tokens": 2},
    "normed, mean": {"global_pool": "avg", "qk_norm": True},
    "rope attention": {"attn_type": "rope", "qk_norm": True, "scale_attn_inner": True, "qkv_bias": False},
    "three projections": {"qkv_fused": False},
    "norms behind": {"use_post_norm": True},
}
NAMED = {
    "vit_base_patch16_sapiens2": {"num_kv_heads": (2, 1, 1, 1)},
    "vit_small_patch16_rope_mixed_ape_224": {},
}


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "linear"])
@pytest.mark.parametrize("name", [*EVA, *NAMED])
def test_rotations_are_in_the_weights_of_an_eva(name, method):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if name in EVA:
            model = Eva(num_classes=0, use_rot_pos_emb=True, **SIZE, **EVA[name])
        else:
            model = timm.create_model(name, num_classes=0, **SIZE, **NAMED[name])
        for of, parameter in model.named_parameters():
            start = parameter if parameter.ndim == 1 or "freqs" in of else 0
            parameter.copy_(start + 0.2 * torch.randn_like(parameter))
        backbone = family(model.eval())
        options = {} if method == "linear" else PROMPTS
        classifier, x = (
            Classifier(backbone, build_method(method, backbone, **options), NUM_CLASSES).eval(),
            images(),
        )
        for prompts in classifier.method.parameters():
            prompts.normal_()
        found = last_attention(classifier, x)
        rows = backbone.pooled_rows(model.num_prefix_tokens + 16, None)[0]
        assert relative_error(joined(found), timms(classifier, x, rows)) < FLOAT32
        assert (found.asking == CLASS) == (rows == slice(0, 1))
        assert found.prompts.shape == (2, 2, 0 if method == "linear" else 3)
        assert torch.equal(found.logits, classifier(x))
        model.rope = None
        assert relative_error(joined(last_attention(classifier, x)), joined(found)) > 0.01


def test_weights_are_float32_in_sixteen_bits_and_under_autocast():
    classifier = tiny_classifier("vpt_deep", **PROMPTS).eval()
    expected = joined(last_attention(classifier, images()))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = last_attention(classifier, images())
    half = last_attention(classifier.to(torch.bfloat16), images().bfloat16())
    for found in (mixed, half):
        assert joined(found).dtype == torch.float32
        assert (joined(found).sum(-1) - 1).abs().max() < 1e-6
        assert 0 < relative_error(joined(found), expected) < 0.1


def plain(model):
    backbone = family(model)
    return Classifier(backbone, build_method("linear", backbone), NUM_CLASSES).eval()


def test_other_backbones_are_refused_in_one_sentence():
    swin = SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2)
    )
    conv = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8))
    for model in (swin, conv):
        message = (
            r"^attention maps need a class token or pooled tokens that see the whole image, as in a plain "
            r"ViT or an "
            rf"EVA, and this backbone is a {type(model).__name__}: choose a run on one of those$"
        )
        with pytest.raises(UserError, match=message):
            last_attention(plain(model), images())


def test_attentions_that_cannot_be_read_are_refused_in_one_sentence():
    unfused = tiny_model()
    unfused.blocks[-1].attn.fused_attn = False
    for model in (unfused, tiny_model(block_fn=ParallelScalingBlock)):
        message = (
            rf"^attention maps cannot be read off a {type(model.blocks[-1]).__name__} whose attention is "
            rf"not PyTorch's "
            r"fused one: unset TIMM_FUSED_ATTN, or choose a run on another backbone$"
        )
        with pytest.raises(UserError, match=message):
            last_attention(plain(model), images())
