"""What processes share, so that weights, statistics and decisions are the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from expkit.distributed import World, all_reduce_mean, gather
from expkit.norms import running_statistics

T = TypeVar("T")


def average_gradients(modules: Sequence[nn.Module]) -> None:
    """The mean over processes of every gradient, in one reduction."""
    gradients = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
    _average(gradients)


def average_statistics(modules: Sequence[nn.Module]) -> None:
    """The mean over processes of BatchNorm's running statistics, in one reduction."""
    _average([each for module in modules for each in running_statistics(module) if each.is_floating_point()])


@torch.no_grad()
def broadcast(modules: Sequence[nn.Module], world: World) -> None:
    """The main process's parameters and buffers, on all of them."""
    if world.size == 1:
        return
    for module in modules:
        for tensor in (each.data for each in (*module.parameters(), *module.buffers())):
            whole = tensor.contiguous()  # channels-last weights are not, and nccl wants them to be
            torch.distributed.broadcast(whole, src=0)
            if whole is not tensor:
                tensor.copy_(whole)


def of_main(value: T, world: World) -> T:
    """The main process's `value`, on all of them."""
    if world.size == 1:
        return value
    found: T = gather(value)[0]
    return found


def total(tensor: Tensor, world: World) -> Tensor:
    """The sum of `tensor` over processes, in place; returned for convenience."""
    if world.size > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def _average(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = all_reduce_mean(torch.cat([each.flatten() for each in tensors]))
    for each, part in zip(tensors, torch.split(flat, [each.numel() for each in tensors]), strict=True):
        each.copy_(part.view_as(each))
