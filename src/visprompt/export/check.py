"""Compare an exported file with the classifier that it was made from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visprompt.data.transforms import to_input
from visprompt.errors import UserError
from visprompt.models.classifier import Classifier
from visprompt.models.kind import SINGLE_LABEL
from visprompt.models.windows import slide

Runner = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""The exported file, read again: input -> logits [B, C] and probabilities [B, C]"""
Picture = tuple[np.ndarray, Any]
"""A decoded picture, uint8 [h, w, 3], and its label: a number, or a list or array of them"""

TOLERANCE = 1e-3
"""Largest relative error of the logits: sums in another order give up to 1e-4, a mistake more than 1e-2"""
_BATCHES = (1, 2, 5)
_SIDES = ((0, 0), (7, -3), (-5, 40))  # of generated pictures, minus the backbone's side
_MOST = 16  # pictures in a batch


@dataclass(frozen=True)
class Agreement:
    """How closely an exported file repeats its classifier.

    Attributes:
        generated: Number of generated images.
        error: max |a - b| / max |b| of the logits over the generated images.
        images: Number of validation images.
        same: Number of validation images with the same top class; of a dense kind in every pixel.
        accuracy: Share of validation images that the file labels correctly, of a dense kind the mean over
            them of the share of pixels; None without any.
        of_classifier: The same share for the classifier.
    """

    generated: int
    error: float
    images: int = 0
    same: int = 0
    accuracy: float | None = None
    of_classifier: float | None = None


@torch.no_grad()
def compare(
    classifier: Classifier,
    run: Runner,
    preprocessing: Mapping[str, Any],
    in_graph: bool,
    pictures: Iterable[Picture] = (),
) -> Agreement:
    """Measure the agreement of a file with its classifier, on generated and on validation images.

    Args:
        classifier: The classifier, in evaluation mode.
        run: The file.
        preprocessing: The tuned state's `preprocessing`.
        in_graph: Whether the file takes decoded pictures instead of normalised images.
        pictures: Validation pictures.
    """
    worst = 0.0
    for inputs, images in _generated(preprocessing, in_graph):
        got, expected = run(inputs)[0], classifier(images)
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    images_seen, same, hits, hits_of_classifier = 0, 0, 0.0, 0.0
    for inputs, images, labels in _batches(pictures, preprocessing, in_graph):
        kind = classifier.kind
        logits, shares = _of_any_size(run, inputs, classifier)
        own_logits = classifier(images)
        own_shares = classifier.probabilities(own_logits)
        images_seen += labels.shape[0]
        agree = kind.decide(shares) == kind.decide(own_shares)
        if kind is not SINGLE_LABEL:  # of many classes or pixels, two may be almost equally probable
            near = (shares - own_shares).abs() < TOLERANCE
            agree |= near.all(1) if kind.dense else near
        same += int(agree.flatten(1).all(1).sum() if agree.ndim > 1 else agree.sum())
        hits += float(kind.correct(logits, labels).sum())
        hits_of_classifier += float(kind.correct(own_logits, labels).sum())
    generated = sum(_BATCHES) if not in_graph else len(_SIDES)
    if not images_seen:
        return Agreement(generated, worst)
    accuracies = hits / images_seen, hits_of_classifier / images_seen
    return Agreement(generated, worst, images_seen, same, *accuracies)


def _of_any_size(run: Runner, inputs: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor]:
    """Return logits and probabilities by a file; images larger than its windows are covered by them."""
    if inputs.dtype == torch.uint8 or not classifier.slides(inputs):
        logits, shares = run(inputs)
        return logits, classifier.probabilities(logits) if shares is None else shares
    logits = slide(lambda windows: run(windows)[0], inputs, *classifier.own_size)
    return logits, classifier.probabilities(logits)


def check(agreement: Agreement, what: str) -> None:
    """Refuse a file that answers differently from its classifier.

    Args:
        agreement: A result of `compare`.
        what: The file, for the message.

    Raises:
        UserError: The logits differ by more than `TOLERANCE`, or a validation image has another top class.
    """
    if not agreement.error <= TOLERANCE:  # nan too
        raise UserError(
            f"{what} answers differently from the classifier (relative error {agreement.error:.1e} of the "
            "logits): it is not written; keep the tuned state with the backbone, and report this pair"
        )
    if agreement.same < agreement.images:
        raise UserError(
            f"{what} gives {agreement.images - agreement.same} of {agreement.images} validation images "
            "another class than the classifier: it is not written; report this pair"
        )


def _generated(preprocessing: Mapping[str, Any], in_graph: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield generated inputs of the file and of the classifier, always the same."""
    size, draw = int(preprocessing["size"]), np.random.default_rng(0)
    if not in_graph:
        for count in _BATCHES:
            images = torch.from_numpy(draw.standard_normal((count, 3, size, size), dtype=np.float32))
            yield images, images
        return
    for height, width in _SIDES:
        sides = max(size + height, 1), max(size + width, 1)
        picture = draw.integers(0, 256, (*sides, 3), dtype=np.uint8)
        yield torch.from_numpy(picture)[None], to_input(picture, preprocessing)[None]


def _batches(
    pictures: Iterable[Picture], preprocessing: Mapping[str, Any], in_graph: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs of the file, images of the classifier and labels; pictures of one size together."""
    sized = in_graph or preprocessing.get("resize") == "windows"
    for _, group in groupby(pictures, lambda pair: pair[0].shape if sized else None):
        while batch := list(islice(group, _MOST)):
            images = torch.stack([to_input(picture, preprocessing) for picture, _ in batch])
            labels = torch.stack([torch.as_tensor(label, dtype=torch.int64) for _, label in batch])
            pixels = torch.from_numpy(np.stack([p for p, _ in batch])) if in_graph else images
            yield pixels, images, labels
