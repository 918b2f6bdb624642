"""Every method on a small member of every family: it works whole, or one sentence says why not.

Which pairs work is what docs/methods-by-backbones.md says. What a family's own file tests too is slow here.
"""

import pytest
import torch
from torch.nn import functional as F

from helpers.pairs import options, works
from helpers.tiny import relative_error
from helpers.wide import REPRESENTATIVES, case
from visprompt.models.merge import merge
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import MEMBERS, attempt, refusal

SLOW = {"sidetune"}  # 40 M operations an image: the ViT's battery has it
PAIRS = [
    (m, f) for f in MEMBERS for m in METHODS if works(m, f) and f != "ViT" and not (m in SLOW and f != "Swin")
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_a_plain_vit(method):
    assert works(method, "ViT")


# fast: every family with one method of each set of sites (`make docs` writes the page of all pairs)
@pytest.mark.parametrize(
    ("method", "family"),
    [case(m, f, fast=m in REPRESENTATIVES, id=f"{m}, {f}") for m in METHODS for f in MEMBERS],
)
def test_a_pair_works_or_one_sentence_says_why_not(method, family):
    reason = refusal(method, family, **options(method, family))
    if works(method, family):
        assert reason is None
    else:
        assert reason.startswith(f"method {method} cannot work on this backbone: ")
        assert "\n" not in reason


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), PAIRS, ids=[f"{m}, {f}" for m, f in PAIRS])
def test_exactly_what_is_tuned_gets_gradients_and_is_saved(method, family):
    classifier = attempt(method, family, **options(method, family))
    with_gradient = {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert with_gradient == set(classifier.tuned_names)
    assert all(torch.isfinite(p.grad).all() for _, p in classifier.tuned_parameters())

    twin = attempt(method, family, **options(method, family))
    with torch.no_grad():
        for _, parameter in twin.tuned_parameters():
            parameter.add_(1)
    state = {name: tensor.clone() for name, tensor in twin.tuned_state().items()}
    classifier.load_tuned_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.tuned_state().items())
    counted = classifier.summary()
    assert counted.tuned + counted.head == sum(p.numel() for _, p in classifier.tuned_parameters())


@pytest.mark.parametrize(
    ("method", "family"),
    [case(m, f, fast=m in REPRESENTATIVES, id=f"{m}, {f}") for m, f in PAIRS],
)
def test_two_images_give_what_each_gives_alone_and_the_frozen_part_may_be_kept(method, family):
    classifier = attempt(method, family, **options(method, family)).eval()
    side = classifier.backbone.image_size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = classifier(x)
        assert relative_error(torch.cat([classifier(x[:1]), classifier(x[1:])]), both) < 1e-5
        if classifier.has_frozen_part:
            assert relative_error(classifier(classifier.frozen(x)), both) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), PAIRS, ids=[f"{m}, {f}" for m, f in PAIRS])
def test_bfloat16_comes_close(method, family):
    classifier = attempt(method, family, **options(method, family)).eval()
    side = classifier.backbone.image_size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    exact = classifier(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(x)
        F.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    assert relative_error(logits.float(), exact) < 2**-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in MEMBERS if f != "ViT"])
@pytest.mark.parametrize("method", ["linear", "partial", "bias", "layernorm", "lora", "ssf", "full"])
def test_merged_is_a_plain_model_with_equal_logits(method, family):
    if not works(method, family):
        return
    classifier = attempt(method, family).eval()
    with torch.no_grad():
        for name, parameter in classifier.tuned_parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    merged = merge(classifier)
    side = classifier.backbone.image_size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    assert type(merged) is type(classifier.backbone.model)
    assert relative_error(merged(x), classifier(x)) < 1e-5
