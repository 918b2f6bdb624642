"""VAPT: prompts made of each image's own patch tokens."""

import pytest
import torch
from torch.nn import functional as F

from helpers.tiny import NUM_CLASSES, VIT_B_SIZE, geometry, images, measured, tiny_model, worst_error
from visprompt.errors import UserError
from visprompt.models.backbones.vit import ViT
from visprompt.models.classifier import Classifier
from visprompt.models.methods.vapt import VAPT

TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)
BACKBONES = [
    {},
    {"global_pool": "avg", "class_token": False},
    {"reg_tokens": 4, "global_pool": "map", "qk_norm": True, "init_values": 0.5},
    {"pre_norm": True},
]
SHAPES = {
    "prompts": [1, 3, 32], "norm_weight": [3, 32], "norm_bias": [3, 32], "conv": [3, 2, 2], "mix_weight": [3, 3, 9],
    "mix_bias": [3, 3], "down": [32, 8], "up": [8, 32], "head.weight": [5, 32], "head.bias": [5],
}  # fmt: skip


def classifier(exact=True, draw=True, dropout=0.0, **model_options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model(**model_options), exact=exact)
    method = VAPT(backbone, num_tokens=3, dropout=dropout)
    if draw:
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return Classifier(backbone, method, NUM_CLASSES)


def made_of(method, i, patches, channels=None):
    """As the paper reads: norm, map, one kernel in every channel, linear over positions, bottleneck with residual."""
    x = F.layer_norm(patches, patches.shape[-1:], method.norm_weight[i], method.norm_bias[i])
    x = x.transpose(1, 2).unflatten(2, (4, 4))
    width = x.shape[1]
    x = F.conv2d(x, method.conv[i].expand(width, 1, 2, 2), groups=width).flatten(2)
    x = x if channels is None else x * channels[:, :, None]
    x = F.linear(x, method.mix_weight[i], method.mix_bias[i]).transpose(1, 2)
    return x + F.linear(F.relu(F.linear(x, method.down.T)), method.up.T)


def naive_logits(model, x):
    """All tokens through timm's whole blocks."""
    vit, method = model.backbone.model, model.method
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for i, block in enumerate(vit.blocks):
        patches = x[:, vit.num_prefix_tokens :]
        own = made_of(method, i - 1, patches) if i else method.prompts.expand(len(x), -1, -1)
        x = block(torch.cat([own, x], dim=1))[:, own.shape[1] :]
    return model.head(vit.forward_head(vit.norm(x), pre_logits=True))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("options", BACKBONES, ids=str)
def test_logits_and_gradients_are_those_of_the_naive_prompts(options, exact):
    model = classifier(exact=exact, **options)
    assert (
        worst_error(measured(model, model(images())), measured(model, naive_logits(model, images()))) < 1e-5
    )


def test_every_image_has_prompts_of_its_own():
    model = classifier().eval()
    x = images(3)
    singles = torch.cat([model(one[None]) for one in x])
    assert torch.allclose(model(x), singles, atol=1e-5)
    tokens = model.method.tokens(2, model.backbone.embed(x, model.method))
    assert tokens.shape == (3, 3, 32)
    assert not torch.allclose(tokens[0], tokens[1], atol=0.1)


def test_made_prompts_start_at_zero():
    method = classifier(draw=False).method
    assert torch.equal(method.tokens(1, torch.randn(2, 17, 32)), torch.zeros(2, 3, 32))
    assert method.prompts.abs().min() > 0


def test_names_shapes_and_the_papers_count():
    model = classifier()
    assert {name: list(tensor.shape) for name, tensor in model.tuned_state().items()} == SHAPES
    p, d, r = 10, 768, 8
    count = p * d + 11 * (2 * d + 4 + (169 + 1) * p) + 2 * d * r
    assert sum(t.numel() for t in VAPT(VIT_B, num_tokens=p, bottleneck=r).parameters()) == count == 55_608
    model(images()).sum().backward()
    assert {n for n, t in model.named_parameters() if t.grad is not None} == set(model.tuned_names)


def test_dropout_takes_whole_channels_of_the_map():
    """Without the bottleneck, a prompt's channel is kept for all tokens of an image or for none."""
    method = classifier(dropout=0.5).method.train()
    with torch.no_grad():
        method.up.zero_()
        method.mix_bias.zero_()
    x = torch.randn(4, 17, 32)
    tokens = method.tokens(1, x).detach()
    kept = (tokens != 0).all(1)
    assert torch.equal(kept, (tokens != 0).any(1))
    assert 0.3 < kept.float().mean() < 0.7
    assert torch.allclose(tokens, made_of(method, 0, x[:, 1:], 2.0 * kept).detach(), atol=1e-5)
    method.eval()
    assert torch.allclose(method.tokens(1, x), made_of(method, 0, x[:, 1:]), atol=1e-5)


@pytest.mark.parametrize(
    ("geometry", "options", "message"),
    [
        (TINY, {"bottleneck": 0}, "method.bottleneck=0 is too small: give at least 1"),
        (TINY, {"num_tokens": 0}, "method.num_tokens=0 is too small"),
        (
            geometry(grids=((1, 4),) * 4),
            {},
            r"vapt needs a grid of at least 2x2 patches, and .* \(1, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(geometry, options, message):
    with pytest.raises(UserError, match=message):
        VAPT(geometry, **options)
