"""Where candidates come from: a trained drafter, the text so far (n-gram look-up), or nowhere (plain decoding)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from coral_spec import kernels
from coral_spec.backbone import Backbone
from coral_spec.cache import SlotStore
from coral_spec.heads import ProposalHead
from coral_spec.layers import FusedDrafter, Nodes
from coral_spec.masks import chain_ancestors
from coral_spec.statistics import Stopwatch
from coral_spec.tree import Pool, Start, Tree, TreeShape

PREFILL_CHUNK = 512


class Draft(Protocol):
    """A source of candidates for every row of a batch.

    Attributes:
        shape: of its trees; None for plain decoding.
        depth: levels of its trees; 0 for plain decoding.
        slack: cache slots needed behind the filled prefix.
        rows: most nodes of one forward, the target's or its own.
    """

    shape: TreeShape | None
    depth: int
    slack: int
    rows: int

    def follow(self, other: Draft) -> bool:
        """Go on where ``other`` stands, sharing what it has cached; False where that can't be."""
        ...

    def resize(self, batch: int, capacity: int, filled: int) -> None:
        """Make room for ``batch`` rows (a single row is repeated) of ``capacity`` slots, keeping ``filled``."""
        ...

    def absorb(self, tokens: Tensor, features: Tensor, starts: Tensor, counts: Tensor, filled: int) -> None:
        """Learn what the target has committed.

        Args:
            tokens: ``(batch, n)``, the token after each feature.
            features: ``(batch, n, hidden)``, the target's, from index ``starts`` on.
            starts, counts: ``(batch,)``, first index and number of valid entries per row.
            filled: the largest of ``starts``, known to the host.
        """
        ...

    def state(self) -> list[Tensor]:
        """What :meth:`absorb` changes, but for caches."""
        ...

    def take_figures(self) -> dict[str, float]:
        """Telemetry since the last call: `rows_per_round`, and with a router `router_recall`."""
        ...

    def propose(self, history: Tensor, lengths: Tensor, filled: int, watch: Stopwatch) -> Tree:
        """A tree under the newest token.

        Args:
            history: tokens by position, ``(batch, capacity)``; the root stands at ``lengths``.
            lengths: ``(batch,)``, tokens in the target's cache.
            filled: the largest of ``lengths``, known to the host.
            watch: takes the laps ``drafter`` and ``head``.
        """
        ...


class NoDraft:
    """Plain decoding by the same engine."""

    shape: TreeShape | None = None
    depth = 0
    slack = rows = 1

    def follow(self, other: Draft) -> bool:
        """Nothing is cached."""
        return True

    def resize(self, batch: int, capacity: int, filled: int) -> None:
        """Nothing is kept."""

    def absorb(self, tokens: Tensor, features: Tensor, starts: Tensor, counts: Tensor, filled: int) -> None:
        """Nothing is learnt."""

    def state(self) -> list[Tensor]:
        """None."""
        return []

    def take_figures(self) -> dict[str, float]:
        """None."""
        return {}

    def propose(self, history: Tensor, lengths: Tensor, filled: int, watch: Stopwatch) -> Tree:
        """The root alone."""
        return Tree.root_only(history.gather(1, lengths[:, None])[:, 0])


class NgramDraft:
    """Prompt look-up: continuations of earlier occurrences of the newest n tokens (Saxena, 2023), as a tree. Ours.

    The ``width`` best occurrences - longest match first, then the latest - each give a chain of ``depth`` tokens;
    common beginnings are merged. A match that reaches into the newest tokens is continued periodically.

    Args:
        shape: at most ``width`` chains of ``depth`` tokens, fewer or shorter where ``budget`` tokens are less.
        longest, shortest: n of the longest and shortest match.
    """

    def __init__(self, shape: TreeShape, longest: int = 4, shortest: int = 2) -> None:
        self.shape: TreeShape | None = shape
        self.depth = min(shape.depth, shape.budget)
        self.width = max(1, min(shape.width, shape.budget // self.depth))
        self.longest, self.shortest = longest, shortest
        self.slack = self.rows = self.depth * self.width + 1

    def follow(self, other: Draft) -> bool:
        """The engine keeps the history."""
        return True

    def resize(self, batch: int, capacity: int, filled: int) -> None:
        """The engine keeps the history."""

    def absorb(self, tokens: Tensor, features: Tensor, starts: Tensor, counts: Tensor, filled: int) -> None:
        """The engine keeps the history."""

    def state(self) -> list[Tensor]:
        """None."""
        return []

    def take_figures(self) -> dict[str, float]:
        """None."""
        return {}

    def propose(self, history: Tensor, lengths: Tensor, filled: int, watch: Stopwatch) -> Tree:
        """See :class:`Draft`. Without any match the root alone is verified."""
        text = history[:, : filled + 1]
        root = text.gather(1, lengths[:, None])
        ends, found = self._occurrences(text, lengths)
        if text.device.type == "cpu" and not bool(found.any()):  # elsewhere asking would mean waiting
            watch.lap("drafter")
            return Tree.root_only(root[:, 0])
        # (batch, width, depth): the token j places after each occurrence, wrapped round its period.
        step = torch.arange(self.depth, device=text.device)
        period = (lengths[:, None] - ends).clamp(min=1)
        index = ends[:, :, None] + 1 + step % period[:, :, None]
        tokens = text.gather(1, index.flatten(1).clamp(max=filled)).view_as(index)
        tree = self._merge(root, tokens, found)
        watch.lap("drafter")
        return tree

    def _occurrences(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Last indices ``(batch, width)`` of the best earlier matches of the newest tokens, and which are real."""
        index = torch.arange(text.shape[1], device=text.device)
        running = torch.ones_like(text, dtype=torch.bool)
        matched = torch.zeros_like(text)
        for back in range(self.longest):
            newest = text.gather(1, (lengths - back).clamp(min=0)[:, None])
            shifted = text.roll(back, dims=1)
            running = running & (shifted == newest) & (index >= back) & (lengths >= back)[:, None]
            matched = matched + running
        usable = (matched >= self.shortest) & (index < lengths[:, None])
        score = torch.where(usable, matched * text.shape[1] + index, -1)
        best = score.topk(min(self.width, text.shape[1]), dim=1)
        short = self.width - best.indices.shape[1]
        pad = torch.nn.functional.pad
        return pad(best.indices, (0, short)), pad(best.values, (0, short), value=-1) >= 0

    def _merge(self, root: Tensor, tokens: Tensor, found: Tensor) -> Tree:
        """A trie of chains: a node equal to one of an earlier chain, path and all, is left out."""
        width, depth = tokens.shape[1:]
        same = (tokens[:, :, None] == tokens[:, None]).cumprod(dim=-1).bool()
        same = same & found[:, :, None, None] & found[:, None, :, None]
        # First chain that shares the path down to each level: (batch, width, depth).
        chains = torch.arange(width, device=tokens.device)
        owner = torch.where(same, chains[None, None, :, None], width).amin(dim=2).clamp(max=width - 1)
        valid = found[:, :, None] & (owner == chains[None, :, None])
        level = torch.arange(1, depth, device=tokens.device)
        above = torch.cat(
            [torch.zeros_like(owner[:, :, :1]), owner[:, :, :-1] * depth + level], dim=2
        )  # slot of node (chain, level) is 1 + chain * depth + level, level counted from 0
        none = torch.zeros_like(root)
        return Tree.build(
            torch.cat([root, tokens.flatten(1)], dim=1),
            torch.cat([none, above.flatten(1)], dim=1),
            depth,
            torch.cat([torch.ones_like(root, dtype=torch.bool), valid.flatten(1)], dim=1),
        )


class DrafterDraft:
    """EAGLE-2's dynamic tree from a trained drafter.

    The drafter's cache entry i holds what it computed from the target's feature i and token i + 1. Drafted entries
    are written behind the filled prefix and overwritten by the next round.
    """

    def __init__(self, backbone: Backbone, drafter: FusedDrafter, head: ProposalHead, shape: TreeShape) -> None:
        self.head = head
        self.shape: TreeShape | None = shape
        self.depth, self.width = shape.depth, shape.width
        self.rows = max(shape.budget + 1, shape.width, shape.depth + 1)
        self.slack = max(self.rows, (shape.depth - 1) * shape.width + 1)
        self._backbone, self._layers = backbone, drafter
        self._store = SlotStore(0)
        self._feature: Tensor = torch.empty(0)  # (batch, hidden): predicted for the newest token
        device = backbone.target.device
        self._committed = chain_ancestors(1, shape.depth + 1, device)
        self._start = Start(shape.width, device)
        self._seen = torch.zeros(2, dtype=torch.long, device=backbone.target.device)  # see ProposalHead.seen
        self._proposed = False

    def follow(self, other: Draft) -> bool:
        """See :class:`Draft`: another tree of the same drafter."""
        if not isinstance(other, DrafterDraft) or other._layers is not self._layers:
            return False
        self._store, self._feature, self._seen = other._store, other._feature, other._seen
        return True

    def resize(self, batch: int, capacity: int, filled: int) -> None:
        """See :class:`Draft`."""
        self._store.resize(batch, capacity, filled)
        if self._feature.numel() and self._feature.shape[0] != batch:
            self._feature = self._feature[:1].repeat(batch, 1)

    def absorb(self, tokens: Tensor, features: Tensor, starts: Tensor, counts: Tensor, filled: int) -> None:
        """See :class:`Draft`."""
        if self._proposed:  # else these are a prompt's tokens
            self._proposed = False
            seen = self.head.seen(tokens, counts)
            if seen is not None:
                self._seen += seen
        total = tokens.shape[1]
        for begin in range(0, total, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, total)
            batch, count = tokens.shape[0], end - begin
            if count == self.depth + 1:
                ancestors = self._committed.expand(batch, -1, -1)
            else:
                ancestors = chain_ancestors(batch, count, tokens.device)
            at = starts + begin if begin else starts
            output = self._forward(tokens[:, begin:end], features[:, begin:end], at, ancestors, filled + begin)
        last = (counts - 1 - begin)[:, None, None].expand(-1, 1, output.shape[2])
        feature = output.gather(1, last)[:, 0]
        if self._feature.shape == feature.shape:  # in place: captured graphs know it by its address
            self._feature.copy_(feature)
        else:
            self._feature = feature

    def state(self) -> list[Tensor]:
        """The predicted feature, and what telemetry counts."""
        return [self._feature, self._seen]

    def take_figures(self) -> dict[str, float]:
        """See :class:`Draft`."""
        found, drawn = self._seen.tolist()
        self._seen.zero_()
        figures = {"rows_per_round": float(self.head.rows * self.depth)}
        return {**figures, "router_recall": found / drawn} if drawn else figures

    def _forward(
        self,
        tokens: Tensor,
        features: Tensor,
        lengths: Tensor,
        ancestors: Tensor,
        filled: int,
        *,
        level: int | None = None,
        above: Tensor | None = None,
    ) -> Tensor:
        """Predicted features ``(batch, n, hidden)``; entries are written behind those that ``ancestors`` has more of.

        Args:
            tokens: ``(batch, n)``.
            features: ``(batch, m, hidden)``; ``above (batch, n)`` says which, or one for all, or one for each.
            lengths: ``(batch,)``, filled prefix.
            ancestors: bool ``(batch, n, offset + n)``.
            filled: the largest of ``lengths``.
            level: of a tree, whose entries all stand at the same position; None: entries follow one another.
        """
        backbone, count = self._backbone, tokens.shape[1]
        offset, limit = ancestors.shape[2] - count, self._layers.positions
        visible = min(self._store.capacity, -(-(filled + offset + count) // 64) * 64)
        if kernels.serve(features) and count <= kernels.MAX_ROWS and backbone.table is not None:
            inputs, positions = kernels.gather_inputs(tokens, backbone.table, features, above, lengths, level, limit)
        else:
            if above is not None:
                features = features.gather(1, above[:, :, None].expand(-1, -1, features.shape[2]))
            inputs = torch.cat([backbone.embed(tokens), features.expand(-1, count, -1)], dim=-1)
            steps = torch.arange(count, device=tokens.device) if level is None else tokens.new_full((count,), level)
            positions = (lengths[:, None] + steps).clamp(max=limit - 1)
        nodes = Nodes(positions, ancestors, lengths, offset, visible, features.dtype)
        return self._layers(inputs, nodes, self._store)

    def propose(self, history: Tensor, lengths: Tensor, filled: int, watch: Stopwatch) -> Tree:
        """See :class:`Draft`."""
        assert self.shape is not None
        root = history.gather(1, lengths[:, None])[:, 0]
        pool = Pool(lengths.shape[0], self.shape, lengths.device)
        features, above = self._feature[:, None], None
        watch.lap("drafter")
        self._proposed = True
        log_probs, children = self._children(features, None, watch)
        frontier = pool.start(log_probs[:, 0], children[:, 0], self._start)
        for level in range(self.depth - 1):
            features = self._forward(
                frontier.tokens, features, lengths, frontier.ancestors, filled, level=level, above=above
            )
            watch.lap("drafter")
            log_probs, children = self._children(features, frontier.scores, watch)
            grown = pool.extend(frontier, log_probs, children, last=level == self.depth - 2)
            if grown is not None:
                frontier, above = grown
        return pool.rerank(root, self.shape.budget, self.depth)

    def _children(self, features: Tensor, scores: Tensor | None, watch: Stopwatch) -> tuple[Tensor, Tensor]:
        best = self.head.top(features, self.width, scores)
        watch.lap("head")
        return best
