"""Masks of images of any size: of one scale and of several, of an ensemble, and of a bank next to others."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import visprompt
from helpers.cli import NET
from helpers.segmented import picture, segmenter, write_state
from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.models.attention import last_attention
from visprompt.models.backbones import DEMO, BackboneSpec, build_backbone
from visprompt.models.bank import Bank
from visprompt.models.dense_prediction import FACTORS, MultiScale, mask_of
from visprompt.models.ensemble import Ensemble
from visprompt.models.tuned_state import load_state


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_mask_has_the_size_of_its_image_and_the_class_of_the_largest_resized_logit():
    logits = images(5, 9, 12)
    mask = mask_of(logits, (31, 40))
    large = F.interpolate(logits[None], (31, 40), mode="bilinear")[0]
    assert mask.labels.dtype == np.uint8
    assert np.array_equal(mask.labels, large.argmax(0).numpy())
    assert mask.probability == pytest.approx(float(logits.softmax(0).amax(0).mean()))
    logits[0, 0, 0] = torch.nan
    assert np.isnan(mask_of(logits, (31, 40)).probability)


class Shifted(torch.nn.Module):
    """Logits that depend on neighbours to the left, so that a mirror image has others."""

    def forward(self, x):
        return torch.cat([x, x.roll(1, -1)[:, :2]], 1)


@torch.no_grad()
def test_several_scales_are_the_mean_of_probabilities_over_sizes_and_mirror_images():
    network, x = Shifted(), images(2, 3, 10, 14)
    total = torch.zeros(2, 5, 10, 14)
    for factor in FACTORS:
        size = [int(side * factor + 0.5) for side in (10, 14)]
        y = F.interpolate(x, size, mode="bilinear", antialias=True)
        for flipped in (False, True):
            logits = network(torch.flip(y, [3]) if flipped else y)
            logits = torch.flip(logits, [3]) if flipped else logits
            total += F.interpolate(logits, (10, 14), mode="bilinear").softmax(1)
    found = MultiScale(network)(x)
    assert torch.allclose(found.softmax(1), total / 12, atol=1e-6)
    assert torch.allclose(found.exp(), total / 12, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize(
    "method", ["vpt_deep", "linear"]
)  # a linear's members have the whole backbone in common
def test_an_ensemble_of_segmenters_is_the_mean_of_their_logits_at_any_size(method):
    members = [segmenter(method, seed=seed) for seed in (0, 1)]
    together = Ensemble(members[0], [member.tuned_state() for member in members]).eval()
    for shape in ((2, 3, 64, 64), (1, 3, 70, 100), (1, 3, 50, 64)):
        x = images(*shape)
        mean = (members[0](x) + members[1](x)) / 2
        assert together(x).shape == (shape[0], 3, *shape[2:])
        assert torch.allclose(together(x), mean, atol=1e-4 * float(mean.abs().max()))


def test_a_bank_computes_segmentation_tasks_beside_others_on_the_same_weights(tmp_path):
    masks = write_state(tmp_path / "masks.safetensors", num_tokens=3)
    other = write_state(tmp_path / "other.safetensors", "other", kind="single_label", method="linear")
    backbone = build_backbone(BackboneSpec(name=DEMO, pretrained=False, kwargs=NET))
    bank = Bank(backbone)
    task = bank.add("masks", masks)
    bank.add("other", other)
    assert (task.kind.name, task.shares, bank.task("other").shares) == ("segmentation", False, True)
    pixels = picture(tmp_path / "a.png", 40, 90)
    prepared = to_input(pixels, load_state(masks).preprocessing)
    assert prepared.shape == (3, 64, 144), "the short side has the size of a window"
    x = images(2, 3, 64, 64)
    logits = bank([x[0], pixels, x[1], x[0]], ["masks", "masks", "other", "other"])
    alone, flat = visprompt.load(masks), visprompt.load(other)
    with torch.inference_mode():
        assert torch.allclose(logits[0], alone(x[:1])[0], atol=1e-4)
        assert torch.allclose(logits[1], alone(prepared[None])[0], atol=1e-4)
        assert torch.allclose(torch.stack(logits[2:]), flat(x.flip(0)), atol=1e-4)
    own = sum(t.nbytes for t in load_state(masks).tensors.values())
    assert own <= task.nbytes < 2 * own, "the backbone's weights are shared"
    with pytest.raises(UserError, match="a segmentation task pools no token whose attention could be shown"):
        bank.attention(x[0], task)


def test_what_needs_one_label_for_an_image_is_refused():
    classifier = segmenter("lora")
    with pytest.raises(
        UserError, match="a segmentation task cannot be merged, because a timm model has no head"
    ):
        visprompt.merge(classifier)
    with pytest.raises(UserError, match="look at its mask instead"):
        last_attention(classifier, images(1, 3, 64, 64))
