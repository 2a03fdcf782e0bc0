"""Tensors of all processes, with the gradient flowing back to where each came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; backward sums every process's gradient of this process's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        ctx.count = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)  # gloo has no reduce-scatter
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


def gather_with_gradient(tensor: Tensor) -> tuple[Tensor, int]:
    """`tensor` of all processes, joined in rank order, and where this process's rows begin in it.

    Every process must hold the same number of rows. Outside a process group the tensor itself, and 0. A mean over own
    rows on each process, with gradients then averaged over processes (as DDP does), gives the gradient of the mean
    over all rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor, 0
    joined: Tensor = _Gather.apply(tensor.contiguous())
    return joined, dist.get_rank() * len(tensor)
