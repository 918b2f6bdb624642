"""A training step and an evaluation of every method on every family, on a CUDA device that is pretended.

Shapes, types, devices and halts are those of a GPU; numbers are not computed. What a GPU computes is measured
by `make bench-gpu`.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from helpers.pairs import options, works
from helpers.pretended_cuda import backward, cuda_autocast, pretended_cuda
from helpers.tiny import images, tiny_classifier, tiny_model
from helpers.wide import REPRESENTATIVES, case
from visprompt.models.frozen_weights import cast_frozen
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import MEMBERS, attempt
from visprompt.models.optim import Recipe, build_optimizer

PAIRS = [(m, f) for f in MEMBERS for m in METHODS if works(m, f)]


def is_fast(method, family):
    return method in REPRESENTATIVES if family == "ViT" else method == "vpt_deep"


@pytest.mark.parametrize(
    ("method", "family"), [case(m, f, fast=is_fast(m, f), id=f"{m}, {f}") for m, f in PAIRS]
)
def test_a_step_and_an_evaluation_stay_on_the_device_and_never_ask_it_for_a_number(method, family):
    classifier = attempt(method, family, **options(method, family)).train()
    classifier.zero_grad(set_to_none=True)
    cast_frozen(classifier, torch.bfloat16)  # as runs in mixed precision do
    side = classifier.backbone.image_size
    with pretended_cuda(
        classifier
    ):  # asking for a number (`.item()`, `if tensor:`) is an error of fake tensors
        x = torch.randn(3, 3, side, side, device="cuda")
        labels, weights = torch.zeros(3, dtype=torch.long, device="cuda"), torch.ones(3, device="cuda")
        recipe = Recipe(epochs=2, warmup_epochs=0, lr=0.1, weight_decay=0.1, optimizer="sgd", batch_size=3)
        tuned = dict(classifier.tuned_parameters())
        optimizer, _ = build_optimizer(tuned.items(), recipe, 2, classifier.method.undecayed)
        with cuda_autocast():
            logits = classifier(x)
        backward(classifier.losses(logits.float(), labels, weights).mean())
        optimizer.step()
        assert {n: (p.grad.device, p.grad.dtype, p.grad.shape) for n, p in tuned.items()} == {
            n: (x.device, torch.float32, p.shape) for n, p in tuned.items()
        }
        assert not [n for n, p in classifier.named_parameters() if n not in tuned and p.grad is not None]
        classifier.eval()
        with torch.no_grad(), cuda_autocast():
            again = classifier(classifier.frozen(x)) if classifier.has_frozen_part else classifier(x)
        for out in (logits, again):
            assert (out.device, out.dtype, out.shape) == (
                x.device,
                torch.bfloat16,
                (3, classifier.num_classes),
            )


class Calls(TorchFunctionMode):
    """Keeps the queries, keys, values and options of every attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append((*args, kwargs["attn_mask"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [
        # 17 tokens of an image; the last block computes the class token alone
        (1, [(17, 18), (17, 18), (17, 18), (1, 18)]),
        (10, [(17, 27), (17, 27), (17, 27), (1, 27)]),
    ],
)
def test_a_fused_kernel_may_serve_every_attention_of_the_exact_path(prompts, lengths, capfd):
    classifier = tiny_classifier("vpt_deep", model=tiny_model(), num_tokens=prompts, dropout=0.0)
    with pretended_cuda(classifier), Calls() as seen, cuda_autocast():
        classifier(torch.randn(3, 3, 32, 32, device="cuda"))
    assert [(q.shape[2], k.shape[2]) for q, k, _, _ in seen.calls] == lengths
    for q, k, v, mask in seen.calls:
        assert mask is None
        assert {part.dtype for part in (q, k, v)} == {torch.bfloat16}
        assert {part.stride(-1) for part in (q, k, v)} == {1}
        assert {part.shape[-1] for part in (q, k, v)} == {16}  # at most 256 and a multiple of 8
        assert k.shape == v.shape
        # PyTorch's own predicates; on a machine without a GPU the missing device must be their only objection
        parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        for usable in (
            torch.backends.cuda.can_use_flash_attention,
            torch.backends.cuda.can_use_efficient_attention,
        ):
            capfd.readouterr()
            usable_here = usable(parameters, True)
            objections = capfd.readouterr().err
            assert usable_here or "requires a CUDA device" in objections, objections


def test_keys_and_values_are_not_copied_where_there_is_one_part(monkeypatch):
    classifier = tiny_classifier("linear", model=tiny_model()).eval()
    joined = []
    cat = torch.cat

    def counted(parts, *args, **kwargs):
        parts = list(parts)
        if parts[0].ndim == 4:
            joined.append(len(parts))
        return cat(parts, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", counted)
    classifier(images(2))
    assert set(joined) <= {2}
