"""Harmonised steps (HASS): the drafter is trained on its own features, attending exactly as it will while drafting.

Index i has rotary position i, reads (embedding of x_{i+1}, feature at i) and predicts the feature at i + 1. In step 1
all features are the target's. In step j the feature at i is what step j - 1 predicted for i, i.e. its output at i - 1.
So the query (step j, index i) is node j of a draft chain that started at index i - j + 1, and sees what that node
sees: keys of target features up to the start, and one key of every later step s <= j, at index i - j + s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from coral_spec.drafter import Drafter


def harmonised_mask(length: int, step: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask ``(1, 1, length, step * length)`` of queries of `step` over the keys of steps 1 .. `step`.

    The first block is causal up to ``i - (step - 1)``; block s > 1 is the diagonal ``i - (step - s)``. An index
    whose chain would start before the text sees what there is of it; its own key always is.
    """
    index = torch.arange(length, device=device)
    query, key = index[:, None], index[None, :]
    blocks = [key <= query - (step - 1)] + [key == query - (step - s) for s in range(2, step + 1)]
    visible = torch.cat(blocks, dim=1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~visible, float("-inf"))[None, None]


def shift(predicted: Tensor, first: Tensor) -> Tensor:
    """Inputs of the next step ``(batch, length, hidden)``: predictions moved right by one and detached.

    Index 0 has no prediction and keeps the feature it had in `first`.
    """
    return torch.cat([first[:, :1], predicted[:, :-1].detach()], dim=1)


def draft_step(drafter: Drafter, embeddings: Tensor, inputs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """One harmonised step for all indices at once.

    Keys and values of earlier steps are computed anew from their inputs: gradients reach the projections through
    them, and no graph of an earlier step has to live.

    Args:
        embeddings: ``(batch, length, hidden)``, of the token after each index.
        inputs: the features that steps 1 .. j read, ``(batch, length, hidden)`` each, none with gradient.
        mask: from `harmonised_mask`.

    Returns:
        ``(batch, length, hidden)``: predicted feature of the next index.
    """
    layer = drafter.layer
    attention = layer.self_attn
    batch, length, _ = embeddings.shape
    positions = torch.arange(length, device=embeddings.device).expand(batch, -1)
    keys, values = [], []
    for features in inputs:
        states = drafter.fuse(embeddings, features)
        query, key, value = attention.project(states, positions)
        keys.append(key)
        values.append(value)
    attended = functional.scaled_dot_product_attention(
        query,
        attention.repeat(torch.cat(keys, dim=2)),
        attention.repeat(torch.cat(values, dim=2)),
        attn_mask=mask.to(query.dtype),
    )
    return layer.finish(states, attended)
