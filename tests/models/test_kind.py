"""The kinds of tasks, compared with scikit-learn and with sums by hand."""

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

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
    assert torch.equal(MULTI_LABEL.probabilities(x, 1.0), x.sigmoid())
    assert torch.equal(MULTI_LABEL.probabilities(x, 2.0), (x / 2).sigmoid())
    assert torch.equal(MULTI_LABEL.decide(x.sigmoid()), (x > 0).long())
    assert torch.equal(SINGLE_LABEL.probabilities(x, 1.0), x.softmax(1))
    assert torch.equal(SINGLE_LABEL.decide(x.softmax(1)), x.argmax(1))
    names = ["a", "b", "c", "d"]
    assert MULTI_LABEL.named(torch.tensor([0.9, 0.1, 0.6, 0.5]), names) == "a;c"
    assert MULTI_LABEL.named(torch.zeros(4), names) == ""
    assert SINGLE_LABEL.named(torch.tensor([0.1, 0.2, 0.6, 0.1]), names) == "c"
    assert set(KINDS) == {"single_label", "multi_label", "segmentation"}


@pytest.mark.parametrize("method", ["da_vpt", "pae", "sa2vp"])
def test_methods_that_read_one_class_refuse_several(method):
    with pytest.raises(UserError, match=r"^this method reads one class for each image from the labels"):
        build(timm.create_model("test_vit"), method, num_classes=3, kind="multi_label")


def test_the_decisions_of_each_class_are_scikit_learns():
    figures, x = MULTI_LABEL.figures(4), logits()
    figures.update(x, LABELS, torch.ones(5))
    decisions = figures.compute()["confusion"]
    truth, chosen = LABELS.numpy(), (x > 0).long().numpy()
    assert decisions.tolist() == multilabel_confusion_matrix(truth, chosen).tolist()
    precision, recall, f1, count = precision_recall_fscore_support(truth, chosen, zero_division=np.nan)
    for place, score in enumerate(MULTI_LABEL.class_scores(decisions)):
        assert score.count == count[place]
        found = [np.nan if figure is None else figure for figure in (score.precision, score.recall, score.f1)]
        assert found == pytest.approx([precision[place], recall[place], f1[place]], nan_ok=True)
    rows = MULTI_LABEL.confusion_rows(decisions, ["a", "b", "c", "d"])
    (right, wrong), (missed, hit) = decisions[0].tolist()
    assert rows[1] == ("a", *map(str, (hit, wrong, missed, right)))
    assert (MULTI_LABEL.confused(decisions, 3), MULTI_LABEL.interval) == ([], None)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_smoothing_of_several_classes(smoothing):
    x, weights = logits(), torch.tensor([1.0, 2.0, 0.5, 4.0])
    target = torch.where(LABELS > 0, 1 - smoothing / 2, smoothing / 2)
    terms = -(target * x.sigmoid().log() + (1 - target) * (1 - x.sigmoid()).log()) * weights
    torch.testing.assert_close(MULTI_LABEL.loss(x, LABELS, smoothing, weights), terms.mean(1))
    # the weighted mean divides by the weights of all decisions
    assert MULTI_LABEL.weights(LABELS, weights).tolist() == [weights.mean()] * 5
    assert MULTI_LABEL.counts(LABELS, 4).tolist() == LABELS.sum(0).tolist()


def test_the_accuracies_of_all_classes_are_read_at_once():
    """On a GPU each number that is read makes the host wait."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for classes in (3, 300):
        figures = SINGLE_LABEL.figures(classes)
        figures.update(torch.eye(classes), torch.arange(classes), torch.ones(classes))
        with Reads() as reads:
            found = figures.compute()
        assert found["per_class"] == [1.0] * classes
        counts.append(reads.count)
    assert counts[0] == counts[1] < 10
