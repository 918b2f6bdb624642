"""The kinds of tasks, compared with scikit-learn and with sums by hand."""

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import average_precision_score, f1_score

from visprompt.errors import UserError
from visprompt.models.api import build
from visprompt.models.kind import KINDS, MULTI_LABEL, SINGLE_LABEL

LABELS = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def logits():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(3)) * 2


def test_the_figures_of_multi_label_tasks_are_scikit_learns():
    figures, x = MULTI_LABEL.figures(4), logits()
    for rows in (slice(0, 3), slice(3, 5)):
        figures.update(x[rows], LABELS[rows], torch.ones(len(x[rows])))
    figures.update(torch.full((1, 4), 9.0), torch.ones(1, 4, dtype=torch.long), torch.zeros(1))  # a filler
    found = figures.compute()
    truth, shares, chosen = LABELS.numpy(), x.sigmoid().numpy(), (x > 0).long().numpy()
    present = [0, 1, 3]  # no image has class 2
    expected = [average_precision_score(truth[:, c], shares[:, c]) for c in present]
    assert found["per_class"] == pytest.approx([*expected[:2], None, expected[2]])
    assert found["map"] == pytest.approx(np.mean(expected))
    assert found["f1"] == pytest.approx(np.mean([f1_score(truth[:, c], chosen[:, c]) for c in present]))
    assert found["f1_micro"] == pytest.approx(f1_score(truth, chosen, average="micro"))
    assert found["exact"] == pytest.approx((truth == chosen).all(1).mean())
    assert found["count"] == 5


def test_large_logits_keep_their_order():
    figures = MULTI_LABEL.figures(2)
    # in float32 both would be 1.0, and the precision 0.5
    x, labels = torch.tensor([[20.0, 30.0], [30.0, 20.0]]), torch.tensor([[0, 1], [1, 0]])
    figures.update(x, labels, torch.ones(2))
    assert figures.compute()["map"] == 1.0


def test_the_loss_of_an_image_is_the_mean_binary_cross_entropy_of_its_classes():
    x = logits()
    shares = x.sigmoid()
    terms = -(LABELS * shares.log() + (1 - LABELS) * (1 - shares).log())
    torch.testing.assert_close(MULTI_LABEL.loss(x, LABELS), terms.mean(1))
    assert SINGLE_LABEL.loss(x, torch.zeros(5, dtype=torch.long)).shape == (5,)


def test_an_image_is_right_if_all_its_classes_are():
    x = torch.where(LABELS > 0, 2.0, -2.0)
    assert MULTI_LABEL.correct(x, LABELS).tolist() == [1.0] * 5
    x[1, 0] = 0.1
    assert MULTI_LABEL.correct(x, LABELS).tolist() == [1.0, 0.0, 1.0, 1.0, 1.0]
    single = torch.tensor([[0.0, 3.0], [1.0, 0.5]])
    assert SINGLE_LABEL.correct(single, torch.tensor([1, 1])).tolist() == [1.0, 0.0]


def test_probabilities_and_decisions():
    x = logits()
    assert torch.equal(MULTI_LABEL.probabilities(x), x.sigmoid())
    assert torch.equal(MULTI_LABEL.decide(x.sigmoid()), (x > 0).long())
    assert torch.equal(SINGLE_LABEL.probabilities(x), x.softmax(1))
    assert torch.equal(SINGLE_LABEL.decide(x.softmax(1)), x.argmax(1))
    assert set(KINDS) == {"single_label", "multi_label"}


@pytest.mark.parametrize("method", ["da_vpt", "pae", "sa2vp"])
def test_methods_that_read_one_class_refuse_several(method):
    with pytest.raises(UserError, match=r"^this method reads one class for each image from the labels"):
        build(timm.create_model("test_vit"), method, num_classes=3, kind="multi_label")
