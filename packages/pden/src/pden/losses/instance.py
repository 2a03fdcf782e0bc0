"""Instance contrast: only views of the same image are positives (NT-Xent with any number of views)."""

from __future__ import annotations

import torch
from torch import Tensor

from pden.losses.supervised import supervised_contrast


def instance_contrast(embeddings: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean over all views of -log p(another view of the same image).

    Args:
        embeddings: normalised, ``(views, batch, size)``.
        temperature: of the cosine similarities.
    """
    images = torch.arange(embeddings.shape[1], device=embeddings.device)
    return supervised_contrast(embeddings, images, temperature)
