"""What all proposal heads have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from coral_spec import kernels


class ProposalHead(ABC):
    """Turns drafted features into candidates.

    Attributes:
        kind: its name on the command line.
        rows: head rows that it reads for a level of the tree; what reads other weights says how many rows they weigh.
    """

    kind: str
    rows: int

    @property
    def choices(self) -> int:
        """Tokens that a node can be given at least, which bounds the width of trees."""
        return self.rows

    @abstractmethod
    def top(self, features: Tensor, count: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ``count`` best tokens of the nodes of one tree level, ``features (batch, nodes, hidden)``.

        Args:
            features: drafted.
            count: candidates of every node.
            scores: ``(batch, nodes)``, log-probability of each node's path; None at the root, which begins a tree.

        Returns:
            fp32 log-probabilities and token ids, ``(batch, nodes, count)`` each, on one scale for all nodes.
        """

    def seen(self, tokens: Tensor, counts: Tensor) -> Tensor | None:
        """Whether the tree that was made last could have held what the target drew; for telemetry.

        Args:
            tokens: ``(batch, depth + 1)``, drawn at the nodes of the accepted path.
            counts: ``(batch,)``, valid ones.

        Returns:
            int64 ``(2,)``: drawn tokens among the rows read at their level, and drawn tokens at levels that were
            drafted; None where the rows are always the same.
        """
        return None


def top_log_probs(logits: Tensor, count: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `ProposalHead.top`: the best of ``logits (batch, nodes, rows)``, whose columns are the tokens ``ids``."""
    if kernels.serve(logits) and count <= kernels.MAX_ROWS:
        return kernels.best(logits, count, ids)
    best = logits.topk(count, dim=-1)
    tokens = best.indices if ids is None else ids[best.indices]
    return best.values.float() - logits.float().logsumexp(dim=-1, keepdim=True), tokens
