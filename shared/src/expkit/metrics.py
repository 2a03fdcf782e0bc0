"""Numbers over steps, one JSON object a line, readable while the run still goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from expkit.errors import UsageError


class MetricsWriter:
    """Append `{"step": ..., name: value, ...}` lines to a file; each line is on its way to the disk at once.

    Args:
        path: the JSON lines file; its folder is made.
        append: go on after the lines that are there (a line cut off by a kill is dropped), else start empty.
        tensorboard: also write TensorBoard events into this folder (`pip install 'expkit[tensorboard]'`).
    """

    def __init__(self, path: Path, append: bool = False, *, tensorboard: Path | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if append and self.path.exists():
            _cut_half_line(self.path)
        self._file = self.path.open("a" if append else "w", encoding="utf-8", newline="\n")
        self._board = _board(tensorboard) if tensorboard is not None else None

    def log(self, step: int, **values: float) -> None:
        """Write one line. Not-a-number and infinities become null, which `read_metrics` reads as nan."""
        line: dict[str, float | None] = {"step": int(step)}
        for name, value in values.items():
            number = int(value) if isinstance(value, int) else float(value)
            line[name] = number if math.isfinite(number) else None
            if self._board is not None:
                self._board.add_scalar(name, number, step)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; a last line cut off by a kill is left out.

    Raises:
        UsageError: the file is missing, or a line in it is not a metrics line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"metrics file {path} does not exist") from None
    *lines, _unfinished = text.split("\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def truncate(path: Path, after_step: int) -> None:
    """Drop the lines of later steps, so that a run resumed at `after_step` does not report them twice."""
    from expkit.checkpoint import write_text  # imports torch, which reading and writing metrics does not need

    if not Path(path).exists():
        return
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for number, line in enumerate(lines, 1) if _parse(line, path, number)["step"] <= after_step]
    write_text(Path(path), "".join(line + "\n" for line in kept))


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
        values["step"] = int(values["step"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} line {number} is not a metrics line: {line[:60]!r}") from None
    return {name: math.nan if value is None else value for name, value in values.items()}


def _cut_half_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("TensorBoard is not installed; pip install 'expkit[tensorboard]'") from None
    writer: Any = SummaryWriter
    return writer(str(folder))
