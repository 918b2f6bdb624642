"""VFPT: which prompts are transformed and how, and that it is VPT-deep otherwise."""

import numpy as np
import pytest
import torch

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
from visprompt.models.methods.vfpt import VFPT
from visprompt.models.methods.vpt import VPT

TINY = geometry()
VIT_B = geometry(**VIT_B_SIZE)


def classifier(cls=VFPT, exact=True, model=None, **options):
    torch.manual_seed(1)
    backbone = ViT(tiny_model() if model is None else model, exact=exact)
    return Classifier(backbone, cls(backbone, num_tokens=5, dropout=0.0, **options), NUM_CLASSES)


def slow_fourier(prompts):
    """The sum that defines the transform, with matrices of cosines and sines."""
    parts = []
    for n in prompts.shape:
        angle = 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
        parts.append((torch.tensor(np.cos(angle)).float(), torch.tensor(np.sin(angle)).float()))
    (cos_p, sin_p), (cos_d, sin_d) = parts
    return cos_p @ prompts @ cos_d - sin_p @ prompts @ sin_d


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("share", "count"), [(0.3, 1), (0.6, 3), (1.0, 5)])
def test_logits_and_gradients_are_those_of_the_naive_transform(share, count, exact):
    model = classifier(fourier_share=share, exact=exact)
    prompts = torch.stack([torch.cat([slow_fourier(p[:count]), p[count:]]) for p in model.method.prompts])
    naive = model.head(naive_features(model.backbone.model, images(), prompts, 0, False))
    assert worst_error(measured(model, model(images())), measured(model, naive)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"depth": 2, "depth_from": "last"}])
def test_share_0_is_vpt_deep(options):
    fourier, plain = classifier(fourier_share=0.0, **options), classifier(VPT, **options)
    assert fourier.tuned_names == plain.tuned_names
    assert torch.equal(fourier(images()), plain(images()))
    assert worst_error(measured(fourier, fourier(images())), measured(plain, plain(images()))) == 0


def test_a_share_is_rounded_down_but_not_by_binary_fractions():
    counts = [
        VFPT(TINY, num_tokens=n, fourier_share=s).num_fourier for n, s in ((100, 0.29), (10, 0.99), (5, 0.1))
    ]
    assert counts == [29, 9, 0]


def test_dropout_comes_before_the_transform():
    method = VFPT(TINY, num_tokens=4, fourier_share=0.5, dropout=0.5).train()
    torch.manual_seed(3)
    tokens = method.tokens(1, torch.zeros(2, 5, 32))
    torch.manual_seed(3)
    dropped = method.dropout(method.prompts[1].expand(2, -1, -1))
    assert torch.equal(tokens[:, 2:], dropped[:, 2:])
    for one, values in zip(tokens, dropped, strict=True):
        assert torch.allclose(one[:2], slow_fourier(values[:2]), atol=1e-4)


def test_nothing_is_added_to_what_vpt_deep_tunes_and_saves():
    assert list(classifier().tuned_state()) == ["prompts", "head.weight", "head.bias"]
    assert sum(p.numel() for p in VFPT(VIT_B, num_tokens=50, fourier_share=0.7).parameters()) == 12 * 50 * 768


def test_it_runs_in_16_bits():
    method = VFPT(TINY).bfloat16()
    assert method.tokens(0, torch.zeros(2, 5, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fourier_share": 1.1}, "method.fourier_share=1.1 is not a share: give a number from 0 to 1"),
        ({"fourier_share": float("nan")}, "method.fourier_share=nan is not a share"),
        ({"num_tokens": 0}, "method.num_tokens=0 is too small"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        VFPT(TINY, **options)
