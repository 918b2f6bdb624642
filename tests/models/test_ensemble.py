"""Prompt ensembling: several tuned states on one backbone."""

import pytest
import torch

from helpers.tiny import images, relative_error, tiny_classifier, tiny_model
from visprompt.errors import UserError
from visprompt.models.ensemble import Ensemble
from visprompt.models.methods import METHODS


def states(classifier, count=3):
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        own = classifier.tuned_state()
        noise = {
            n: 0.2 * torch.randn(t.shape, generator=generator)
            for n, t in own.items()
            if t.is_floating_point()
        }
        found.append(own | {n: own[n] + values for n, values in noise.items()})
    return found


MASKS = {"token_mask": [1, 0, 1], "segment_mask": [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in METHODS),
        ("e2vpt", MASKS | {"num_tokens": 3, "num_segments": 4}),
        ("vpt_deep", {"depth": 2, "depth_from": "last"}),
        ("vpt_shallow", {"location": "concat_channel"}),
        ("vpt_deep", {"frozen": True, "dropout": 0.0}),
    ],
)
def test_its_logits_are_the_mean_of_its_members(method, options):
    classifier = tiny_classifier(method, **options).eval()
    own, x, members = classifier(images()), images(), states(classifier)
    together = Ensemble(classifier, members)(x)
    assert torch.equal(classifier(x), own), "the classifier keeps its own state"
    singles = []
    for state in members:
        classifier.load_tuned_state(state)
        singles.append(classifier(x))
    assert not torch.allclose(singles[0], singles[1], atol=0.1)
    assert relative_error(together, torch.stack(singles).mean(0)) < 1e-5


@pytest.mark.parametrize(
    ("method", "options", "runs"),
    [("vpt_deep", {"depth": 1, "depth_from": "last"}, 1), ("linear", {}, 1), ("vpt_deep", {}, 3)],
)
def test_what_all_members_have_in_common_is_computed_once(method, options, runs):
    classifier = tiny_classifier(method, **options).eval()
    ran = []
    classifier.backbone.model.patch_embed.register_forward_hook(lambda *_: ran.append(1))
    Ensemble(classifier, states(classifier))(images())
    assert len(ran) == runs


def test_states_that_do_not_fit_are_named():
    classifier = tiny_classifier(model=tiny_model())
    with pytest.raises(UserError, match="an ensemble needs at least one tuned state"):
        Ensemble(classifier, [])
    with pytest.raises(UserError, match=r"the tuned state does not fit this classifier: it lacks .'prompts'"):
        Ensemble(classifier, [{"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}])
