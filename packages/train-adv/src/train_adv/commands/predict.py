"""`train-adv predict`: what a checkpoint sees in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from train_adv.commands import options


def run(
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of images.")],
    model: Annotated[Path, typer.Option(help="A run's folder or a checkpoint.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 3,
    corrupt: options.Corrupt = "refuse",
    device: options.Device = "auto",
    json: options.Json = None,
) -> None:
    """Classes and probabilities of each image, scaled to the size that the model was trained on."""
    import torch

    from expkit.checkpoint import write_json
    from expkit.device import resolve_device
    from expkit.rundir import evidence
    from train_adv.images import find_images, read_images
    from train_adv.models.checkpoint import load_model

    policy = options.corrupt_policy(corrupt)
    options.check_outputs([json])
    record = evidence()
    where = resolve_device(device)
    classifier = load_model(model, where)
    names = classifier.spec.class_names
    paths, pixels = read_images(find_images(images), classifier, policy)
    with torch.no_grad():
        parts = [classifier(part.to(where)).float().softmax(1).cpu() for part in torch.split(pixels, 256)]
    found = torch.cat(parts).topk(min(top, len(names)), dim=1)
    rows = []
    for path, values, indices in zip(paths, found.values.tolist(), found.indices.tolist(), strict=True):
        classes = [{"class": names[index], "probability": value} for index, value in zip(indices, values, strict=True)]
        rows.append({"image": str(path), "classes": classes})
        typer.echo(f"{path}: " + ", ".join(f"{each['class']} {each['probability']:.1%}" for each in classes))
    if json is not None:
        write_json(json, {"rows": rows, "model": str(model), **record})
