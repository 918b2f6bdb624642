"""Collectives of methods: a differentiable all-gather, a sum over ranks, a broadcast of the first rank's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def is_spread() -> bool:
    """Return whether several processes train together (torch.distributed with more than one rank)."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, [N, ...], from this rank's rows [n, ...]; n may differ between ranks.

    Every rank must call it, and every rank must compute the same loss from the result. The backward sums the
    gradients over ranks, so that after DDP's mean over ranks they equal those of one device with all rows.
    """
    if not is_spread():
        return rows
    mine = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    out: Tensor = _Gathered.apply(rows, [int(count) for count in counts])
    return out


class _Gathered(torch.autograd.Function):
    """All-gather of rows; the backward returns the sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts, ctx.rank = counts, dist.get_rank()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[ctx.rank], None


def summed(values: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor that has the same shape on all of them."""
    if is_spread():
        values = values.clone()
        dist.all_reduce(values)
    return values


@torch.no_grad()
def share_from_first(method: nn.Module) -> None:
    """Give every rank the first rank's values of a method: what each computed may differ by rounding."""
    if is_spread():
        for tensor in (*method.parameters(), *method.buffers()):
            dist.broadcast(tensor, 0)
