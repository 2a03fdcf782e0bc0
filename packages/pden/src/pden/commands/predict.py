"""`pden predict`: label images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pden.commands import options


def run(
    run: options.Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    selection: options.Selection = "last",
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """The label and its probability for each image, one line each."""
    import torch

    from expkit.checkpoint import write_json
    from expkit.errors import UsageError
    from expkit.rundir import evidence
    from pden.data.folder import image_files, read_image
    from pden.saving import load

    record = evidence()
    files: list[Path] = []
    for path in images:
        files += image_files(path) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{images[0]} has no images")
    trained = load(run, selection, device)
    if trained.model.dense:
        raise UsageError(f"{run} is a segmentation model; predict labels whole images")
    tensors = torch.stack([read_image(path, trained.size, trained.channels) for path in files])
    labels, probabilities = trained.predict(tensors)
    rows = []
    for path, label, probability in zip(files, labels.tolist(), probabilities.tolist(), strict=True):
        rows.append({"image": str(path), "label": trained.classes[label], "probability": probability})
        typer.echo(f"{path}\t{trained.classes[label]}\t{probability:.3f}")
    if json is not None:
        write_json(json, {**record, "run": str(run), "selection": selection, "predictions": rows})
