"""``coral-spec models``: the models that can be had by a short name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from coral_spec.targets.aliases import Alias


def run(
    json: Annotated[Path | None, typer.Option(help="Write the same facts as JSON to this file.")] = None,
) -> None:
    """List the aliases: what they are, where they come from, and whether they are here already."""
    from rich.console import Console

    from coral_spec.targets.aliases import ALIASES
    from coral_spec.targets.home import home_folder

    rows = [describe(alias) for alias in ALIASES.values()]
    console = Console()
    console.print(_table(rows))
    console.print(f"Cache: {home_folder()}", soft_wrap=True, highlight=False)
    console.print("Any other causal language model works by hub id, by folder, or as a .gguf file.", soft_wrap=True)
    if json is not None:
        from expkit.checkpoint import write_json
        from expkit.rundir import evidence

        write_json(json, {**evidence(), "cache": str(home_folder()), "models": rows})


def describe(alias: Alias) -> dict[str, Any]:
    """The facts about one alias; sizes in bytes."""
    return {
        "alias": alias.name,
        "description": alias.description,
        "packages": [part.requirement for part in alias.parts],
        "file": alias.file,
        "bytes": alias.bytes,
        "sha256": alias.sha256,
        "license": alias.license,
        "cached": alias.cached,
        "drafter": has_bundled_drafter(alias.name),
    }


def has_bundled_drafter(alias: str) -> bool:
    """Whether this installation carries a trained drafter for `alias`."""
    from importlib.resources import files

    return files("coral_spec").joinpath("drafters", alias, "drafter.safetensors").is_file()


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(show_lines=True)
    for heading in ("alias", "what", "MB", "cached", "drafter"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", no_wrap=heading != "what")
    for row in rows:
        packages: list[str] = row["packages"]
        more = f" (and {len(packages) - 1} more)" if len(packages) > 1 else ""
        table.add_row(
            row["alias"],
            f"{row['description']}\n{packages[0]}{more}\n{row['license']}",
            f"{row['bytes'] / 1e6:.0f}",
            "yes" if row["cached"] else "no",
            "trained" if row["drafter"] else "ngram",
        )
    return table
