"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expkit.errors import UsageError

Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Selection = Annotated[str, typer.Option(help="Which weights: last, averaged or source-validation.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Where data sets are looked for first; then EXPKIT_DATA, then the cache."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the figures to this file too.")]
Runs = Annotated[Path, typer.Option(file_okay=False, help="Folder of all runs.")]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Domain to measure on: a name, a folder, FILE.npz#x,y, or NAME=one of these. May be repeated."),
]


def parse_seeds(text: str) -> list[int]:
    """`5` as five seeds from 0, `3,7` as these.

    Raises:
        UsageError: no such list.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UsageError(f'--seeds "{text}": write a count (5) or seeds (0,1,2)')
    seeds = list(range(int(parts[0]))) if len(parts) == 1 and "," not in text else [int(part) for part in parts]
    if not seeds or len(set(seeds)) < len(seeds) or max(seeds) >= 2**31:
        raise UsageError(f'--seeds "{text}": at least one seed below 2**31, and none of them twice')
    return seeds
