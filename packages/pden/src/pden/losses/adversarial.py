"""Adversarial contrast: a generated image should not be recognised as its own source image (PDEN, section 3.3).

With p_i the softmax over source images of how alike generated image i is to each, the generator minimises
-log(1 - p_i). Written with logarithms of sums that is softplus(s_ii - logsumexp_{j != i} s_ij), which is finite for all
finite similarities s, where the literal 1 - p becomes 0 (ours).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adversarial_contrast(generated: Tensor, source: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean of -log(1 - p(own source image)).

    Args:
        generated: normalised embeddings of generated images, ``(batch, size)``.
        source: those of the images they were made from, in the same order.
        temperature: of the cosine similarities.

    Raises:
        ValueError: fewer than two images: there is nothing else to be taken for.
    """
    if len(generated) < 2:
        raise ValueError(f"adversarial contrast needs two images, not {len(generated)}")
    similarities = generated.float() @ source.float().T / temperature
    itself = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    others = similarities.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    return F.softplus(similarities.diagonal() - others).mean()
