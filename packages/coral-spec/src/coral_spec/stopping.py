"""Turning token ids into text as they come, and knowing when to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Decodes incrementally and holds back what may still change or be the beginning of a stop string.

    Args:
        decode: token ids to text.
        stop: strings that end the text; the text is cut before the first of them.
    """

    # Tokens re-decoded with every new one: enough for any character split over byte tokens and for merged spaces.
    _CONTEXT = 16

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [string for string in stop if string]
        self._tokens: list[int] = []
        self._prefix = 0  # first token of the window that is decoded together
        self._read = 0  # tokens whose text is settled
        self._settled = ""  # all settled text
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text handed out."""
        return self._settled[: self._shown]

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain. Sets ``stopped`` at a stop string."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._prefix : self._read])
        after = self._decode(self._tokens[self._prefix :])
        if not after.endswith("\ufffd"):
            self._settled += after[len(before) :]
            self._prefix, self._read = max(self._prefix, self._read - self._CONTEXT), len(self._tokens)
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if not self.stopped:
            before = self._decode(self._tokens[self._prefix : self._read])
            self._settled += self._decode(self._tokens[self._prefix :])[len(before) :]
            self._read = len(self._tokens)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [place for string in self._stop if (place := self._settled.find(string, self._shown)) >= 0]
        if found:
            end, self.stopped = min(found), True
        elif final:
            end = len(self._settled)
        else:
            end = len(self._settled) - self._held()
        piece, self._shown = self._settled[self._shown : end], max(end, self._shown)
        return piece

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._settled) - self._shown), longest, -1):
                if self._settled.endswith(string[:length]):
                    longest = length
                    break
        return longest
