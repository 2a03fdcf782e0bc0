"""BatchNorm layers and their running statistics, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics (and counters) of every BatchNorm layer."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


@contextmanager
def kept_statistics(*models: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were before, whatever forward passes in train mode did to them."""
    buffers = [buffer for model in models for buffer in running_statistics(model)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.data.copy_(value)  # through .data: autograd saved the buffer and would take this for a fault


@contextmanager
def batch_norm_eval(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers normalise with their running statistics and leave them alone; all else stays as it is."""
    training = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
