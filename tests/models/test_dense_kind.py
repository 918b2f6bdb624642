"""The kind of task that gives each pixel a class, compared with counts by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch.nn import functional as F

from helpers.tiny import tiny_model
from visprompt.data.masks import IGNORED
from visprompt.errors import UserError
from visprompt.models import segmentation
from visprompt.models.api import build, load, save
from visprompt.models.objective import Objective
from visprompt.models.recipe import Recipe
from visprompt.models.segmentation import SEGMENTATION, largest, pixel_figures


def drawn(classes=4, size=(6, 7)):
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, classes, *size, generator=draw)
    labels = torch.randint(0, classes - 1, (3, *size), generator=draw)  # the last class has no pixel
    labels[:, 0] = IGNORED
    return logits, labels


def test_the_figures_are_those_of_a_count_by_hand():
    truth = [[0, 0, 1], [2, 255, 255]]
    taken = [[0, 1, 1], [2, 0, 3]]
    logits = F.one_hot(torch.tensor(taken), 5).movedim(-1, 0)[None].float()
    figures = SEGMENTATION.figures(5)
    figures.update(logits, torch.tensor([truth]), torch.ones(1))
    found = figures.compute()
    # class 0: 1 of 2 pixels; 1: 1 of 2; 2: 1 of 1; the pixels taken for class 3 are ignored; 4 is nowhere
    assert found["per_class"] == [0.5, 0.5, 1.0, None, None]
    assert found["miou"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert found["mean_acc"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["pixel_acc"] == 3 / 4
    assert found["count"] == 1
    assert int(found["confusion"].sum()) == 4


def test_the_figures_are_scikit_learns_and_do_not_see_filler_images():
    logits, labels = drawn()
    figures = SEGMENTATION.figures(4)
    figures.update(logits[:2], labels[:2], torch.ones(2))
    figures.update(logits[2:], labels[2:], torch.ones(1))
    figures.update(logits[:1], 1 - labels[:1].clamp(max=1), torch.zeros(1))
    found = figures.compute()
    known = labels != IGNORED
    truth, taken = labels[known].numpy(), logits.argmax(1)[known].numpy()
    np.testing.assert_array_equal(found["confusion"], confusion_matrix(truth, taken, labels=range(4)))
    assert found["miou"] == pytest.approx(jaccard_score(truth, taken, average="macro"))
    assert found["pixel_acc"] == pytest.approx((truth == taken).mean())
    assert found["count"] == 3
    assert pixel_figures(found["confusion"])["per_class"][3] == 0.0  # predicted, but never right


def test_the_loss_of_an_image_is_its_cross_entropy_over_all_pixels():
    logits, labels = drawn()
    known = labels != IGNORED
    chosen = logits.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0]
    torch.testing.assert_close(SEGMENTATION.loss(logits, labels), -(chosen * known).sum((1, 2)) / 42)
    small = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        SEGMENTATION.loss(small, labels.repeat_interleave(3, 1)[:, :9, :6]),
        SEGMENTATION.loss(small, labels.repeat_interleave(3, 1)[:, 1:9:3, 1:6:2]),
    )
    ignored = torch.full_like(labels, IGNORED)
    assert SEGMENTATION.loss(logits, ignored).tolist() == [0.0] * 3


def test_large_maps_are_classified_in_parts_of_the_classes_with_the_same_result(monkeypatch):
    logits = torch.randn(2, 50, 5, 6, generator=torch.Generator().manual_seed(3))
    whole = F.interpolate(logits, size=(11, 9), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(largest(logits, (11, 9)), whole)
    monkeypatch.setattr(segmentation, "_CLASSES_AT_ONCE", 7)
    assert torch.equal(largest(logits, (11, 9)), whole)
    assert torch.equal(largest(logits, (5, 6)), logits.argmax(1))


def test_an_image_is_as_right_as_its_share_of_labelled_pixels():
    logits, labels = drawn()
    known = labels != IGNORED
    expected = ((logits.argmax(1) == labels) & known).sum((1, 2)) / 35
    torch.testing.assert_close(SEGMENTATION.correct(logits, labels), expected)
    assert SEGMENTATION.correct(logits, torch.full_like(labels, IGNORED)).tolist() == [0.0] * 3
    torch.testing.assert_close(SEGMENTATION.probabilities(logits, 2.0), (logits / 2).softmax(1))
    assert SEGMENTATION.fit_temperature(logits, labels) is None
    assert SEGMENTATION.confusion_rows(torch.eye(2).long(), ["a", "b"])[0] == ("true", "predicted", "pixels")


RECIPE = {
    "optimizer": "sgd",
    "lr": 1.0,
    "weight_decay": 0.0,
    "batch_size": 4,
    "epochs": 3,
    "warmup_epochs": 0,
}


@pytest.mark.parametrize(
    ("setting", "shown"),
    [({"mixup": 0.2}, "mixup=0.2"), ({"class_weights": "balanced"}, "class_weights=balanced"),
     ({"sampling": "balanced"}, "sampling=balanced")],
)  # fmt: skip
def test_settings_for_images_with_one_label_are_refused(setting, shown):
    with pytest.raises(UserError) as refusal:
        Objective(Recipe(**RECIPE, **setting), SEGMENTATION, 3, 0)
    assert str(refusal.value) == (
        f"recipe.{shown} is for images with one label, and here each pixel has one: leave it out"
    )


def test_a_saved_classifier_of_pixels_is_loaded_with_its_head(tmp_path):
    model = tiny_model(depth=12)
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    classifier = build(model, "vpt_deep", 3, kind="segmentation", head="setr_pup", num_tokens=2).eval()
    save(classifier, tmp_path / "s.safetensors", class_names=["a", "b", "c"])
    loaded = load(tmp_path / "s.safetensors", model)
    x = torch.randn(1, 3, 40, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(loaded(x), classifier(x))
    assert loaded.kind is SEGMENTATION
    assert [n for n in loaded.tuned_state() if n.startswith("head.auxiliary.2.norms")]
