"""`train-adv topology`: what is left of a standard model's neighbourhoods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train_adv.commands import options


def run(
    checkpoints: Annotated[list[Path], typer.Argument(help="Runs' folders or checkpoints to be measured.")],
    reference: Annotated[Path | None, typer.Option(help="The standard model; else that of the first run.")] = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many test images; 0 is all.")] = 2000,
    plots: Annotated[Path | None, typer.Option(help="Folder for metrics.png, tsne.png and confusion.png.")] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """kNN overlap, trustworthiness, continuity, CKA, Spearman and L_topo of each against the standard model."""
    from expkit.checkpoint import write_json
    from expkit.device import resolve_device
    from expkit.rundir import evidence
    from train_adv.topology import report

    options.check_outputs([json], [plots])
    record = evidence(seed)
    images = options.data_of(data, data_dir, checkpoints[0])
    standard = reference if reference is not None else reference_of(checkpoints[0])
    found, labels = report.measure_checkpoints(
        checkpoints, standard, images, limit=limit, device=resolve_device(device)
    )
    typer.echo(report.table(found))
    if plots is not None:
        from train_adv.topology import plots as pictures

        pictures.plot_metrics(found, plots / "metrics.png")
        pictures.plot_tsne(found, labels, images.class_names, plots / "tsne.png", seed=seed)
        pictures.plot_confusion(found, labels, images.class_names, plots / "confusion.png")
        typer.echo(f"pictures: {plots}")
    if json is not None:
        about = {"data": images.name, "images": len(labels), "reference": str(standard)}
        write_json(json, {"rows": report.rows(found, labels, len(images.class_names)), "settings": about, **record})


def reference_of(checkpoint: Path) -> Path:
    """The standard model of a run; UsageError where it has none."""
    from expkit.errors import UsageError

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    config = options.run_config(checkpoint)
    if config is not None and config.topology.path is not None:
        return config.topology.path
    if (folder / "reference").is_dir():
        return folder / "reference"
    raise UsageError(f"{checkpoint} has no standard model of its own; give --reference")
