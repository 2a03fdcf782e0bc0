"""Cycle consistency: a reverse generator must find the source image again (PDEN, section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cycle_loss(restored: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference of two batches of one shape, in [0, 1]: G_rev(G(x, z)) and x."""
    return F.mse_loss(restored.float(), images.float())
