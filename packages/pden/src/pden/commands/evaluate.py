"""`pden eval`: measure trained models on domains."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pden.commands import options


def run(
    run: options.Run,
    target: options.Target = None,
    selection: Annotated[str, typer.Option(help="last, averaged, source-validation, or all of them.")] = "last",
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """Accuracy (mIoU for segmentation) of a run's model on target domains."""
    from expkit.checkpoint import write_json
    from expkit.cli import console, progress
    from expkit.errors import UsageError
    from expkit.rundir import evidence
    from pden.data import Home
    from pden.evaluation.accuracy import evaluate
    from pden.evaluation.targets import absent_note, load_targets
    from pden.saving import load, saved_selections

    if not target:
        raise UsageError("name at least one domain with --target")
    record = evidence()
    names = saved_selections(run) if selection == "all" else [selection]
    first = load(run, names[0], device)
    home = Home.of(data_dir)
    seen = [each for each in (first.source, first.validation) if each]
    dense = first.model.dense
    domains = load_targets(target, seen, first.classes, home, first.size, first.channels, dense=dense)
    notes = [note for domain in domains for note in (domain.note, absent_note(domain)) if note]
    for note in notes:
        console().print(f"note: {note}", highlight=False)
    found: dict[str, Any] = {}
    with progress() as bar:
        task = bar.add_task("measuring", total=len(names) * len(domains))
        for name in names:
            model = load(run, name, device).model
            scores = []
            for domain in domains:
                scores.append(evaluate(model, domain))
                bar.advance(task)
            average = sum(each.value for each in scores) / len(scores)
            found[name] = {"targets": {each.domain: each.plain() for each in scores}, "average": average}
    for name, row in found.items():
        for target_name, score in row["targets"].items():
            value = score["accuracy"] if score["miou"] is None else score["miou"]
            typer.echo(f"{name}  {target_name}  {100 * value:.2f} %  ({score['images']} images)")
        typer.echo(f"{name}  average  {100 * row['average']:.2f} %")
    if json is not None:
        write_json(json, {**record, "run": str(run), "selections": found, "notes": notes})
