"""Supervised contrast: views of one class are each other's positives (Khosla et al., 2020, the L_out form)."""

from __future__ import annotations

import torch
from torch import Tensor


def supervised_contrast(embeddings: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean over all views of -log p(positive), averaged over the positives of each.

    Args:
        embeddings: normalised, ``(views, batch, size)``.
        labels: ``(batch,)``; images of one label are positives of each other in all views.
        temperature: of the cosine similarities.

    Views without any positive do not count; where none has one the loss is 0.
    """
    views = len(embeddings)
    flat = embeddings.float().flatten(0, 1)
    groups = labels.repeat(views)
    itself = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    logits = (flat @ flat.T / temperature).masked_fill(itself, -torch.inf)
    log_probabilities = logits.log_softmax(dim=1).masked_fill(itself, 0)
    positives = ((groups[:, None] == groups[None, :]) & ~itself).float()
    counts = positives.sum(dim=1)
    per_view = -(log_probabilities * positives).sum(dim=1) / counts.clamp(min=1)
    return per_view.sum() / (counts > 0).sum().clamp(min=1)
