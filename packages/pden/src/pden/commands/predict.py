"""`pden predict`: label images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pden.commands import options

_SOME = 256  # images in memory at a time


def run(
    run: options.Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders with them anywhere inside.")],
    selection: options.Selection = "last",
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """The label and its probability for each image, one line each."""
    import torch

    from expkit.checkpoint import write_json
    from expkit.cli import progress
    from expkit.errors import UsageError
    from expkit.rundir import evidence
    from pden.data.folder import image_files, read_image
    from pden.saving import load

    record = evidence()
    files: list[Path] = []
    for path in images:
        files += image_files(path, inside=True) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{images[0]} has no images")
    trained = load(run, selection, device)
    if trained.model.dense:
        raise UsageError(f"{run} is a segmentation model; predict labels whole images")
    rows = []
    with progress() as bar:
        task = bar.add_task("predicting", total=len(files), visible=len(files) > _SOME)
        for start in range(0, len(files), _SOME):
            part = files[start : start + _SOME]
            tensors = torch.stack([read_image(path, trained.shape, trained.channels) for path in part])
            labels, probabilities = trained.predict(tensors)
            for path, label, probability in zip(part, labels.tolist(), probabilities.tolist(), strict=True):
                rows.append({"image": str(path), "label": trained.classes[label], "probability": probability})
            if len(files) > _SOME:
                bar.advance(task, len(part))
    for row in rows:
        typer.echo(f"{row['image']}\t{row['label']}\t{row['probability']:.3f}")
    if json is not None:
        write_json(json, {**record, "run": str(run), "selection": selection, "predictions": rows})
