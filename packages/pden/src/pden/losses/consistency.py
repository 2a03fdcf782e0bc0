"""Consistency: the views of an image are to be predicted alike (AugMix, Hendrycks et al., 2020, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def jensen_shannon(logits: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of the views' predictions, ``(views, batch, classes, ...)``, in nats."""
    logs = logits.log_softmax(dim=2)
    middle = logs.exp().mean(dim=0).clamp(min=1e-7).log()
    per_class = F.kl_div(middle.expand_as(logs), logs, reduction="none", log_target=True)
    return per_class.sum(dim=2).mean()
