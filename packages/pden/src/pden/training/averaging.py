"""Averaged weights, kept beside the last ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from pden.training.config import AveragingConfig


class Average(nn.Module):
    """The moving average of a model's parameters and buffers, or their mean; whole numbers are copied.

    torch's `AveragedModel` asks the device at each step how many there were, so that the host waits for it, and has no
    mean of whole numbers.

    Args:
        model: where it begins.
        settings: of a kind other than "none".

    Attributes:
        module: a model with the averaged weights.
        count: models in it.
    """

    def __init__(self, model: nn.Module, settings: AveragingConfig) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.count = 0
        ema: Any = get_ema_multi_avg_fn
        uniform: Any = get_swa_multi_avg_fn
        self._mix = uniform() if settings.kind == "uniform" else ema(settings.decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's weights in."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        mixed = [pair for pair in pairs if pair[0].is_floating_point() and self.count]
        for own, new in (pair for pair in pairs if not (pair[0].is_floating_point() and self.count)):
            own.copy_(new)
        if mixed:
            self._mix([own for own, _ in mixed], [new for _, new in mixed], self.count)
        self.count += 1

    def get_extra_state(self) -> Any:
        """The count, in a checkpoint."""
        return torch.tensor(self.count)

    def set_extra_state(self, state: Any) -> None:
        """See :meth:`get_extra_state`."""
        self.count = int(state)


def new_average(model: nn.Module, settings: AveragingConfig) -> Average | None:
    """An average that starts at the model as it is; None where none is kept. Call `update_parameters` after a step."""
    return None if settings.kind == "none" else Average(model, settings)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
