"""Rounds captured as CUDA graphs, replayed without the host: a round costs one launch instead of hundreds.

One graph holds draft, verification, acceptance and commit. Lengths, tokens and features are read and changed on the
device, so one graph serves every position of a session. The host reads a round's tokens from pinned memory, and may
launch the next round before that. Ours.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from coral_spec import kernels
from coral_spec.sampling import Sampling
from coral_spec.statistics import Stopwatch
from coral_spec.tree import TreeShape

if TYPE_CHECKING:
    from coral_spec.engine import Session

AHEAD = 2  # rounds that may be under way
KEPT = 16  # captured rounds of a session: two for each tree and way of sampling, one of them timed
PROMPT_ROWS = 64  # tokens of a prompt read by one replay
TIMED_EVERY = 32  # rounds, of which one is timed part by part
_Result = TypeVar("_Result")
_Key = tuple[TreeShape | None, Sampling, bool, bool]


@dataclass
class _Round:
    """A captured round and where it leaves its results; ``watch`` if it is timed part by part.

    ``uses`` are owners of tensors that the graph reads, which must not be freed before it.
    """

    graph: Any
    packed: Tensor
    logits: Tensor | None
    watch: Stopwatch | None
    uses: tuple[Any, ...]


@dataclass
class _Prompt:
    """A captured forward of some prompt tokens: inputs and output stay where they are."""

    graph: Any
    tokens: Tensor
    start: Tensor
    features: Tensor


@dataclass
class _Absorbed:
    """A captured look of the draft at some prompt tokens; ``count`` of them are meant."""

    graph: Any
    tokens: Tensor
    features: Tensor
    start: Tensor
    count: Tensor
    uses: Any


@dataclass
class _Landing:
    """Where a round's tokens arrive on the host."""

    host: Tensor
    done: Any
    logits: Tensor | None = None
    watch: Stopwatch | None = None


def _known(sampling: Sampling) -> Sampling:
    """One for all that are greedy."""
    return Sampling() if sampling.greedy else sampling


class Graphs:
    """The captured rounds of a session, by what they were captured for.

    When the device has no memory left for a graph, rounds are launched operation by operation from then on, which a
    warning says once.
    """

    def __init__(self, session: Session) -> None:
        self._session: Session = weakref.proxy(session)  # no cycle: caches are freed with the session
        self._rounds: dict[_Key, _Round] = {}
        self._timed: dict[TreeShape | None, dict[str, float]] = {}
        self._prompt: _Prompt | None = None
        self._absorbed: _Absorbed | None = None
        self._seeds = torch.zeros(1, dtype=torch.long, device=session.device)
        self._landings: list[_Landing] = []
        self._flying: list[_Landing] = []
        self._count = 0
        self._pool: Any = None
        self._refused = False

    def launch(self, sampling: Sampling, seeds: Tensor, keep_logits: bool) -> None:
        """See `Session.launch`."""
        assert len(self._flying) < AHEAD
        if seeds is not self._seeds:
            self._seeds.copy_(seeds)
        timed = not keep_logits and self._count % TIMED_EVERY == 1
        captured = self._round(sampling, keep_logits, timed)
        if captured is None:
            packed, logits = self._run(sampling, keep_logits)
        else:
            captured.graph.replay()
            packed, logits = captured.packed, captured.logits
        landing = self._landing(packed.shape[1])
        self._count += 1
        landing.host.copy_(packed, non_blocking=True)
        landing.logits, landing.watch = logits, None if captured is None else captured.watch
        landing.done.record()
        self._flying.append(landing)

    def capture(self, sampling: Sampling) -> bool:
        """See `Session.capture`: rounds without logits."""
        return all(self._round(sampling, False, timed, needed=False) is not None for timed in (False, True))

    def collect(self) -> tuple[Tensor, Tensor | None]:
        """See `Session.collect`."""
        landing = self._flying.pop(0)
        landing.done.synchronize()
        if landing.watch is not None:  # before the round is replayed again
            timed = self._timed.setdefault(self._session.draft.shape, {})
            for part, seconds in landing.watch.split().items():
                timed[part] = timed.get(part, 0.0) + seconds
        return landing.host, landing.logits

    def _landing(self, width: int) -> _Landing:
        """The next place for the tokens of a round, with room for ``width`` numbers."""
        if not self._landings or self._landings[0].host.shape[1] != width:  # another depth: nothing is under way
            self._landings = [
                _Landing(torch.empty(1, width, dtype=torch.long, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
                for _ in range(AHEAD)
            ]
        return self._landings[self._count % AHEAD]

    def shapes(self, sampling: Sampling, keep_logits: bool) -> set[TreeShape | None]:
        """Trees whose rounds are captured for this way of sampling."""
        wanted = (_known(sampling), keep_logits, False)
        return {key[0] for key in self._rounds if key[1:] == wanted}

    @property
    def empty(self) -> bool:
        """No round is captured, and nothing stands against capturing one."""
        return not self._rounds and not self._refused

    def shares(self) -> dict[str, float]:
        """Of a round's time, by part; empty before a round was timed."""
        timed = self._timed.get(self._session.draft.shape, {})
        whole = sum(timed.values())
        return {part: seconds / whole for part, seconds in timed.items()} if whole else {}

    def prefill(self, tokens: Tensor, begin: int) -> Tensor | None:
        """Features of ``tokens (1, n)`` from position ``begin`` on, some rows a replay; None without a graph."""
        captured = self._prompt_rows()
        if captured is None:
            return None
        features = []
        for first in range(0, tokens.shape[1], PROMPT_ROWS):
            rows = tokens[:, first : first + PROMPT_ROWS]
            captured.tokens[:, : rows.shape[1]] = rows  # rows behind them write slots that the next rows overwrite
            captured.start.fill_(begin + first)
            captured.graph.replay()
            features.append(captured.features[:, : rows.shape[1]].clone())
        return torch.cat(features, dim=1)

    def absorb(self, tokens: Tensor, features: Tensor, begin: int) -> bool:
        """Show a prompt to the draft, some rows a replay: ``tokens (1, n)`` after ``features (1, n, hidden)``.

        Returns:
            False without a graph: nothing was done.
        """
        captured = self._absorbed_rows(features)
        if captured is None:
            return False
        for first in range(0, tokens.shape[1], PROMPT_ROWS):
            rows = tokens[:, first : first + PROMPT_ROWS]
            count = rows.shape[1]
            captured.tokens[:, :count] = rows
            captured.features[:, :count] = features[:, first : first + count]
            captured.start.fill_(begin + first)
            captured.count.fill_(count)
            captured.graph.replay()
        return True

    @property
    def under_way(self) -> int:
        """Rounds that were launched and not collected."""
        return len(self._flying)

    def settle(self) -> None:
        """Wait for what is under way and drop it."""
        while self._flying:
            self.collect()

    def forget(self) -> None:
        """Drop all graphs: buffers have moved."""
        self.settle()
        self._rounds.clear()
        self._prompt = self._absorbed = None
        self._pool = None  # it goes with the last graph that used it

    def _run(self, sampling: Sampling, keep_logits: bool) -> tuple[Tensor, Tensor | None]:
        session = self._session
        return session.advance(sampling, self._seeds, keep_logits, session.reach)

    def _round(self, sampling: Sampling, keep_logits: bool, timed: bool, needed: bool = True) -> _Round | None:
        sampling, session = _known(sampling), self._session
        key = session.draft.shape, sampling, keep_logits, timed
        if key in self._rounds:
            self._rounds[key] = self._rounds.pop(key)  # the last one is the one used last
        else:
            watch = session.watch.for_graph() if timed else None
            known = (session.draft.shape, sampling, keep_logits, not timed) in self._rounds  # then all is compiled
            run = lambda: self._run(sampling, keep_logits)  # noqa: E731
            found = self._capture(run, watch, warm_up=not known, needed=needed)
            if found is not None:
                while len(self._rounds) >= KEPT:  # requests may come with ever new temperatures
                    del self._rounds[next(iter(self._rounds))]
                self._rounds[key] = _Round(found[0], *found[1], watch, (session.draft, session._levels))
        return self._rounds.get(key)

    def _prompt_rows(self) -> _Prompt | None:
        if self._prompt is None:
            session = self._session
            tokens = torch.zeros(1, PROMPT_ROWS, dtype=torch.long, device=session.device)
            start = session.lengths.clone()
            found = self._capture(lambda: session.run_prompt(tokens, start, session.capacity - PROMPT_ROWS))
            if found is not None:
                self._prompt = _Prompt(found[0], tokens, start, found[1])
        return self._prompt

    def _absorbed_rows(self, like: Tensor) -> _Absorbed | None:
        if self._absorbed is None:
            session = self._session
            tokens = torch.zeros(1, PROMPT_ROWS, dtype=torch.long, device=session.device)
            features = like.new_zeros(1, PROMPT_ROWS, like.shape[2])
            start, count = session.lengths.clamp(max=session.room), torch.ones_like(session.lengths)
            found = self._capture(lambda: session.draft.absorb(tokens, features, start, count, session.room))
            if found is not None:
                self._absorbed = _Absorbed(found[0], tokens, features, start, count, session.draft)
        return self._absorbed

    def _capture(
        self,
        run: Callable[[], _Result],
        timer: Stopwatch | None = None,
        *,
        warm_up: bool = True,
        needed: bool = True,
    ) -> tuple[Any, _Result] | None:
        """Run once for the side effects on compilers and libraries, put the state back, and record, laps included.

        Where there is no memory for a graph that is not ``needed``, nothing else is given up for it.
        """
        if self._refused:
            return None
        session = self._session
        watch, state = session.watch, session.state()
        before = [part.clone() for part in state]
        session.watch = watch.silent()
        stream: Any = torch.cuda.Stream(session.device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(session.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                try:
                    if warm_up:
                        run()
                finally:
                    for part, saved in zip(state, before, strict=True):
                        part.copy_(saved)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                session.watch = timer or session.watch
                session.watch.lap("rest")
                result = run()
            self._pool = graph.pool()
        except Exception as error:  # out of memory above all
            given_up = kernels.give_up(error)
            if not (given_up or isinstance(error, RuntimeError)):
                raise
            current.wait_stream(stream)
            if not (needed or given_up):
                torch.cuda.empty_cache()
                return None
            self._refused = True
            self._rounds.clear()
            self._prompt = self._absorbed = self._pool = None
            torch.cuda.empty_cache()
            reason = "no memory for it" if "out of memory" in str(error) else (str(error).splitlines() or [""])[0]
            warnings.warn(f"rounds are not captured but launched one operation at a time: {reason}", stacklevel=2)
            return None
        finally:
            session.watch = watch
        return graph, result
