"""Consistency: the views of an image are to be predicted alike (AugMix, Hendrycks et al., 2020, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def jensen_shannon(logits: Tensor, counts: Tensor | None = None) -> Tensor:
    """The Jensen-Shannon divergence of the views' predictions, in nats.

    Args:
        logits: ``(views, batch, classes)``, or ``(views, batch, classes, height, width)``.
        counts: which pixels do, ``(batch, height, width)``; all, where it is not given.
    """
    logs = logits.log_softmax(dim=2)
    middle = logs.exp().mean(dim=0).clamp(min=1e-7).log()
    per_class = F.kl_div(middle.expand_as(logs), logs, reduction="none", log_target=True)
    divergence = per_class.sum(dim=2).mean(dim=0)
    if counts is None:
        return divergence.mean()
    return (divergence * counts).sum() / counts.sum().clamp(min=1)
