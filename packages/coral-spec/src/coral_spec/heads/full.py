"""All rows."""

from __future__ import annotations

from torch import Tensor

from coral_spec.backbone import Backbone
from coral_spec.heads.interface import ProposalHead, top_log_probs


class FullHead(ProposalHead):
    """All rows, shared with the target."""

    kind = "full"

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.rows = backbone.vocab_size

    def top(self, features: Tensor, count: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`ProposalHead`."""
        return top_log_probs(self._backbone.head(features), count)
