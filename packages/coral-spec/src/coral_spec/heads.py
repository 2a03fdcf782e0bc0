"""Proposal heads: which rows of the target's head a drafter reads while drafting.

Verification always uses the target's full logits, so a head with few rows can only cost acceptance, never
correctness. Static frequency ranking after FR-Spec (Zhao et al., 2025).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from coral_spec import kernels
from coral_spec.backbone import Backbone
from coral_spec.packing import packed


class ProposalHead(Protocol):
    """Turns drafted features into candidates."""

    rows: int

    def top(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` best tokens of ``features (batch, nodes, hidden)``.

        Returns:
            fp32 log-probabilities and token ids, ``(batch, nodes, count)`` each.
        """
        ...


def _top_log_probs(logits: Tensor, count: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if kernels.serve(logits) and count <= kernels.MAX_ROWS:
        return kernels.best(logits, count, ids)
    best = logits.topk(count, dim=-1)
    tokens = best.indices if ids is None else ids[best.indices]
    return best.values.float() - logits.float().logsumexp(dim=-1, keepdim=True), tokens


class FullHead:
    """All rows, shared with the target."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.rows = backbone.vocab_size

    def top(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See :class:`ProposalHead`."""
        return _top_log_probs(self._backbone.head(features), count)


class FrequencyHead:
    """The rows of the most frequent tokens, copied once into a dense slab.

    Probabilities are renormalised over these rows.
    """

    def __init__(self, backbone: Backbone, ranking: Tensor, rows: int) -> None:
        output = backbone.output
        self._backbone = backbone
        self._ids = ranking[:rows].to(output.weight.device, torch.long)
        bias = getattr(output, "bias", None)
        slab = nn.Linear(output.weight.shape[1], self._ids.numel(), bias=bias is not None, device="meta")
        slab.weight = nn.Parameter(output.weight[self._ids].contiguous(), requires_grad=False)
        if bias is not None:
            slab.bias = nn.Parameter(bias[self._ids].contiguous(), requires_grad=False)
        self._slab = packed(slab)
        self.rows = int(self._ids.numel())

    def top(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See :class:`ProposalHead`."""
        logits = self._backbone.finish_logits(kernels.multiply(self._slab, features))
        return _top_log_probs(logits, count, self._ids)
