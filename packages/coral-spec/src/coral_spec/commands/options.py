"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from coral_spec.answer import Generation
    from coral_spec.tree import TreeShape

Model = Annotated[str, typer.Option(help="Alias (see `coral-spec models`), hub id, folder or GGUF file.")]
Draft = Annotated[
    str, typer.Option(help="auto (the bundled drafter, else ngram), none, ngram, or the folder of a drafter.")
]
Tree = Annotated[
    str,
    typer.Option(
        help="auto (what should be fastest here; n-grams have a fixed one), or DEPTH,WIDTH,BUDGET of the draft tree: "
        "6,10,60."
    ),
]
Head = Annotated[
    str,
    typer.Option(
        help="Head rows that the drafter proposes from: auto, full, frequency, a number, "
        "routed[:GROUPS[,hierarchical or renormalised]] or low-rank[:RANK]."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample among the most probable tokens of this mass; 1 is off.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same text, with or without drafting.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")]


def parse_tree(text: str) -> TreeShape | None:
    """The shape that the user asked for; None is ``auto``."""
    from coral_spec.tree import TreeShape

    return None if text == "auto" else TreeShape.parse(text)


def parse_head(text: str) -> str | int:
    """A number of rows, or a word for :func:`coral_spec.load` to judge."""
    return int(text) if text.isdecimal() else text


def require_file_name(option: str, path: Path | None, ending: str) -> None:
    """UsageError for a file that could not be written, before anything is done.

    Args:
        option: without its dashes.
        ending: of the file's name.
    """
    from expkit.errors import UsageError

    if path is not None and path.suffix.lower() != ending:
        raise UsageError(f"--{option} is {path}, needed a file name that ends in {ending}")
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"--{option} is {path}, but there is no folder {path.parent}")
    if path is not None and path.is_dir():
        raise UsageError(f"--{option} is {path}, which is a folder")
    if path is not None:
        try:
            with TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise UsageError(f"--{option} is {path}, which cannot be written ({error.strerror or error})") from None


@contextmanager
def interruptible() -> Iterator[Any]:
    """While open, Ctrl-C asks the running answer to end (yielded: the question); a second one stops at once."""
    pressed: list[int] = []

    def note(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def summary(answer: Generation) -> str:
    """Tokens, speed and tau in one line."""
    statistics = answer.statistics
    parts = [f"{statistics.new_tokens} tokens", f"{statistics.tokens_per_second:.1f} tokens/s"]
    if statistics.depth and statistics.tau is not None:
        parts.append(f"tau {statistics.tau:.2f}")
    if answer.finish_reason == "interrupted":
        parts.append("interrupted")
    return ", ".join(parts)
