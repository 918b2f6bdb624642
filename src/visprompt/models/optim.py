"""Optimisers, learning rate schedules and parameter groups; nothing else scales a learning rate.

VPT (Jia et al., ECCV 2022, appendix A): lr = base * batch / 256, linear warm-up, cosine decay to zero, SGD
with momentum 0.9 for heads and prompts, AdamW for methods that tune the backbone; the last layer's bias has
no weight decay. Its released code (github.com/KMnP/vpt, src/solver) does two things that the paper does not
mention, and both are settings here: the learning rate changes once per epoch and is 0 in the first
(`schedule=per_epoch`), and its AdamW is `VPTAdamW` (`optimizer=vpt_adamw`).
"""

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from visprompt.errors import UserError
from visprompt.models.recipe import Recipe


def scaled_lr(base: float, batch_size: int) -> float:
    """Return the learning rate of a global batch: base * batch_size / 256."""
    return base * batch_size / 256


def param_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    head_lr: float | None,
    weight_decay: float,
    undecayed: frozenset[str] = frozenset(),
    decay_biases: bool = True,
) -> list[dict[str, object]]:
    """Group tuned parameters by learning rate and weight decay.

    Args:
        parameters: Names and parameters that are tuned.
        lr: Learning rate of everything but the head, already scaled.
        head_lr: Learning rate of the head, already scaled; None means `lr`.
        weight_decay: Weight decay of all parameters except the head's last bias and those named below.
        undecayed: Parameters of the method that are not decayed, by the first part of their names
            (`Method.undecayed`).
        decay_biases: Whether parameters with "bias" in their names are decayed.

    Returns:
        Groups for a torch optimiser; empty ones are left out, and their order is fixed.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        rate = head_lr if head_lr is not None and name.startswith("head.") else lr
        attribute = name.removeprefix("method.").partition(".")[0]
        no_decay = name == "head.bias" or (name.startswith("method.") and attribute in undecayed)
        no_decay = no_decay or (not decay_biases and "bias" in name)
        decay = 0.0 if no_decay else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def warmup_cosine(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Return a schedule: the factor on the learning rate by optimiser step.

    Args:
        total_steps: Optimiser steps of the whole run.
        warmup_steps: Steps of linear warm-up, fewer than `total_steps`.

    Returns:
        step -> factor: (step + 1) / warmup_steps while warming up, then half a cosine that would reach 0 at
        `total_steps`, one step after the last.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return factor


def warmup_cosine_per_epoch(epochs: int, warmup_epochs: float) -> Callable[[int], float]:
    """Return a schedule: the factor on the learning rate by epoch, as `WarmupCosineSchedule` of VPT's code.

    Args:
        epochs: Epochs of the whole run.
        warmup_epochs: Epochs of linear warm-up, fewer than `epochs`.

    Returns:
        epoch -> factor: epoch / warmup_epochs while warming up, so 0 in the first, then half a cosine that
        would reach 0 at `epochs`, one epoch after the last.
    """

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return epoch / max(1.0, warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / max(1, epochs - warmup_epochs)))

    return factor


def poly(total_steps: int, lr: float, power: float = 0.9, floor: float = 1e-4) -> Callable[[int], float]:
    """Return mmsegmentation's schedule: the factor on the learning rate by optimiser step.

    Args:
        total_steps: Optimiser steps of the whole run.
        lr: The learning rate that is multiplied, already scaled.
        power: Of the part that is left.
        floor: The learning rate at the end; a smaller `lr` stays as it is.

    Returns:
        step -> factor: with m = min(1, floor / lr), (1 - m) * (1 - step / total_steps)^power + m.
    """
    least = min(1.0, floor / lr) if lr else 1.0

    def factor(step: int) -> float:
        return (1 - least) * max(0.0, 1 - step / total_steps) ** power + least

    return factor


class VPTAdamW(torch.optim.Optimizer):
    """The AdamW of VPT's released code, which was taken from an earlier version of transformers.

    It differs from PyTorch's in two places: eps is added before the second moment's bias is corrected, and
    the weight decay follows the step. With first and second moments m and v of t steps:

        p <- p - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps);    p <- p - lr * weight_decay * p

    Args:
        params: Groups with "params", "lr" and "weight_decay".
        betas: b1 and b2.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self, params: list[dict[str, object]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's
        """Take a step; `closure`, if given, computes the gradients first and returns the loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(params, **{name: value for name, value in group.items() if name != "params"})
        return loss

    def _update(
        self,
        params: list[Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        **_: object,
    ) -> None:
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": 0,
                    "first": torch.zeros_like(parameter),
                    "second": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in params]
        for state in states:
            state["step"] += 1
        gradients = [cast(Tensor, parameter.grad) for parameter in params]
        first, second = ([state[name] for state in states] for name in ("first", "second"))
        torch._foreach_lerp_(first, gradients, 1 - betas[0])
        torch._foreach_mul_(second, betas[1])
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - betas[1])
        divisors = torch._foreach_sqrt(second)
        torch._foreach_add_(divisors, eps)
        rates = [-lr * math.sqrt(1 - betas[1] ** s["step"]) / (1 - betas[0] ** s["step"]) for s in states]
        torch._foreach_addcdiv_(params, first, divisors, rates)
        torch._foreach_mul_(params, 1 - lr * weight_decay)


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    recipe: Recipe,
    steps_per_epoch: int,
    undecayed: frozenset[str] = frozenset(),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Build the optimiser and its schedule, which is stepped after every optimiser step.

    Args:
        parameters: Names and parameters that are tuned.
        recipe: The settings of training.
        steps_per_epoch: Optimiser steps of an epoch.
        undecayed: See `param_groups`.

    Returns:
        Optimiser and scheduler.
    """
    lr = scaled_lr(recipe.lr, recipe.batch_size)
    head_lr = None if recipe.head_lr is None else scaled_lr(recipe.head_lr, recipe.batch_size)
    decay_biases = recipe.optimizer != "vpt_adamw"
    groups = param_groups(parameters, lr, head_lr, recipe.weight_decay, undecayed, decay_biases)
    fused = recipe.fused or None  # None is PyTorch's choice, which is not the fused one
    optimizer: torch.optim.Optimizer
    if recipe.uses_sgd:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, fused=fused)
    elif recipe.optimizer == "vpt_adamw":
        optimizer = VPTAdamW(groups)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused)
    if recipe.schedule == "poly":
        factors = [poly(recipe.steps(steps_per_epoch), group["lr"]) for group in optimizer.param_groups]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    steps, warmup = recipe.steps(steps_per_epoch), round(recipe.warmup_epochs * steps_per_epoch)
    if warmup >= steps > 1:
        raise UserError(
            f"recipe.warmup_epochs={recipe.warmup_epochs:g} takes {warmup} steps, and training ends after "
            f"{steps} (recipe.max_steps): give fewer epochs of warm-up"
        )
    schedule = warmup_cosine(steps, warmup)
    if recipe.schedule == "per_epoch":
        by_epoch = warmup_cosine_per_epoch(recipe.epochs, recipe.warmup_epochs)
        schedule = lambda step: by_epoch(step // steps_per_epoch)  # noqa: E731  # a name for one expression
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
