"""What processes average at every step, so that weights and statistics are the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expkit.distributed import all_reduce_mean
from train_adv.modes import running_statistics


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
def _average(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = all_reduce_mean(torch.cat([each.flatten() for each in tensors]))
    for each, part in zip(tensors, torch.split(flat, [each.numel() for each in tensors]), strict=True):
        each.copy_(part.view_as(each))
