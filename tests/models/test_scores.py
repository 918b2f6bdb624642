"""Figures of classes and intervals, compared with scikit-learn's and SciPy's."""

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support

from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.scores import class_scores, confused, confusion_rows, in_percent, wilson

CONFUSION = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 2, 0], [0, 0, 5, 2]])


def test_figures_of_classes_are_scikit_learns():
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(200), labels] += 1
    figures = SINGLE_LABEL.figures(5)
    figures.update(logits, labels, torch.ones(200))
    found = class_scores(figures.compute()["confusion"])
    expected = precision_recall_fscore_support(labels, logits.argmax(1))
    assert [score.precision for score in found] == pytest.approx(list(expected[0]))
    assert [score.recall for score in found] == pytest.approx(list(expected[1]))
    assert [score.f1 for score in found] == pytest.approx(list(expected[2]))
    assert [score.count for score in found] == list(expected[3])


def test_a_class_without_images_or_predictions_has_no_such_figure():
    confusion = torch.tensor([[2, 1, 0], [0, 0, 0], [1, 0, 0]])
    cat, dog, eel = class_scores(confusion)
    assert (cat.count, cat.precision, cat.recall, cat.f1) == (3, 2 / 3, 2 / 3, 4 / 6)
    assert (dog.count, dog.precision, dog.recall, dog.f1) == (0, 0.0, None, 0.0)
    assert (eel.count, eel.precision, eel.recall, eel.f1) == (1, None, 0.0, 0.0)
    assert class_scores(torch.zeros(1, 1, dtype=torch.int64))[0].f1 is None


def test_pairs_that_are_confused_and_the_rows_of_the_file():
    assert confused(CONFUSION, 2) == [(3, 2, 5), (2, 0, 2)]
    assert confused(CONFUSION, 9) == [(3, 2, 5), (2, 0, 2), (0, 1, 1)]
    assert int(CONFUSION.diagonal().sum()) == 7, "the matrix itself is not changed"
    assert confusion_rows(CONFUSION, "wxyz") == [
        ("true", "predicted", "images"),
        *[
            ("w", "w", "3"),
            ("w", "x", "1"),
            ("y", "w", "2"),
            ("y", "y", "2"),
            ("z", "y", "5"),
            ("z", "z", "2"),
        ],
    ]


@pytest.mark.parametrize(
    ("hits", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (37, 50), (797, 1000), (3, 200)]
)
def test_the_interval_is_wilsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_in_words():
    assert in_percent(0.4116) == "41.16 %"
    assert in_percent(0.4, wilson(0.4, 100)) == "40.00 % (95 % interval 30.9 to 49.8)"
