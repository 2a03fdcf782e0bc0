"""The rows of the most frequent tokens, always the same. After FR-Spec (Zhao et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coral_spec import kernels
from coral_spec.backbone import Backbone
from coral_spec.heads.interface import ProposalHead, top_log_probs
from coral_spec.packing import packed


class FrequencyHead(ProposalHead):
    """The rows of the most frequent tokens, copied once into a dense slab.

    Probabilities are renormalised over these rows.
    """

    kind = "frequency"

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

    def top(self, features: Tensor, count: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`ProposalHead`."""
        logits = self._backbone.finish_logits(kernels.multiply(self._slab, features))
        return top_log_probs(logits, count, self._ids)
