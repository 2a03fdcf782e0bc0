"""``coral-spec models``: the models that can be had by a short name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral_spec.commands import options
from expkit.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from coral_spec.targets.aliases import Alias


def run(
    json: Annotated[Path | None, typer.Option(help="Write the same facts as JSON to this file.")] = None,
    fetch: Annotated[str | None, typer.Option(help="Fetch this alias's drafter from a release.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the release's files are.")] = None,
) -> None:
    """List the aliases: what they are, where they come from, and whether they are here already."""
    from rich.console import Console

    from coral_spec.bundled import RELEASED, fetch_drafter
    from coral_spec.targets.aliases import ALIASES
    from coral_spec.targets.home import home_folder

    options.require_file_name("json", json, ".json")
    if fetch is not None:
        folder = fetch_drafter(fetch, url)
        said = f"{fetch}: drafter in {folder}, terms: {RELEASED[fetch].license}"
        Console().print(said, soft_wrap=True, highlight=False)
    elif url is not None:
        raise UsageError("--url says where --fetch is to look; give both")
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
    from coral_spec.bundled import RELEASED, folders

    return {
        "alias": alias.name,
        "description": alias.description,
        "packages": [part.requirement for part in alias.parts],
        "file": alias.file,
        "bytes": alias.bytes,
        "sha256": alias.sha256,
        "license": alias.license,
        "cached": alias.cached,
        "drafter": alias.name in {folder.name for folder in folders()},
        "released_drafter": RELEASED[alias.name].license if alias.name in RELEASED else None,
    }


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
            "trained" if row["drafter"] else "--fetch" if row["released_drafter"] else "ngram",
        )
    return table
