"""The router of the head: which groups of rows a tree level should read.

A residual block and a linear layer on the drafter's feature h, ``p = softmax(W2 (silu(W1 h) + h))`` over the groups
of a grouping (CORAL; the activation is ours). One choice serves all nodes of a level: the groups with the most of the
level's probability, each node weighted by that of its path. Their number is fixed, so shapes are static. A drafter's
folder holds it in a file of its own; without it the folder is an EAGLE drafter like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from coral_spec import kernels
from coral_spec.grouping import Grouping
from expkit.checkpoint import load_tensors, read_metadata, require_finite, save_tensors
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.targets import Target

FILE = "router.safetensors"
Scores = Literal["hierarchical", "renormalised"]
SCORES: tuple[Scores, ...] = ("hierarchical", "renormalised")


class Router(nn.Module):
    """Log-probabilities of groups."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, groups)
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def logits(self, features: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., groups)``."""
        return kernels.multiply(self.outer, kernels.residual_block(self.inner, features))

    def forward(self, features: Tensor) -> Tensor:
        """``(..., width)`` to fp32 log-probabilities ``(..., groups)``."""
        return self.logits(features).log_softmax(dim=-1, dtype=torch.float32)


def choose_groups(log_probs: Tensor, scores: Tensor | None, always: int, active: int) -> Tensor:
    """The groups that a level reads: int64 ``(always + active,)``, ascending.

    Args:
        log_probs: ``(nodes, groups)``, from :class:`Router`.
        scores: ``(nodes,)``, log-probabilities of the nodes' paths; None for equal weights.
        always: leading groups, which are read in any case.
        active: how many of the others.
    """
    weighted = log_probs if scores is None else log_probs + scores[:, None]
    mass = weighted[:, always:].logsumexp(dim=0)
    chosen = mass.topk(active).indices.sort().values + always
    return torch.cat([torch.arange(always, device=chosen.device), chosen])


@dataclass(frozen=True, eq=False)
class Routing:
    """A router with the groups it chooses from, and how it is to be used.

    Attributes:
        router: see :class:`Router`.
        grouping: of the head's rows.
        active: groups chosen at every level, those that are always read not counted.
        scores: "hierarchical": log-probability of the group by the router and of the token within the group;
            "renormalised": over all rows that were read.
    """

    router: Router
    grouping: Grouping
    active: int
    scores: Scores

    def __post_init__(self) -> None:
        routed = self.grouping.groups - self.grouping.always
        if not 1 <= self.active <= routed:
            raise UsageError(
                f"{self.active} active groups, but the router has {routed} to choose from; needed 1 to {routed}"
            )
        if self.scores not in SCORES:
            raise UsageError(f"scores are {self.scores!r}, needed one of {', '.join(SCORES)}")

    @property
    def rows(self) -> int:
        """Places of the slabs that a level reads."""
        return (self.grouping.always + self.active) * self.grouping.rows

    @property
    def router_rows(self) -> int:
        """As many head rows as have the router's weights, which a level reads too."""
        return -(-sum(part.numel() for part in self.router.parameters()) // self.router.inner.in_features)

    def save(self, folder: Path, tokenizer_hash: str) -> None:
        """Write the router (bf16) and the grouping beside a drafter."""
        about = {
            "grouping": self.grouping.digest,
            "vocab_size": str(self.grouping.vocab_size),
            "tokenizer_hash": tokenizer_hash,
            "active": str(self.active),
            "scores": self.scores,
            "format": "pt",
        }
        weights = {name: part.detach().to("cpu", torch.bfloat16) for name, part in self.router.state_dict().items()}
        self.grouping.save(folder)
        save_tensors(folder / FILE, weights, about)

    @classmethod
    def load(cls, folder: Path, target: Target, vocab_size: int, width: int) -> Routing:
        """What :meth:`save` wrote, on the target's device in its dtype.

        Raises:
            UsageError: no router there, one that diverged, or one for another grouping, vocabulary, width or tokenizer.
        """
        path = folder / FILE
        if not path.is_file():
            raise UsageError(f"drafter {folder} has no {FILE}; train one (stage router), or use another head")
        weights, about = load_tensors(path), read_metadata(path)
        if about.get("vocab_size") != str(vocab_size):
            raise UsageError(
                f"{path} is for a vocabulary of {about.get('vocab_size')}, "
                f"but {target.name}'s head has {vocab_size} rows"
            )
        if about.get("tokenizer_hash") != target.tokenizer_hash:
            raise UsageError(f"{path} was trained for another tokenizer than {target.name}'s")
        grouping = Grouping.load(folder, vocab_size)
        if about.get("grouping") != grouping.digest:
            raise UsageError(f"{path} was trained for another grouping than the one beside it")
        router = Router(width, grouping.groups)
        expected = {name: part.shape for name, part in router.state_dict().items()}
        if {name: part.shape for name, part in weights.items()} != expected or not about.get("active", "").isdigit():
            raise UsageError(f"{path} is damaged or no router of {grouping.groups} groups at width {width}")
        require_finite(weights, path)
        router.load_state_dict(weights)
        router = router.to(target.device, target.dtype).eval().requires_grad_(False)
        return cls(router, grouping, int(about["active"]), about.get("scores", ""))  # type: ignore[arg-type]
