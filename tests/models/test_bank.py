"""A batch that mixes tasks gives each image the logits of its own classifier."""

import pytest
import torch

import visprompt
from helpers.pairs import options, working
from helpers.tiny import RECORD, relative_error
from visprompt.models.bank import Bank
from visprompt.models.methods import METHODS
from visprompt.models.methods.describe import MEMBERS, member
from visprompt.models.tuned_state import TunedState

# what several tasks of one method may differ in
VARIANTS = {
    "vpt_deep": [{"num_tokens": 1}, {"num_tokens": 7}, {"num_tokens": 3, "depth": 1}, {"depth_from": "last", "depth": 1, "num_tokens": 2}],
    "vpt_shallow": [{"num_tokens": 2}, {"num_tokens": 5}],
    "e2vpt": [{"num_tokens": 4, "num_kv_tokens": 2}, {"num_tokens": 0, "num_kv_tokens": 3}],
    "cvpt": [{"num_tokens": 1}, {"num_tokens": 4}],
    "vapt": [{"num_tokens": 2}, {"num_tokens": 5}],
    "vpt_gated": [{"num_tokens": 2}, {"num_tokens": 4, "temperature": False}],
}


def tuned(method, family, classes, seed=0, **chosen):
    """A tuned state, and the classifier that it comes from."""
    torch.manual_seed(seed)
    classifier = visprompt.build(member(family), method, classes, **options(method, family) | chosen)
    with torch.no_grad():
        for _, parameter in classifier.tuned_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    names = tuple(f"c{i}" for i in range(classes))
    state = TunedState(
        **RECORD
        | {"method": classifier.origin.method, "backbone": classifier.origin.backbone, "class_names": names},
        tensors={name: tensor.clone() for name, tensor in classifier.tuned_state().items()},
    )
    return state, classifier.eval()


def batch(family, count):
    side = 32 if family in ("ViT", "Swin") else member(family).pretrained_cfg["input_size"][-1]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", MEMBERS)
def test_every_method_in_one_batch(family):
    bank, alone = Bank(member(family)), {}
    for i, method in enumerate(m for m in METHODS if m in working(family)):
        for j, chosen in enumerate(VARIANTS.get(method, [{}]) if family == "ViT" else [{}]):
            state, alone[f"{method} {j}"] = tuned(method, family, 2 + (i + j) % 4, seed=i + 7 * j, **chosen)
            bank.add(f"{method} {j}", state)
    names = sorted(alone, key=lambda name: name[::-1]) + sorted(alone)
    side = int(next(iter(alone.values())).backbone.image_size)
    x = torch.randn(len(names), 3, side, side, generator=torch.Generator().manual_seed(3))
    out = bank(x, names)
    bad = []
    with torch.inference_mode():
        for image, name, logits in zip(x, names, out, strict=True):
            e = relative_error(logits, alone[name](image[None])[0])
            if not e < 1e-5:
                bad.append((name, float(e)))
    print({n: bank.task(n).shares for n in alone})
    assert not bad
