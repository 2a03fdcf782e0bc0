"""Diversity: two draws of a generator must differ, up to a limit (PDEN, section 3.3)."""

from __future__ import annotations

from torch import Tensor


def diversity(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference of two draws, in [0, 1]."""
    return (first.float() - second.float()).abs().mean()


def diversity_loss(found: Tensor, limit: float = 0.5) -> Tensor:
    """Minus the diversity that was found, clamped: beyond `limit` there is nothing more to be gained."""
    return -found.clamp(max=limit)
