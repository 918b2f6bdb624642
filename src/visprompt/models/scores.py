"""Figures derived from counts: precision, recall and F1 of each class, and the interval of a share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile, for an interval of 95 %


@dataclass(frozen=True)
class ClassScore:
    """The figures of one class.

    Attributes:
        count: Number of images, or of pixels, of the class.
        precision: Share of those predicted as the class that are of it; None if none was predicted.
        recall: Share of those of the class that were predicted as it; None if the count is 0.
        f1: Harmonic mean of precision and recall; None if the class is neither there nor predicted.
    """

    count: int
    precision: float | None
    recall: float | None
    f1: float | None


def class_scores(confusion: Tensor) -> list[ClassScore]:
    """Return the figures of each class.

    Args:
        confusion: Counts [C, C], a row for each true class, a column for each predicted class.
    """
    hits, counts, taken = (
        values.tolist() for values in (confusion.diagonal(), confusion.sum(1), confusion.sum(0))
    )
    return [
        ClassScore(count, _share(hit, predicted), _share(hit, count), _share(2 * hit, count + predicted))
        for hit, count, predicted in zip(hits, counts, taken, strict=True)
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def confused(confusion: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Return the most common mistakes, the most common first.

    Args:
        confusion: Counts [C, C], a row for each true class.
        most: Maximum number of pairs.

    Returns:
        Triples of a true class, the class it was taken for, and the number of images.
    """
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    pairs = [(*pair, int(wrong[tuple(pair)])) for pair in wrong.nonzero().tolist()]
    return sorted(pairs, key=lambda pair: -pair[2])[:most]


def confusion_rows(confusion: Tensor, names: Sequence[str], unit: str = "images") -> list[tuple[str, ...]]:
    """Return a confusion matrix as rows of text: a header, then each pair of classes that occurs.

    The size is limited by the number of images. A matrix of 10,000 classes would have 100 million cells.

    Args:
        confusion: Counts [C, C], a row for each true class.
        names: Names of the classes.
        unit: What is counted.
    """
    pairs = confusion.nonzero().tolist()
    listed = [(names[true], names[taken], str(int(confusion[true, taken]))) for true, taken in pairs]
    return [("true", "predicted", unit), *listed]


def decision_scores(decisions: Tensor) -> list[ClassScore]:
    """Return the figures of each class of which an image may have several.

    Args:
        decisions: Counts [C, 2, 2], for each class a row for the truth, 0 or 1, a column for the prediction.
    """
    return [
        ClassScore(
            missed + hit,
            _share(hit, hit + wrong),
            _share(hit, hit + missed),
            _share(2 * hit, 2 * hit + wrong + missed),
        )
        for (_, wrong), (missed, hit) in decisions.tolist()
    ]


def decision_rows(decisions: Tensor, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the decisions as rows of text: a header, then a row for each class.

    Args:
        decisions: Counts [C, 2, 2], see `decision_scores`.
        names: Names of the classes.
    """
    header = ("class", "true positives", "false positives", "false negatives", "true negatives")
    rows = [
        (name, *map(str, (hit, wrong, missed, right)))
        for name, ((right, wrong), (missed, hit)) in zip(names, decisions.tolist(), strict=True)
    ]
    return [header, *rows]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of independent images (Wilson's score interval).

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927. It tells
    how much the share would vary with other images from the same source, not with other seeds.

    Args:
        share: The share that was found, 0 to 1.
        count: Number of images, 1 or more.
    """
    squared = _Z**2 / count
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / count + squared / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def in_percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """Return a share as text, with its interval if there is one: "41.20 % (95 % interval 37.8 to 44.7)"."""
    shown = f"{100 * share:.2f} %"
    if interval is None:
        return shown
    low, high = interval
    return f"{shown} (95 % interval {100 * low:.1f} to {100 * high:.1f})"
