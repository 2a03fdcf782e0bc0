"""One answer on its way: rounds become tokens, text and a finish reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from coral_spec.engine import Session
from coral_spec.sampling import Sampling
from coral_spec.statistics import Statistics, Stopwatch
from coral_spec.stopping import TextStream
from expkit.device import peak_memory
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.model import Model


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
        text: without special tokens, cut before a stop string.
        token_ids: new ids, the end-of-text id included when it ended the answer.
        prompt_length: tokens of the prompt.
        finish_reason: ``stop`` (end of text or stop string), ``length``, or ``interrupted``.
        statistics: what it took.
        logits: with ``record_logits``, what every id was drawn from, fp32 on the CPU ``(new_tokens, vocab)``.
    """

    text: str
    token_ids: list[int]
    prompt_length: int
    finish_reason: str
    statistics: Statistics
    logits: Tensor | None = None


class Limits(TypedDict, total=False):
    """Keyword arguments that become a :class:`Request`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | Sequence[str] | None
    ignore_eos: bool
    should_stop: Callable[[], bool] | None
    record_logits: bool


@dataclass(frozen=True)
class Request:
    """Limits and stop conditions of one answer.

    Attributes:
        max_new_tokens: limit; the context length is another.
        temperature, top_k, top_p: see :class:`coral_spec.sampling.Sampling`; temperature 0 is greedy.
        seed: of the noise; the same seed gives plain decoding's text, up to ties.
        stop: strings that end the answer, which is cut before them.
        ignore_eos: go on past the end-of-text token.
        should_stop: asked once a round; True ends the answer with finish reason ``interrupted``.
        record_logits: keep what every token was drawn from (for checks; slow).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] | None = ()
    ignore_eos: bool = False
    should_stop: Callable[[], bool] | None = None
    record_logits: bool = False

    def __post_init__(self) -> None:
        whole, any_number = ("max_new_tokens", "seed", "top_k"), ("top_p", "temperature")
        for names, kind, what in ((whole, Integral, "whole number"), (any_number, Real, "number")):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise UsageError(f"{name} is {getattr(self, name)!r}, needed a {what}")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}, needed at least 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}, needed 0 or more, and less than 2**63")
        _ = self.sampling  # its own checks

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p)


class Answer:
    """Iterate it for pieces of text as they become certain; then ask for :meth:`result`.

    Args:
        model: target, draft and context length.
        ids: the prompt.
        request: limits and stop conditions.
        session: caches to go on with.
        keep: asked when the answer begins: how many of the session's first positions hold this very prompt.
    """

    def __init__(
        self,
        model: Model,
        ids: list[int],
        request: Request,
        session: Session | None = None,
        keep: Callable[[], int] = lambda: 0,
    ) -> None:
        self._model, self._ids, self._request = model, ids, request
        self._limit = min(request.max_new_tokens, model.context_length - len(ids))
        self._session, self._keep = session, keep
        tokenizer = model.target.tokenizer
        self._stream = TextStream(
            lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
            (request.stop,) if isinstance(request.stop, str) else request.stop or (),
        )
        self._eos = frozenset() if request.ignore_eos else frozenset(model.target.eos_token_ids)
        self._tokens: list[int] = []
        self._accepted: list[int] = []
        self._logits: list[Tensor] = []
        self._reason: str | None = None
        self._pieces = self._run()
        self._seconds = self._prefill_seconds = self._capture_seconds = 0.0
        self._watch: Stopwatch | None = None
        self._shares: dict[str, float] = {}
        self._figures: dict[str, float] = {}
        self._facts: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[str]:
        return (piece for piece in self._pieces if piece)

    def close(self) -> None:
        """Give the answer up: its caches are free for the next one."""
        self._pieces.close()

    @torch.inference_mode()
    def _run(self) -> Generator[str, None, None]:
        started = time.perf_counter()
        capacity = len(self._ids) + self._limit
        own = self._session is None
        session = self._session = self._session or self._model.session(capacity)
        if session.busy:
            raise UsageError("the answer before this one is not finished: a conversation gives one at a time")
        session.busy = True
        try:
            session.reserve(capacity)
            session.draft.take_figures()  # an earlier answer's
            yield from self._decode(session, started)
        finally:  # also when the iteration is given up
            session.settle()
            self._shares = session.shares()
            session.busy = False
            self._figures = session.draft.take_figures()
            self._facts = _facts(session)  # before it serves others
            self._seconds = time.perf_counter() - started
            if own:
                self._model.release(session)
        self._model.note(session, self._accepted)
        rest = self._stream.finish()
        self._seconds = time.perf_counter() - started
        yield rest

    def _decode(self, session: Session, started: float) -> Iterator[str]:
        request, sampling = self._request, self._request.sampling
        keep = self._keep()
        self._watch = session.watch = Stopwatch(session.device)
        logits, features = session.prefill(self._ids, keep)
        seeds = torch.tensor([request.seed], device=session.device)
        first = session.begin(logits, features, keep, sampling, seeds)
        self._prefill_seconds = time.perf_counter() - started
        if request.record_logits:
            self._logits.append(logits.to(torch.float32, copy=True))
        yield self._take(first)
        if self._reason is None and not request.record_logits:
            begun = time.perf_counter()
            self._model.prepare(session, sampling)
            self._capture_seconds = time.perf_counter() - begun
            session.watch.lap("rest")
        ahead = 0  # rounds that were begun and not yet read
        while self._reason is None:
            if request.should_stop and request.should_stop():
                self._reason = "interrupted"
                break
            # A stop may be seen one round late, whose tokens are dropped; the limit is known to come.
            while ahead < (1 if request.record_logits else session.ahead):
                if ahead and len(self._tokens) + ahead >= self._limit:
                    break
                session.launch(sampling, seeds, request.record_logits)
                ahead += 1
            self._model.learn(session, sampling, request.record_logits)
            outcome = session.collect()
            ahead -= 1
            tokens = outcome.tokens[0]
            self._accepted.append(len(tokens) - 1)
            if outcome.logits is not None:
                kept = outcome.logits[0, : len(tokens)]  # the next round writes over it
                self._logits.append(kept.to(torch.float32, copy=True))
            yield self._take(tokens)

    def _take(self, tokens: list[int]) -> str:
        pieces = []
        for token in tokens:
            self._tokens.append(token)
            if token in self._eos:
                self._reason = "stop"
                break
            pieces.append(self._stream.push(token))
            if self._stream.stopped:
                self._reason = "stop"
                break
            if len(self._tokens) >= self._limit:
                self._reason = "length"
                break
        return "".join(pieces)

    def result(self) -> Generation:
        """The answer so far; complete once the iteration is."""
        session = self._session
        if session is None:
            raise UsageError("the answer has not begun: iterate it before asking for its result")
        statistics = Statistics(
            prompt_tokens=len(self._ids),
            new_tokens=len(self._tokens),
            seconds=self._seconds,
            prefill_seconds=self._prefill_seconds,
            capture_seconds=self._capture_seconds,
            accept_lengths=self._accepted,
            time_split=self._watch.split(self._shares) if self._watch else {},
            **(self._facts or _facts(session)),
            memory_bytes=peak_memory(session.device),
            rows_per_round=int(self._figures.get("rows_per_round", 0)),
            router_recall=self._figures.get("router_recall"),
        )
        logits = torch.cat(self._logits)[: len(self._tokens)].cpu() if self._logits else None
        return Generation(
            self._stream.text, self._tokens, len(self._ids), self._reason or "interrupted", statistics, logits
        )


def _facts(session: Session) -> dict[str, Any]:
    """What an answer's statistics take from its session as it is."""
    shape = session.draft.shape
    return {
        "depth": session.draft.depth,
        "tree": None if shape is None else str(shape),
        "cache_bytes": session.nbytes(),
    }
