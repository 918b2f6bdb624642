"""Fit the temperature of a classifier. Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_LIMIT = 20.0  # temperatures are between 1 / _LIMIT and _LIMIT


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    right_of: Callable[[Tensor], Tensor],
) -> float | None:
    """Return the temperature at which the probabilities of logits / temperature fit labels best.

    It minimises the loss, a cross-entropy, which is convex in 1 / temperature and so has one minimum. The
    order of the probabilities stays the same.

    Args:
        logits: [N, C], of images that the classifier was not trained on.
        labels: [N], or [N, C] of 0 and 1.
        loss_of: Function of logits and labels that returns the loss of each image [N].
        right_of: Function of logits that returns which decisions are right, bool of any shape.

    Returns:
        The temperature to six digits, between 0.05 and 20. None if no decision or every decision is
        right: then the loss may have no minimum.
    """
    from scipy.optimize import minimize_scalar  # imported here: it takes half a second

    logits, labels = logits.double().cpu(), labels.cpu()
    right = right_of(logits)
    if int(right.sum()) in (0, right.numel()) or not logits.isfinite().all():
        return None

    def loss(log_temperature: float) -> float:
        return float(loss_of(logits / math.exp(log_temperature), labels).double().mean())

    with torch.no_grad():
        found = minimize_scalar(loss, bounds=(-math.log(_LIMIT), math.log(_LIMIT)), method="bounded")
    return float(f"{math.exp(found.x):.6g}")
