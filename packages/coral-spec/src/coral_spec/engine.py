"""The decoding loop's state and its rounds: draft, verify, accept, commit. Batched, and free of host decisions.

One round costs one target forward. The host reads a round's tokens once, after everything was launched; on CUDA a
round is a captured graph (`coral_spec.graphs`), and the host may be a round ahead. Ours; the scheme is EAGLE-2's with
the acceptance of `coral_spec.sampling`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from coral_spec import kernels
from coral_spec.backbone import Backbone
from coral_spec.cache import StaticCache
from coral_spec.drafts import PREFILL_CHUNK, Draft
from coral_spec.graphs import AHEAD, PROMPT_ROWS, Graphs
from coral_spec.masks import chain_ancestors
from coral_spec.sampling import Sampling
from coral_spec.statistics import Stopwatch
from coral_spec.tree import Acceptance, TreeShape, accept
from expkit.errors import UsageError

CAPTURED_PROMPT = 384  # longer prompts are read in larger pieces, operation by operation
# Slots come in such numbers: Triton compiles attention once more for a capacity that 16 does not divide, and a tree's
# margin is any number, so that plain rounds of a session which had drafted took seconds to begin.
SLOTS = 64


@dataclass(frozen=True)
class RoundResult:
    """Tokens of one round, on the host.

    Attributes:
        tokens: one list per row: accepted draft tokens and the draw after them.
        logits: the target's logits for the round's tokens ``(batch, depth + 1, vocab)``, if they were asked for.
    """

    tokens: list[list[int]]
    logits: Tensor | None


class Session:
    """Caches and positions of one or more rows that share a prompt.

    Attributes:
        lengths: ``(batch,)``, tokens in the target's cache; the newest token stands behind them in ``history``.
        history: tokens by position, ``(batch, capacity)``.
        graphs: captured rounds, where kernels serve all of them: CUDA, one row, recognised layers.
        busy: an answer is on its way.
    """

    def __init__(self, backbone: Backbone, draft: Draft, capacity: int) -> None:
        self.backbone, self.draft = backbone, draft
        self.device = backbone.target.device
        self.capacity = self._slots(capacity)
        self.cache = StaticCache(self.capacity)
        draft.resize(1, self.capacity, 0)
        self.lengths = torch.zeros(1, dtype=torch.long, device=self.device)
        self.history = torch.zeros(1, self.capacity, dtype=torch.long, device=self.device)
        self.watch = Stopwatch(self.device)
        self.graphs = Graphs(self) if _served(backbone, draft) and kernels.available(self.device) else None
        self.busy = False
        self._ready: list[tuple[Tensor, Tensor | None]] = []
        self._filled = 0
        self._levels = torch.arange(draft.depth + 1, device=self.device)

    @property
    def _margin(self) -> int:
        """Behind the last token that is asked for: rounds under way, or rows of a prompt's last replay."""
        return max(self.draft.slack + AHEAD * (self.draft.depth + 1), PROMPT_ROWS)

    def _slots(self, capacity: int) -> int:
        """For ``capacity`` tokens at least, and what rounds under way may write behind them."""
        return -(-(capacity + self._margin) // SLOTS) * SLOTS

    def redraft(self, draft: Draft) -> bool:
        """Draft with ``draft`` from now on, keeping what is cached and captured; False where that can't be.

        There may be a little less room afterwards.
        """
        if not draft.follow(self.draft):
            return False
        self.settle()
        self.draft = draft
        self._levels = torch.arange(draft.depth + 1, device=self.device)
        if not (_served(self.backbone, draft) and kernels.available(self.device)):
            self.graphs = None
        elif self.graphs is None:
            self.graphs = Graphs(self)
        return True

    @property
    def ahead(self) -> int:
        """Rounds that may be under way at a time."""
        return 1 if self.graphs is None else AHEAD

    @property
    def under_way(self) -> int:
        """Rounds that were begun and not collected."""
        return len(self._ready) if self.graphs is None else self.graphs.under_way

    @property
    def filled(self) -> int:
        """The largest of ``lengths``, without asking the device."""
        return self._filled

    @property
    def room(self) -> int:
        """Tokens that it holds."""
        return self.capacity - self._margin

    @property
    def reach(self) -> int:
        """No less than ``lengths`` ever are: rounds that are under way may go past the room."""
        return self.room + self.draft.depth + 1

    def reserve(self, capacity: int) -> None:
        """Grow to hold ``capacity`` tokens, keeping what is cached; twice the room at least, as growing costs graphs.

        Raises:
            UsageError: there is no memory for it. What was cached is still there.
        """
        if capacity <= self.room:
            return
        capacity = max(capacity, min(2 * self.room, self.backbone.context_length))
        self.settle()
        batch, filled, needed = self.history.shape[0], self._filled, self._slots(capacity)
        try:
            if self.graphs is not None:
                self.graphs.forget()  # first, because buffers move
            self.cache.resize(batch, needed, filled)
            self.draft.resize(batch, needed, filled)
            self.history = torch.nn.functional.pad(self.history, (0, needed - self.capacity))
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            raise UsageError(f"there is no memory to grow the cache from {self.room} to {capacity} tokens") from error
        self.capacity = needed

    def repeat(self, batch: int) -> None:
        """``batch`` rows equal to the first one."""
        self.cache.resize(1, self.capacity, self._filled)
        self.cache.resize(batch, self.capacity, self._filled)
        self.draft.resize(1, self.capacity, self._filled)
        self.draft.resize(batch, self.capacity, self._filled)
        self.graphs = None
        self.lengths = self.lengths[:1].repeat(batch)
        self.history = self.history[:1].repeat(batch, 1)

    def prefill(self, ids: list[int], keep: int = 0) -> tuple[Tensor, Tensor]:
        """Run the prompt (single row), reusing the first ``keep`` cached positions.

        Returns:
            the logits ``(1, vocab)`` after the prompt, and the features ``(1, n, hidden)`` from ``keep`` on.
        """
        self.watch.lap("rest")
        self.rewind(keep)  # first of all: a prefill that is broken off must not leave stale entries behind
        tokens = torch.tensor([ids], device=self.device)
        self.history[:, : len(ids)] = tokens
        features = self._features(tokens[:, keep:], keep)
        logits = self.backbone.head(features[:, -1:])[:, 0]
        self.lengths.fill_(len(ids))
        self._filled = len(ids)
        self.watch.lap("target")
        return logits, features

    def _features(self, tokens: Tensor, begin: int) -> Tensor:
        if self.graphs is not None and tokens.shape[1] <= CAPTURED_PROMPT:
            captured = self.graphs.prefill(tokens, begin)
            if captured is not None:
                return captured
        parts = []
        for first in range(0, tokens.shape[1], PREFILL_CHUNK):
            start = self.lengths.new_full((1,), begin + first)
            parts.append(self.run_prompt(tokens[:, first : first + PREFILL_CHUNK], start, begin + first))
        return torch.cat(parts, dim=1)

    def run_prompt(self, tokens: Tensor, start: Tensor, filled: int) -> Tensor:
        """Features of ``tokens (1, n)`` that follow one another from position ``start (1,)`` on, which are cached."""
        positions = start[:, None] + torch.arange(tokens.shape[1], device=self.device)
        ancestors = chain_ancestors(1, tokens.shape[1], self.device)
        return self.backbone.forward(tokens, positions, ancestors, start, self.cache, filled)

    def begin(self, logits: Tensor, features: Tensor, keep: int, sampling: Sampling, seeds: Tensor) -> list[int]:
        """Draw the first token of every row after :meth:`prefill` and show the prompt to the draft.

        Args:
            logits, features, keep: of :meth:`prefill`; a single row is repeated.
            seeds: ``(batch,)``.
        """
        try:
            return self._begin(logits, features, keep, sampling, seeds)
        except Exception as error:  # everything else that may fail to compile runs at load, or is captured first
            if not kernels.give_up(error):
                raise
            return self._begin(logits, features, keep, sampling, seeds)

    def _begin(self, logits: Tensor, features: Tensor, keep: int, sampling: Sampling, seeds: Tensor) -> list[int]:
        batch = self.lengths.shape[0]
        root = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        first = sampling.draw(logits[:, None].expand(batch, -1, -1), self.lengths[:, None], root, seeds)
        self.history.scatter_(1, self.lengths[:, None], first)
        tokens = self.history[:, keep + 1 : self._filled + 1]
        if not self._absorbed_by_graph(tokens, features, keep):
            starts = torch.full_like(self.lengths, keep)
            self.draft.absorb(tokens, features.expand(batch, -1, -1), starts, self.lengths - keep, keep)
        self.watch.lap("drafter")
        return first[:, 0].tolist()

    def _absorbed_by_graph(self, tokens: Tensor, features: Tensor, begin: int) -> bool:
        if self.graphs is None or tokens.shape[1] > CAPTURED_PROMPT or not self.draft.state():
            return False
        return self.graphs.absorb(tokens, features, begin)

    def round(self, sampling: Sampling, seeds: Tensor, keep_logits: bool = False) -> RoundResult:
        """Draft, verify, accept and commit once."""
        self.launch(sampling, seeds, keep_logits)
        return self.collect()

    def launch(self, sampling: Sampling, seeds: Tensor, keep_logits: bool = False) -> None:
        """Begin a round; :meth:`collect` gives its tokens. On CUDA the host may be one round ahead.

        With ``keep_logits`` a round must be collected before the next one is begun.
        """
        if self.graphs is not None:
            self.graphs.launch(sampling, seeds, keep_logits)
        else:
            self._ready.append(self.advance(sampling, seeds, keep_logits, self._filled))

    def capture(self, sampling: Sampling) -> bool:
        """Capture rounds with the current draft before they are needed; False where that can't be."""
        return self.graphs is not None and self.room >= self.filled and self.graphs.capture(sampling)

    def collect(self) -> RoundResult:
        """Wait for the oldest round that was begun."""
        packed, logits = self._ready.pop(0) if self.graphs is None else self.graphs.collect()
        rows = packed.tolist()
        # Rows of a batch are at different lengths, and the shortest may not be the one that grew least.
        self._filled = self._filled + rows[0][0] if len(rows) == 1 else int(self.lengths.max())
        self.watch.lap("rest" if self.graphs is None else "rounds")
        return RoundResult([row[1 : 1 + row[0]] for row in rows], logits)

    def advance(
        self, sampling: Sampling, seeds: Tensor, keep_logits: bool, filled: int
    ) -> tuple[Tensor, Tensor | None]:
        """A round on the device, without waiting for it; all state changes in place.

        Args:
            sampling, seeds, keep_logits: see :meth:`launch`.
            filled: the largest of ``lengths``, or more.

        Returns:
            the number of new tokens and the tokens, ``(batch, 1 + depth + 1)``, and the logits if asked for.
        """
        depth, lengths = self.draft.depth, self.lengths
        tree = self.draft.propose(self.history, lengths, filled, self.watch)
        self.watch.lap("rest")
        positions = lengths[:, None] + tree.depths
        hidden = self.backbone.forward(tree.tokens, positions, tree.ancestors, lengths, self.cache, filled)
        logits = self.backbone.head(hidden)
        self.watch.lap("target")
        places = lengths[:, None] + 1 + self._levels
        if self.device.type == "cpu" and depth and not sampling.greedy:
            draws = sampling.draw_path(logits, places, tree, seeds)
        else:
            draws = sampling.draw(logits, places, tree.depths, seeds)
        accepted = accept(tree, draws, depth)
        self._commit(accepted, hidden, filled)
        kept = None
        if keep_logits:
            kept = logits.gather(1, accepted.path[:, :, None].expand(-1, -1, logits.shape[2]))
        return accepted.packed, kept

    def _commit(self, accepted: Acceptance, hidden: Tensor, filled: int) -> None:
        """Move the accepted path behind the prefix, note its tokens, and show it to the draft."""
        starts, path = self.lengths[:, None], accepted.path
        if self.draft.depth:
            self.cache.commit(self.lengths, path)
        self.history.scatter_(1, starts + 1 + self._levels, accepted.emitted)
        features = hidden.gather(1, path[:, :, None].expand(-1, -1, hidden.shape[2]))
        self.watch.lap("rest")
        self.draft.absorb(accepted.emitted, features, self.lengths, accepted.count, filled)
        self.watch.lap("drafter")
        self.lengths += accepted.count

    def rewind(self, length: int) -> None:
        """Forget everything behind the first ``length`` tokens of every row."""
        self.settle()
        self._filled = min(self._filled, length)
        self.lengths.clamp_(max=length)

    def settle(self) -> None:
        """Let go of rounds that were begun and never collected; their tokens stay in the caches, unseen."""
        self._ready.clear()
        if self.graphs is not None:
            self.graphs.settle()
        self._filled = int(self.lengths.max())  # a round that was interrupted while it was read counts too

    def captured(self, sampling: Sampling, keep_logits: bool = False) -> set[TreeShape | None]:
        """Trees with rounds that are captured for this way of sampling: to change to one of them costs nothing."""
        return set() if self.graphs is None else self.graphs.shapes(sampling, keep_logits)

    def shares(self) -> dict[str, float]:
        """Of a captured round's time, by part; empty where none was timed."""
        return {} if self.graphs is None else self.graphs.shares()

    def state(self) -> list[Tensor]:
        """What a round changes, but for caches and for tokens behind the newest."""
        return [self.lengths, self.history, *self.draft.state()]

    def nbytes(self) -> int:
        """Bytes of the target's cache."""
        return self.cache.nbytes()


def _served(backbone: Backbone, draft: Draft) -> bool:
    """Whether kernels serve everything that a round does; on a GPU a warning says why they do not."""
    dtype = str(backbone.target.dtype).removeprefix("torch.")
    reasons = {
        f"a tree of {draft.rows - 1} tokens is larger than {kernels.MAX_ROWS - 1}": draft.rows > kernels.MAX_ROWS,
        f"{dtype} is not bf16 or fp32": backbone.target.dtype not in kernels.DTYPES,
        "layers of this architecture are not taken apart": not backbone.layers,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found and backbone.target.device.type == "cuda":
        warnings.warn(f"{found[0]}: rounds are launched one operation at a time, many times as slow", stacklevel=3)
    return not found
