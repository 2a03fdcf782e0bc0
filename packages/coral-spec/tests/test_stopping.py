"""Streamed text: complete, never taken back, cut before a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coral_spec.stopping import TextStream


def decode(tokens: list[int]) -> str:
    """A byte-level tokenizer."""
    return bytes(tokens).decode("utf-8", errors="replace")


def feed(text: str, stop: tuple[str, ...] = ()) -> tuple[str, TextStream]:
    stream = TextStream(decode, stop)
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped:
            return shown, stream
    return shown + stream.finish(), stream


@given(st.text(max_size=60))
def test_pieces_add_up_to_the_text(text):
    shown, stream = feed(text)
    assert shown == text == stream.text


@given(st.text("abé ", max_size=40), st.lists(st.text("abé ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    shown, _ = feed(text, tuple(stops))
    data = text.encode()
    for end in range(len(data) + 1):  # the first prefix that holds a stop string decides
        prefix = data[:end].decode("utf-8", errors="ignore")
        places = [prefix.find(stop) for stop in stops if stop in prefix]
        if places:
            assert shown == prefix[: min(places)]
            return
    assert shown == text


def test_half_a_character_is_held_back():
    stream = TextStream(decode)
    first, second = "é".encode()
    assert stream.push(first) == ""
    assert stream.push(second) == "é"


def test_the_beginning_of_a_stop_string_is_held_back():
    stream = TextStream(decode, ("END",))
    assert "".join(stream.push(byte) for byte in b"go EN") == "go "
    assert stream.push(ord("X")) == "ENX"
