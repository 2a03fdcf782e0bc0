"""What a generation did: tokens, rounds, acceptance and where the time went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

PARTS = ("target", "drafter", "head", "rest")


@dataclass(frozen=True)
class Statistics:
    """Figures of one generation.

    Attributes:
        prompt_tokens: length of the prompt.
        new_tokens: tokens returned.
        seconds: wall time, prefill included.
        prefill_seconds: until the first token.
        capture_seconds: what the first answer of a session takes longer on a GPU, since trees are captured that later
            ones may need; in ``time_split`` it belongs to the rest.
        accept_lengths: draft tokens accepted in each round; a round is one target forward after prefill.
        depth: levels of the draft tree.
        tree: its shape, as ``--tree`` takes it; None without one.
        time_split: seconds in ``target``, ``drafter``, ``head`` (of the drafter) and ``rest``. Where rounds are
            captured as CUDA graphs, one of every 32 is timed part by part, and what was timed so far, in earlier
            answers of the same caches too, stands for all; before any was, rounds are one part, ``rounds``.
        cache_bytes: bytes held by the key-value caches.
        memory_bytes: most bytes held so far by the process: those that torch allocated on a GPU, or resident ones.
        rows_per_round: head rows that the drafter read in a round, all levels together, other weights of a head (a
            router's) counted as rows; 0 without a drafter.
        router_recall: with a routed head, the share of the tokens that the target drew, at nodes whose children were
            drafted, that were among the rows read there; None otherwise.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    prefill_seconds: float
    accept_lengths: list[int]
    depth: int
    time_split: dict[str, float]
    tree: str | None = None
    cache_bytes: int = 0
    memory_bytes: int = 0
    capture_seconds: float = 0.0
    rows_per_round: int = 0
    router_recall: float | None = None

    @property
    def rounds(self) -> int:
        """Target forwards after prefill."""
        return len(self.accept_lengths)

    @property
    def tau(self) -> float | None:
        """Mean tokens per round, before truncation at a stop or the limit; None without a round."""
        if not self.accept_lengths:
            return None
        return 1.0 + sum(self.accept_lengths) / len(self.accept_lengths)

    @property
    def depth_acceptance(self) -> list[float]:
        """At each level, the accepted share of the rounds that had reached it; stops at the first never reached."""
        return depth_acceptance(self.accept_lengths, self.depth)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def telemetry(self) -> dict[str, float]:
        """`rows_per_round` and `router_recall`, where there are such things."""
        figures = {"rows_per_round": self.rows_per_round or None, "router_recall": self.router_recall}
        return {name: float(value) for name, value in figures.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """All figures, derived ones included, as JSON holds them."""
        derived = {name: getattr(self, name) for name in ("rounds", "tau", "depth_acceptance", "tokens_per_second")}
        return {**asdict(self), **derived}


def depth_acceptance(accept_lengths: Sequence[int], depth: int) -> list[float]:
    """Conditional acceptance rate per tree level over many rounds."""
    rates = []
    for level in range(1, depth + 1):
        reached = sum(length >= level - 1 for length in accept_lengths)
        if not reached:
            break
        rates.append(sum(length >= level for length in accept_lengths) / reached)
    return rates


@dataclass
class Stopwatch:
    """Attributes elapsed time to parts without making the host wait for the device.

    ``lap(part)`` says that everything since the last lap belongs to ``part``.
    """

    device: torch.device
    running: bool = True
    captured: bool = False
    _events: list[tuple[str, Any]] = field(default_factory=list)

    def silent(self) -> Stopwatch:
        """One that notes nothing: events can't be recorded while a graph is captured."""
        return Stopwatch(self.device, running=False)

    def for_graph(self) -> Stopwatch:
        """One whose laps become part of a graph that is being captured; its split is that of the last replay."""
        return Stopwatch(self.device, captured=True)

    def lap(self, part: str) -> None:
        """End a span."""
        if not self.running:
            return
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True, external=self.captured)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            self._events.append((part, event))
        else:
            self._events.append((part, time.perf_counter()))

    def split(self, shares: Mapping[str, float] | None = None) -> dict[str, float]:
        """Seconds per part so far; on CUDA this waits for the last lap, or a graph must be done.

        Args:
            shares: of the parts in the time of ``rounds``, which then is no part of its own.
        """
        seconds = dict.fromkeys(PARTS, 0.0)
        if self.device.type == "cuda" and self._events and not self.captured:
            self._events[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._events, self._events[1:], strict=False):
            span = before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
            seconds[part] = seconds.get(part, 0.0) + span
        if shares:
            rounds = seconds.pop("rounds", 0.0)
            seconds = {part: spent + rounds * shares.get(part, 0.0) for part, spent in seconds.items()}
        return seconds
