"""Fit the temperature of a classifier. Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_LIMIT = 20.0  # temperatures are between 1 / _LIMIT and _LIMIT


def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature at which the probabilities softmax(logits / temperature) fit labels best.

    It minimises the cross-entropy, which is convex in 1 / temperature and so has one minimum. The class with
    the largest probability stays the same.

    Args:
        logits: [N, C], of images that the classifier was not trained on.
        labels: [N].

    Returns:
        The temperature to six digits, between 0.05 and 20. None if no image or every image is labelled
        correctly: then the cross-entropy has no minimum.
    """
    from scipy.optimize import minimize_scalar  # imported here: it takes half a second

    logits, labels = logits.double().cpu(), labels.cpu()
    hits = int((logits.argmax(1) == labels).sum())
    if hits in (0, len(labels)) or not logits.isfinite().all():
        return None

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    with torch.no_grad():
        found = minimize_scalar(loss, bounds=(-math.log(_LIMIT), math.log(_LIMIT)), method="bounded")
    return float(f"{math.exp(found.x):.6g}")
