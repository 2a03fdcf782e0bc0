"""`pden compare`: methods x targets, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pden.commands import options


def run(
    results: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or their JSON files.")],
    selection: Annotated[str, typer.Option(help="last, averaged, source-validation or oracle.")] = "last",
    out: Annotated[
        list[Path] | None, typer.Option(dir_okay=False, help="Write the table: .md, .csv or .tex. May be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Write a bar chart (PNG).")] = None,
    json: options.Json = None,
) -> None:
    """A table of runs: those that differ in their seed alone become one row with mean and spread."""
    from expkit.checkpoint import write_json, write_text
    from expkit.rundir import evidence
    from pden.evaluation import table
    from pden.evaluation.chart import save_bars

    record = evidence()
    found = [table.read_result(path) for path in results]
    groups = table.group(found)
    rows = table.summarise(groups, selection)
    seeds = {label: sorted(each["seed"] for each in runs) for label, runs in groups.items()}
    notes = []
    if len({frozenset(row) for row in rows.values()}) > 1:
        for row in rows.values():
            row.pop(table.AVERAGE, None)
        notes.append("the runs have other targets, so that their averages compare nothing and are left out")
    sources = {label: str(runs[0].get("source")) for label, runs in groups.items()}
    if len(set(sources.values())) > 1:
        where = ", ".join(f"{label} on {each}" for label, each in sources.items())
        notes.append(f"trained on other sources: {where}")
    notes += dict.fromkeys(note for each in found for note in each.get("notes", []))
    lines = [f"note: {note}" for note in notes]
    texts = {path: table.render(rows, path, selection, seeds, lines) for path in out or []}
    typer.echo("\n".join([table.markdown(rows), table.about(rows, selection, seeds), *lines]))
    for path, text in texts.items():
        write_text(path, text)
    if plot is not None:
        save_bars(rows, plot, title=f"selection: {selection}")
    if json is not None:
        methods = {
            label: {
                "seeds": seeds[label],
                "targets": {name: {"mean": mean, "std": std} for name, (mean, std) in row.items()},
            }
            for label, row in rows.items()
        }
        write_json(json, {**record, "selection": selection, "methods": methods, "notes": notes})
