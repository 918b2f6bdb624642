"""Choose and count training images before training: for initial values, and for class weights."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from visprompt.models.methods.inits import MAX_IMAGES
from visprompt.models.task_kind import TaskKind

Loader = Iterable[tuple[Tensor, Tensor]]


def plain_batches(loader: Loader, per_class: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a plain training loader, at most `MAX_IMAGES` images, or `per_class` of each class."""
    seen: Counter[int] = Counter()
    for images, labels in loader:
        if per_class is None and seen.total() >= MAX_IMAGES:
            return
        kept = []
        # the labels of several classes are rows, and only counted together
        for i, label in enumerate(labels.tolist() if labels.ndim == 1 else [0] * len(labels)):
            if seen.total() < MAX_IMAGES if per_class is None else seen[label] < per_class:
                kept.append(i)
                seen[label] += 1
        if kept:
            yield images[kept], labels[kept]


def plain_counts(loader: Loader, kind: TaskKind, classes: int) -> Tensor:
    """Return the number of images of each class, int64 [C], in one pass over a plain training loader."""
    counts = torch.zeros(classes, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):  # the order of the first epoch stays as it would have been
        for _, labels in loader:
            counts += kind.counts(labels.cpu().long(), classes)
    return counts


def first_of_each(labels: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` rows of each class (or all, if there are fewer), in the order of `rows`."""
    ordered = labels[rows]
    positions = [np.flatnonzero(ordered == label)[:count] for label in np.unique(ordered)]
    return np.asarray(rows[np.sort(np.concatenate(positions))])
