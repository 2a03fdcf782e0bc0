"""Averaged weights, kept beside the last ones."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from pden.training.config import AveragingConfig


def new_average(model: nn.Module, settings: AveragingConfig) -> AveragedModel | None:
    """An average that starts at the model as it is; None where none is kept. Call `update_parameters` after a step."""
    if settings.kind == "none":
        return None
    average: Any
    if settings.kind == "ema":
        average = get_ema_multi_avg_fn(settings.decay)  # type: ignore[no-untyped-call]
    else:
        average = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
