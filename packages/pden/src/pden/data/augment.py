"""The usual augmentation of small natural images, on whole batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_flip(images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reflection padding by an eighth, a random crop of the old size, and a mirror for half of the images.

    Args:
        images: ``(batch, channels, height, width)``.
        labels: ``(batch,)``, or ``(batch, height, width)``, which move along.
    """
    count, _, height, width = images.shape
    pad, device = max(1, min(height, width) // 8), images.device
    top, left = (torch.randint(2 * pad + 1, (count, 1), generator=rng, device=device) for _ in range(2))
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    mirrored = torch.rand(count, 1, generator=rng, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    place = (torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :])
    padded = F.pad(images, [pad] * 4, mode="reflect").permute(0, 2, 3, 1)
    moved = padded[place].permute(0, 3, 1, 2).contiguous()
    if labels.dim() == 1:
        return moved, labels
    return moved, F.pad(labels.float()[:, None], [pad] * 4, mode="reflect")[:, 0].long()[place]
