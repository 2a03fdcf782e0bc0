"""Dynamic draft trees as tensors of fixed shape.

Grown after EAGLE-2 (Li et al., 2024): every level expands its ``width`` most probable nodes by cumulative
log-probability, every candidate ever made stays in a pool, and the ``budget`` best of the pool are verified.
Scores are fp32 and ties go to the shallower node: since a child never scores above its parent, a kept node's
parent is always kept. Nothing here waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coral_spec import kernels
from expkit.errors import UsageError


@dataclass(frozen=True)
class TreeShape:
    """How far and how wide to draft.

    Attributes:
        depth: levels of draft tokens.
        width: nodes expanded per level, and candidates taken from each; 1 drafts a chain.
        budget: draft tokens verified by one target forward, the root not counted.
    """

    depth: int = 6
    width: int = 10
    budget: int = 60

    def __post_init__(self) -> None:
        for name in ("depth", "width", "budget"):
            if getattr(self, name) < 1:
                raise UsageError(f"tree {name} is {getattr(self, name)}, needed at least 1")
        if self.budget > self.pool:
            raise UsageError(
                f"tree budget is {self.budget}, but depth {self.depth} and width {self.width} "
                f"make only {self.pool} candidates"
            )

    @property
    def pool(self) -> int:
        """Candidates made in all."""
        return self.width + (self.depth - 1) * self.width**2

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """``DEPTH,WIDTH,BUDGET`` as on the command line."""
        try:
            depth, width, budget = (int(part) for part in text.split(","))
        except ValueError:
            raise UsageError(f"tree is {text!r}, needed auto or DEPTH,WIDTH,BUDGET such as 6,10,60") from None
        return cls(depth, width, budget)

    def __str__(self) -> str:
        return f"{self.depth},{self.width},{self.budget}"


@dataclass(frozen=True)
class Tree:
    """Candidates to be verified; slot 0 is the root, the newest token, and parents come before their children.

    Attributes:
        tokens: ``(batch, slots)``.
        parents: ``(batch, slots)``, slot of the parent; the root's is itself.
        depths: ``(batch, slots)``, 0 at the root.
        ancestors: bool ``(batch, slots, slots)``: column is an ancestor of row, or the row itself.
        valid: bool ``(batch, slots)``: padding is never followed.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    valid: Tensor

    @classmethod
    def build(cls, tokens: Tensor, parents: Tensor, depth: int, valid: Tensor | None = None) -> Tree:
        """From tokens and parents ``(batch, slots)``, root included, at most ``depth`` levels under it."""
        slots = tokens.shape[1]
        own = torch.eye(slots, dtype=torch.bool, device=tokens.device).expand(tokens.shape[0], -1, -1)
        ancestors = own
        above = parents[:, :, None].expand(-1, -1, slots)
        for _ in range(depth):
            ancestors = own | ancestors.gather(1, above)
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        return cls(tokens, parents, ancestors.sum(dim=-1) - 1, ancestors, valid)

    @classmethod
    def root_only(cls, root: Tensor) -> Tree:
        """No candidates: plain decoding of ``root (batch,)``."""
        return cls.build(root[:, None], torch.zeros_like(root)[:, None], 0)


@dataclass(frozen=True)
class Frontier:
    """Nodes of one level that are expanded next.

    Attributes:
        tokens: ``(batch, width)``.
        scores: cumulative log-probabilities, fp32 ``(batch, width)``.
        index: places in the pool ``(batch, width)``.
        ancestors: bool ``(batch, width, slots)``: expanded nodes of all levels so far, ``width`` a level, that each
            node descends from or is.
    """

    tokens: Tensor
    scores: Tensor
    index: Tensor
    ancestors: Tensor


class Start:
    """What the first frontiers of all trees of a width have in common.

    Attributes:
        index: places in the pool ``(1, width)``.
        own: bool ``(1, width, width)``: every node is its own only ancestor.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.index = torch.arange(width, device=device)[None]
        self.own = torch.eye(width, dtype=torch.bool, device=device)[None]


class Pool:
    """All candidates of a growing tree, level by level.

    Attributes:
        tokens, scores, parents: ``(batch, capacity)``, filled up to ``size``; parents are places in the pool, -1 for
            children of the root.
    """

    def __init__(self, batch: int, shape: TreeShape, device: torch.device) -> None:
        self.width, self.size = shape.width, 0
        self.tokens = torch.empty(batch, shape.pool, dtype=torch.long, device=device)
        self.scores = torch.empty(batch, shape.pool, dtype=torch.float32, device=device)
        self.parents = torch.full((batch, shape.pool), -1, dtype=torch.long, device=device)

    def _add(self, tokens: Tensor, scores: Tensor, parents: Tensor | None) -> None:
        place = slice(self.size, self.size + tokens.shape[1])
        self.tokens[:, place], self.scores[:, place] = tokens, scores
        if parents is not None:
            self.parents[:, place] = parents
        self.size = place.stop

    def start(self, log_probs: Tensor, children: Tensor, start: Start | None = None) -> Frontier:
        """The root's children ``(batch, width)``, all expanded next."""
        self._add(children, log_probs, None)
        batch, start = children.shape[0], start or Start(self.width, children.device)
        return Frontier(children, log_probs, start.index.expand(batch, -1), start.own.expand(batch, -1, -1))

    def extend(
        self, frontier: Frontier, log_probs: Tensor, children: Tensor, *, last: bool
    ) -> tuple[Frontier, Tensor] | None:
        """Add the children ``(batch, width, width)`` of all nodes of ``frontier``.

        Returns:
            the best of the children, and the node that each descends from, ``(batch, width)``; None after the last
            level.
        """
        first = self.size
        if kernels.serve(log_probs) and self.width**2 <= kernels.MAX_CANDIDATES:
            self.size += self.width**2
            return self._extend_by_kernel(frontier, log_probs, children, first, last)
        totals = (frontier.scores[:, :, None] + log_probs).flatten(1)
        children = children.flatten(1)
        self._add(children, totals, frontier.index.repeat_interleave(self.width, dim=1))
        if last:
            return None
        scores, best = totals.topk(self.width, dim=1)
        above = best // self.width
        slots = frontier.ancestors.shape[2]
        inherited = frontier.ancestors.gather(1, above[:, :, None].expand(-1, -1, slots))
        own = torch.eye(self.width, dtype=torch.bool, device=scores.device).expand(scores.shape[0], -1, -1)
        ancestors = torch.cat([inherited, own], dim=2)
        return Frontier(children.gather(1, best), scores, first + best, ancestors), above

    def _extend_by_kernel(
        self, frontier: Frontier, log_probs: Tensor, children: Tensor, first: int, last: bool
    ) -> tuple[Frontier, Tensor] | None:
        from coral_spec.kernels import tree

        tokens, scores, index, above, ancestors = tree.extend(
            log_probs[0],
            children[0],
            frontier.scores[0],
            frontier.index[0],
            frontier.ancestors[0],
            (self.tokens, self.scores, self.parents),
            first,
            last,
        )
        if last:
            return None
        return Frontier(tokens[None], scores[None], index[None], ancestors[None]), above[None]

    def rerank(self, root: Tensor, budget: int, depth: int) -> Tree:
        """The tree of the ``budget`` best candidates under ``root (batch,)``."""
        served = budget < kernels.MAX_ROWS and self.scores.shape[1] <= kernels.MAX_CANDIDATES
        if served and kernels.serve(self.scores[:, None, :1]):
            from coral_spec.kernels import tree

            pool = self.tokens, self.scores, self.parents
            tokens, parents, depths, ancestors = tree.rerank(pool, root, budget, depth)
            return Tree(tokens, parents, depths, ancestors, torch.ones_like(tokens, dtype=torch.bool))
        # The pool is ordered by level, so a stable sort gives ties to the shallower node.
        best = self.scores.sort(dim=1, descending=True, stable=True).indices[:, :budget]
        kept = best.sort(dim=1).values
        batch, device = root.shape[0], root.device
        slots = torch.arange(1, budget + 1, device=device).expand(batch, -1)
        slot_of = torch.zeros(batch, self.size + 1, dtype=torch.long, device=device)
        slot_of.scatter_(1, kept + 1, slots)
        above = slot_of.gather(1, self.parents.gather(1, kept) + 1)
        zero = torch.zeros(batch, 1, dtype=torch.long, device=device)
        return Tree.build(
            torch.cat([root[:, None], self.tokens.gather(1, kept)], dim=1), torch.cat([zero, above], dim=1), depth
        )


@dataclass(frozen=True)
class Acceptance:
    """The path that verification keeps.

    Attributes:
        path: slots ``(batch, depth + 1)``, the root first; entries past ``count`` are meaningless.
        packed: ``(batch, 1 + depth + 1)``: ``count`` and ``emitted``, as the host reads them.
    """

    path: Tensor
    packed: Tensor

    @property
    def count(self) -> Tensor:
        """``(batch,)``, tokens emitted: accepted draft tokens plus one."""
        return self.packed[:, 0]

    @property
    def emitted(self) -> Tensor:
        """Tokens ``(batch, depth + 1)``: the accepted path and one more draw; valid up to ``count``."""
        return self.packed[:, 1:]


def accept(tree: Tree, draws: Tensor, depth: int) -> Acceptance:
    """Follow the target's own draws through the tree.

    A node is accepted when it and all its ancestors are what the target drew at their parents. Siblings differ, so
    accepted nodes form one path; the draw at its end is emitted too.

    Args:
        tree: what was verified.
        draws: the target's token at every slot whose ancestors are accepted, ``(batch, slots)``; any token elsewhere.
        depth: levels of the tree at most.
    """
    if kernels.serve(tree.ancestors):
        from coral_spec.kernels import tree as launch

        return Acceptance(*launch.accept(tree.tokens, tree.parents, tree.depths, tree.valid, draws, depth))
    matches = (tree.tokens == draws.gather(1, tree.parents)) & tree.valid
    matches[:, 0] = True
    accepted = (~tree.ancestors | matches[:, None, :]).all(dim=-1)
    slots = torch.arange(tree.tokens.shape[1], device=draws.device).expand_as(tree.tokens)
    # Rejected nodes land in a column of their own, dropped at once.
    column = torch.where(accepted, tree.depths, depth + 1)
    path = torch.zeros(tree.tokens.shape[0], depth + 2, dtype=torch.long, device=draws.device)
    path = path.scatter_(1, column, slots)[:, : depth + 1]
    return Acceptance(path, torch.cat([accepted.sum(dim=1, keepdim=True), draws.gather(1, path)], dim=1))
