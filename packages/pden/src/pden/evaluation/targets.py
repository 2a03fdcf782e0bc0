"""The domains a run is measured on: loaded once, with the classes of the source, and never shown to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from expkit.errors import UsageError
from pden.data import Domain, Home, load_domain, parse_target
from pden.data.cifar import expand_levels


def load_targets(
    specs: Sequence[str],
    seen: Sequence[str],
    classes: tuple[str, ...],
    home: Home,
    size: int,
    channels: int,
    *,
    dense: bool = False,
) -> list[Domain]:
    """Targets with the labels of `classes`; CIFAR-10-C levels become one domain per corruption.

    Args:
        seen: what training or selection sees: the source first, then (where it is named) the validation domain.
        dense: whether the source has one label for each pixel.

    Raises:
        UsageError: one of these is among them, two have one name, or one has classes or labels that the source lacks.
    """
    found: list[Domain] = []
    for text in (each for spec in specs for each in expand_levels(spec)):
        name, spec = parse_target(text)
        for each, use in zip(seen, ("source", "validation domain"), strict=False):
            if place(spec) == place(each):
                unseen = "a target must be a domain that neither training nor selection has seen"
                raise UsageError(f'target "{name}" is the {use}; {unseen}')
        loaded = load_domain(text, home, size=size, channels=channels)
        if loaded.dense != dense:
            kinds = ("image", "pixel") if dense else ("pixel", "image")
            raise UsageError(
                f'target "{name}" has one label for each {kinds[0]}; the source has one for each {kinds[1]}'
            )
        domain = with_classes(loaded, classes)
        if any(each.name == domain.name for each in found):
            raise UsageError(f'two targets are called "{domain.name}"; write NAME=SPEC to tell them apart')
        found.append(domain)
    return found


def with_classes(domain: Domain, classes: tuple[str, ...]) -> Domain:
    """The domain with labels numbered as in `classes`, by class name.

    Raises:
        UsageError: it has a class that is not among them.
    """
    if domain.classes == classes:
        return domain
    unknown = [domain.classes[label] for label in domain.present if domain.classes[label] not in classes]
    if unknown:
        raise UsageError(f'{domain.name} has class "{unknown[0]}", which the source has not ({", ".join(classes)})')
    numbers = [classes.index(name) if name in classes else 255 for name in domain.classes]
    table = torch.tensor([*numbers, *[255] * (256 - len(numbers))])
    return replace(domain, labels=table[domain.labels], classes=classes)


def shared_notes(targets: Sequence[Domain], seen: Sequence[Domain]) -> list[str]:
    """A sentence for each target that shares images with what training or selection sees.

    Raises:
        UsageError: all images of one are among them.
    """
    known = {image.tobytes() for each in seen for image in each.images.cpu().numpy()} if targets else set()
    counts = [sum(image.tobytes() in known for image in each.images.cpu().numpy()) for each in targets]
    for each, count in zip(targets, counts, strict=True):
        if count == len(each):
            raise UsageError(f"all {count} images of {each.name} are among those that are trained or held out")
    return [
        f"{count} of {len(each)} images of {each.name} are among those that are trained or held out"
        for each, count in zip(targets, counts, strict=True)
        if count
    ]


def absent_note(domain: Domain) -> str:
    """A sentence on the classes that do not occur in a domain, or nothing."""
    missing = [name for number, name in enumerate(domain.classes) if number not in domain.present]
    return f"{domain.name} has no image of {', '.join(missing)}: scored on the other classes" if missing else ""


def place(text: str) -> str:
    """What a domain's specification names, the same for two ways of writing it."""
    spec = parse_target(text)[1]
    path, separator, keys = spec.partition("#")
    return f"{Path(path).resolve()}{separator}{keys}" if separator or Path(path).exists() else spec
