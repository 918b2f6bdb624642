"""The optimisers of `optim` for many points at once, each with its own learning rate and weight decay.

PyTorch's optimisers take one learning rate and one weight decay for a tensor; here both are tensors [K]. The
rates, the decays and the schedule are read from the optimisers that `build_optimizer` builds for the points,
so that `optim` stays the only place that decides them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visprompt.models.optim import VPTAdamW, build_optimizer
from visprompt.models.recipe import Recipe


class StackedOptimizer:
    """Takes the optimiser steps of K points.

    Args:
        parameters: The tuned parameters of all points by name, [K, ...], in the order of the classifier's.
        recipes: The recipe of each point; they differ in learning rate and weight decay only.
        steps_per_epoch: Optimiser steps of an epoch.
        undecayed: See `optim.param_groups`.
        clip: Largest norm, or largest absolute value, of a point's gradient; None does not clip.
        clip_by: "norm" or "value".

    Attributes:
        rates: The learning rate of each point in the last step, float64 [K]: that of the first parameter, as
            a run logs it.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        recipes: Sequence[Recipe],
        steps_per_epoch: int,
        undecayed: frozenset[str] = frozenset(),
        clip: float | None = None,
        clip_by: str = "norm",
    ) -> None:
        self._parameters = list(parameters.values())
        self._clip, self._clip_by, self._steps = clip, clip_by, 0
        # of tiny tensors, only for their groups
        named = [(name, nn.Parameter(torch.zeros(1))) for name in parameters]
        built = [build_optimizer(named, recipe, steps_per_epoch, undecayed) for recipe in recipes]
        self._like, schedule = built[0]
        self._factor = schedule.lr_lambdas[0]
        settings = [
            {id(parameter): group for group in one.param_groups for parameter in group["params"]}
            for one, _ in built
        ]
        groups: dict[tuple[tuple[float, float], ...], list[int]] = {}
        for place, (_, parameter) in enumerate(named):
            own = [point[id(parameter)] for point in settings]
            key = tuple((float(group["initial_lr"]), float(group["weight_decay"])) for group in own)
            groups.setdefault(key, []).append(place)
        # once on the parameters' device, so that no step copies them or waits for them
        device = self._parameters[0].device
        self._groups: list[tuple[Tensor, Tensor | None, list[int]]] = []
        for key, places in groups.items():
            rates, decays = torch.tensor(key, dtype=torch.float64).T
            self._groups.append((rates.to(device), decays.to(device) if decays.any() else None, places))
        self.rates = self._groups[0][0] * self._factor(0)
        self._state: list[dict[str, Tensor]] = [{} for _ in self._parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take a step of every point, with the schedule's factor of that step.

        Args:
            gradients: The gradient of each parameter, [K, ...].
        """
        gradients = self._clipped(gradients)
        factor = self._factor(self._steps)
        self._steps += 1
        self.rates = self._groups[0][0] * factor
        update = self._sgd if isinstance(self._like, torch.optim.SGD) else self._adamw
        for rates, decays, places in self._groups:
            for place in places:
                update(place, gradients[place], rates * factor, decays)

    # The operations below are those of PyTorch, in their order, with numbers of points computed in double
    # precision as PyTorch computes its own, so that most steps agree to the bit.

    def _sgd(self, place: int, gradient: Tensor, rates: Tensor, decays: Tensor | None) -> None:
        parameter, state = self._parameters[place], self._state[place]
        momentum = self._like.param_groups[0]["momentum"]
        if decays is not None:
            gradient = torch.addcmul(gradient, parameter, _beside(decays, parameter))
        if momentum and state:
            gradient = state["momentum"].mul_(momentum).add_(gradient)
        elif momentum:
            state["momentum"] = gradient = gradient.clone()
        parameter.addcmul_(gradient, _beside(-rates, parameter))

    def _adamw(self, place: int, gradient: Tensor, rates: Tensor, decays: Tensor | None) -> None:
        parameter, state = self._parameters[place], self._state[place]
        group, step = self._like.param_groups[0], self._steps
        (b1, b2), eps = group["betas"], group["eps"]
        if not state:
            state |= {name: torch.zeros_like(gradient) for name in ("first", "second")}
        first = state["first"].lerp_(gradient, 1 - b1)
        second = state["second"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        kept = None if decays is None else _beside(1 - rates * decays, parameter)
        if isinstance(self._like, VPTAdamW):
            size = -rates * math.sqrt(1 - b2**step) / (1 - b1**step)
            parameter.add_(_beside(size, parameter) * first / second.sqrt().add_(eps))
            if kept is not None:
                parameter.mul_(kept)
            return
        if kept is not None:
            parameter.mul_(kept)
        divisor = (second.sqrt() / math.sqrt(1 - b2**step)).add_(eps)
        parameter.add_(_beside(-(rates / (1 - b1**step)), parameter) * first / divisor)

    def _clipped(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Clip the gradient of each point as `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` do."""
        if self._clip is None:
            return gradients
        if self._clip_by == "value":
            return [gradient.clamp(-self._clip, self._clip) for gradient in gradients]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        scale = (self._clip / (norms + 1e-6)).clamp(max=1.0)
        return [gradient * _beside(scale, gradient) for gradient in gradients]


def _beside(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values [K] with the dtype, device and number of dimensions of a tensor [K, ...]."""
    return values.to(tensor).reshape(-1, *(1,) * (tensor.ndim - 1))
