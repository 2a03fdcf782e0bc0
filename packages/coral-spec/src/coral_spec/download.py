"""Fetch one file over the network: with progress, whole or not at all, verified before it counts."""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from expkit.checkpoint import atomic_path
from expkit.cli import console, progress
from expkit.errors import UsageError

_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 20.0


def download(url: str, path: Path, *, verify: Callable[[Path], None], what: str, brought: Path | None = None) -> None:
    """Fetch `url` into `path`; an interrupted or wrong file leaves nothing behind.

    Args:
        url: where the file is.
        path: where it goes; its folder is made.
        verify: is given the file before it takes its name, and raises `UsageError` when it is not the right one.
        what: what the file is, for the message.
        brought: where a copy that the user brings is looked for, if not at `path`.

    Raises:
        UsageError: no network, the server refuses, or `verify` does; says where a copy can be put by hand.
    """
    console().print(f"fetching {what} from {url}", highlight=False, soft_wrap=True)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer, atomic_path(path) as aside:
            _copy(answer, aside, int(answer.headers.get("Content-Length") or 0), path.name)
            verify(aside)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(f"cannot fetch {url} ({reason}); put a copy of that file at {brought or path}") from error


def _copy(answer: BinaryIO, path: Path, total: int, name: str) -> None:
    with progress() as bar, path.open("wb") as file:
        task = bar.add_task(name, total=total or None)
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            bar.update(task, advance=len(chunk))
