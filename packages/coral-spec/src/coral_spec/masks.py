"""Additive attention masks for a tree of candidates behind a filled prefix, windows included. Ours."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(ancestors: Tensor, lengths: Tensor, keys: int) -> Tensor:
    """Which cache slots each new node may read.

    Args:
        ancestors: bool ``(batch, nodes, slots)``: slot s behind the prefix is an ancestor of the node, or itself.
        lengths: ``(batch,)``, filled prefix; slot s lies at index ``lengths + s``.
        keys: number of cache slots that attention reads.

    Returns:
        bool ``(batch, nodes, keys)``.
    """
    index = torch.arange(keys, device=ancestors.device)
    behind = index[None, :] - lengths[:, None]
    nodes, slots = ancestors.shape[1:]
    slot = behind.clamp(0, slots - 1)[:, None, :].expand(-1, nodes, -1)
    within = (behind >= 0) & (behind < slots)
    return (behind < 0)[:, None, :] | (ancestors.gather(2, slot) & within[:, None, :])


def within_window(visible: Tensor, positions: Tensor, lengths: Tensor, window: int) -> Tensor:
    """Restrict ``visible`` to keys fewer than ``window`` positions back.

    Args:
        visible: bool ``(batch, nodes, keys)``, of nodes that are themselves the slots behind the prefix.
        positions: ``(batch, nodes)``, sequence position of every node.
        lengths: ``(batch,)``, filled prefix.
        window: as in the model's configuration: a query at position q reads keys above ``q - window``.
    """
    index = torch.arange(visible.shape[2], device=visible.device)
    behind = index[None, :] - lengths[:, None]
    tree = positions.gather(1, behind.clamp(0, positions.shape[1] - 1))
    key_positions = torch.where(behind < 0, index[None, :], tree)
    return visible & (positions[:, :, None] - key_positions[:, None, :] < window)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """``(batch, 1, nodes, keys)``: zero where visible, the dtype's lowest value elsewhere (never NaN, unlike -inf)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def chain_ancestors(batch: int, length: int, device: torch.device) -> Tensor:
    """Ancestors of a plain sequence of ``length`` nodes: bool ``(batch, length, length)``."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
