"""What a loss over a global batch needs of the other devices: their rows, differentiably."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def is_spread() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, [N, ...], of this rank's [n, ...], whose number may differ between ranks.

    Every rank must call it, and every rank's loss of the result must be the same function: its gradient is
    summed over the ranks, so that the mean over ranks that DDP takes is that of one device with all rows.
    """
    if not is_spread():
        return rows
    mine = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    out: Tensor = _Gathered.apply(rows, [int(count) for count in counts])
    return out


class _Gathered(torch.autograd.Function):
    """Rows of all ranks; backwards the sum over ranks of the gradient of this rank's."""

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
    """Return the sum over ranks of values of one shape."""
    if is_spread():
        values = values.clone()
        dist.all_reduce(values)
    return values
