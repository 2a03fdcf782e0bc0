"""Pixels that are numbers in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from expkit.device import described
from expkit.errors import UsageError


def check_pixels(images: Tensor, name: str, first: int = 0) -> None:
    """Raise UsageError where floats ``(count, ...)`` are no numbers or out of [0, 1]; it waits for their device.

    Args:
        first: number of the first image, for the message.
    """
    if not images.is_floating_point():
        raise UsageError(f"{name}: images are {described(images)}; give uint8, or floats in [0, 1]")
    if not images.numel():
        return
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).nonzero()[0, 0])
        raise UsageError(f"{name}: image {first + bad} has pixels that are not numbers (nan or infinite)")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise UsageError(f"{name}: pixels from {low:g} to {high:g}; give uint8, or floats in [0, 1]")
