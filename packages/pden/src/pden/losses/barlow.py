"""Barlow Twins: two views agree in every feature, and features do not repeat each other (Zbontar et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def barlow_twins(embeddings: Tensor, off_diagonal: float = 0.005, epsilon: float = 1e-5) -> Tensor:
    """The first view (the source) against each other view, averaged over those.

    Args:
        embeddings: ``(views, batch, size)`` with at least two views and two images.
        off_diagonal: weight of the correlations between different features.
        epsilon: added to the variance of a feature, which may not vary at all in a batch.

    Raises:
        ValueError: fewer than two views or images.
    """
    views, batch, size = embeddings.shape
    if views < 2 or batch < 2:
        raise ValueError(f"Barlow Twins needs two views and two images, not {views} and {batch}")
    centred = embeddings.float() - embeddings.float().mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + epsilon).sqrt()
    correlations = scaled[0].T @ scaled[1:] / batch  # (views - 1, size, size)
    diagonal = torch.eye(size, dtype=torch.bool, device=embeddings.device)
    same = (1 - correlations).square().masked_fill(~diagonal, 0)
    other = correlations.square().masked_fill(diagonal, 0)
    return (same + off_diagonal * other).sum() / (views - 1)
