"""`train-adv attack`: adversarial images, and a picture of what was changed."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path
from typing import Annotated

import typer

from train_adv.commands import options


def run(
    model: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files or folders; else test images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the adversarial images and of grid.png.")] = Path("adversarial"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of PGD.")] = 50,
    loss: Annotated[str, typer.Option(help="What is climbed: ce, cw or dlr.")] = "ce",
    target: Annotated[str | None, typer.Option(help="A class to be reached, instead of any other one.")] = None,
    number: Annotated[int, typer.Option("--count", min=1, help="How many test images, where none are given.")] = 8,
    corrupt: options.Corrupt = "refuse",
    data: options.Data = None,
    data_dir: options.DataDir = None,
    epsilon: options.Epsilon = None,
    norm: options.Norm = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = None,
) -> None:
    """Attack images with PGD. Files keep to the pixels' 256 levels, and verdicts are on the files as written.

    Without labels, images of your own count as what the model says of them unattacked.
    """
    import torch

    from expkit.checkpoint import write_json
    from expkit.device import resolve_device
    from expkit.errors import UsageError
    from expkit.rundir import evidence
    from train_adv.attacks.losses import make_loss, targeted_cross_entropy
    from train_adv.attacks.norms import check_images, make_norm
    from train_adv.attacks.pgd import PGD
    from train_adv.data.batches import to_float
    from train_adv.images import find_images, grid, read_images, write_image
    from train_adv.models.checkpoint import load_model

    options.check_outputs([json], [out])
    policy = options.corrupt_policy(corrupt)
    record = evidence(seed)
    where = resolve_device(device)
    classifier = load_model(model, where)
    names = classifier.spec.class_names
    radius, kind = options.attack_of(epsilon, norm, model)
    if images:
        paths, pixels = read_images(find_images(images), classifier, policy)
        with torch.no_grad():
            labels = classifier(pixels.to(where)).argmax(1)
    else:
        split = options.data_of(data, data_dir, model).test
        chosen = torch.arange(min(number, len(split)))
        pixels, labels = to_float(split.read(chosen)), split.labels[chosen].to(where)
        paths = [Path(f"test-{index:05d}.png") for index in chosen.tolist()]
    if target is not None and target not in names:
        raise UsageError(f"target {target!r} is no class of the model; it knows {', '.join(names)}")
    files = [out / f"{name}.png" for name in _distinct(paths)]
    taken = {path.resolve() for path in paths} & {path.resolve() for path in (*files, out / "grid.png")}
    if taken:
        raise UsageError(f"{min(taken)} would be overwritten; give another folder with --out")
    pixels = pixels.to(where)
    check_images(pixels)
    with torch.no_grad():
        before = classifier(pixels).argmax(1)
    goal = torch.full_like(labels, names.index(target)) if target is not None else None
    climbed = targeted_cross_entropy(goal) if goal is not None else make_loss(loss)
    attack = PGD(radius, 2.5 * radius / steps, steps, make_norm(kind))
    generator = torch.Generator(where).manual_seed(seed)
    found = attack(classifier, pixels, labels, climbed, generator=generator, targets=goal)
    written = torch.stack(
        [write_image(file, image, natural) for file, image, natural in zip(files, found, pixels, strict=True)]
    )
    with torch.no_grad():
        after = classifier(written.to(where)).argmax(1)
    own, first, now = ([names[index] for index in each.tolist()] for each in (labels, before, after))
    show = min(len(written), 10)
    title = f"{model.resolve().name}, {kind} {radius:.4g}, PGD-{steps} (red: not the label)"
    grid(out / "grid.png", pixels[:show].cpu(), written[:show], own, first, now, title)
    if goal is not None:
        broken, already, what = (after == goal) & (before != goal), int((before == goal).sum()), f"called {target}"
    else:
        broken, already, what = (after != labels) & (before == labels), int((before != labels).sum()), "misclassified"
    typer.echo(
        f"{out}: of {len(broken)} images {int(broken.sum())} are {what} by the attack, {already} were before it; "
        f"grid.png shows the first {show}"
    )
    if json is not None:
        rows = [
            dict(zip(("image", "file", "label", "natural", "adversarial", "broken"), each, strict=True))
            for each in zip(map(str, paths), map(str, files), own, first, now, broken.tolist(), strict=True)
        ]
        about = {"epsilon": radius, "norm": kind, "steps": steps, "loss": loss, "target": target}
        write_json(json, {"rows": rows, "settings": about, **record})


def _distinct(paths: list[Path]) -> list[str]:
    """Names without suffix that differ from each other, and from the picture's."""
    used = {"grid"}
    found = []
    for path in paths:
        names = chain([path.stem], (f"{path.stem}-{place}" for place in count(2)))
        name = next(each for each in names if each.lower() not in used)  # some file systems know no case
        used.add(name.lower())
        found.append(name)
    return found
