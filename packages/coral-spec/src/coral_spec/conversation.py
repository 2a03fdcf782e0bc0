"""Caches that outlive one answer: a conversation, and a prompt to draw many continuations from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

import torch

from coral_spec.answer import Answer, Generation, Limits, Request
from coral_spec.engine import Session
from coral_spec.sampling import Sampling
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.model import Model


class Conversation:
    """A dialogue that runs only what is new of it through the target.

    Attributes:
        messages: all turns so far, as ``{"role", "content"}``.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        self.model = model
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._session: Session | None = None

    def stream(self, text: str, **limits: Unpack[Limits]) -> Turn:
        """The user says ``text``; iterate the answer's pieces. UsageError as :meth:`Model.generate`."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.encode(messages)
        request = Request(**limits)
        if self._session is None:
            self._session = self.model.session(min(len(ids) + request.max_new_tokens, self.model.context_length))
        elif not self._session.busy:
            self.model.adapt(self._session)  # a better tree, if there is one by now
        return Turn(self, messages, Answer(self.model, ids, request, self._session, lambda: self._shared(ids)))

    def send(self, text: str, **limits: Unpack[Limits]) -> Generation:
        """The user says ``text``; returns the whole answer."""
        turn = self.stream(text, **limits)
        for _ in turn:
            pass
        return turn.result()

    def _shared(self, ids: list[int]) -> int:
        """Positions of the cache that hold the beginning of ``ids``; the last of them is run again.

        Its feature is needed with the token that now follows it, and there must be one token to run.
        """
        session = self._session
        assert session is not None
        cached = session.history[0, : int(session.lengths[0])].tolist()
        same = 0
        while same < min(len(cached), len(ids)) and cached[same] == ids[same]:
            same += 1
        return max(0, same - 1)


class Turn:
    """One answer in a conversation, noted there as soon as it has ended."""

    def __init__(self, conversation: Conversation, messages: list[dict[str, str]], answer: Answer) -> None:
        self._conversation, self._messages, self._answer = conversation, messages, answer

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._answer
        finally:  # an iteration that is given up must not keep the next turn from beginning
            self._answer.close()
        answer = {"role": "assistant", "content": self._answer.result().text}
        self._conversation.messages = [*self._messages, answer]

    def result(self) -> Generation:
        """The answer, once the iteration is complete."""
        return self._answer.result()


class Prefix:
    """A prompt that was run once.

    Attributes:
        logits: the target's logits after the prompt, ``(1, vocab)``.
    """

    def __init__(self, model: Model, ids: list[int], capacity: int) -> None:
        self._model = model
        self._session = model.session(len(ids) + capacity)
        self._session.watch = self._session.watch.silent()  # nobody reads how long it takes
        self._length = len(ids)
        with torch.inference_mode():
            self.logits, self._features = self._session.prefill(ids)

    @torch.inference_mode()
    def generate(self, seeds: Sequence[int], *, max_new_tokens: int, sampling: Sampling) -> list[list[int]]:
        """One continuation per seed, drawn together as rows of one batch.

        Returns:
            ``max_new_tokens`` ids for each seed; the end-of-text token does not end a row.

        Raises:
            UsageError: prompt and new tokens exceed the context.
        """
        if self._length + max_new_tokens > self._model.context_length:
            raise UsageError(
                f"{self._length} prompt tokens and {max_new_tokens} new ones exceed the context of "
                f"{self._model.context_length}"
            )
        if self._session.graphs is not None:  # captured rounds hold one row
            return [self._draw([seed], max_new_tokens, sampling)[0] for seed in seeds]
        return self._draw(seeds, max_new_tokens, sampling)

    def _draw(self, seeds: Sequence[int], max_new_tokens: int, sampling: Sampling) -> list[list[int]]:
        session = self._session
        session.rewind(self._length)
        if session.graphs is None:
            session.repeat(len(seeds))
        keys = torch.tensor(list(seeds), device=session.device)
        rows = [[token] for token in session.begin(self.logits, self._features, 0, sampling, keys)]
        while min(len(row) for row in rows) < max_new_tokens:
            if session.filled + 1 > session.room:
                session.reserve(2 * session.room)
            for row, new in zip(rows, session.round(sampling, keys).tokens, strict=True):
                row.extend(new)
        return [row[:max_new_tokens] for row in rows]
