"""Safety: what a generator makes of an image must keep its label (PDEN, section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = 255  # the label of pixels that do not count


def safety_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the task model on generated images.

    Args:
        logits: ``(batch, classes)``, or ``(batch, classes, height, width)`` for segmentation.
        labels: ``(batch,)`` or ``(batch, height, width)``; pixels with label 255 do not count (images with it do).
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED if labels.dim() == 3 else -100)
