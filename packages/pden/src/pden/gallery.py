"""The gallery: one row of source images, and under it the same images in each expanded domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expkit.checkpoint import atomic_path
from pden.data import Domain
from pden.generators import Generator
from pden.training.stream import Stream


def pick(domain: Domain, columns: int) -> Tensor:
    """Places of images that go through the classes in turn."""
    if domain.dense:
        return torch.arange(min(columns, len(domain)))
    labels = domain.labels.cpu()
    of_class = [(labels == label).nonzero()[:, 0] for label in domain.present]
    places = [int(each[turn]) for turn in range(columns) for each in of_class if turn < len(each)]
    return torch.tensor(places[:columns])


@torch.no_grad()
def sheet(domain: Domain, generators: Sequence[Generator], columns: int, seed: int = 0) -> Tensor:
    """Rows of images, ``(1 + generators, columns, channels, height, width)`` in [0, 1]; noise differs by image."""
    images, _ = domain.batch(pick(domain, columns).to(domain.images.device))
    rows = [images]
    for number, generator in enumerate(generators):
        stream = Stream(images.device, seed, "gallery", number)
        rows.append(generator(images, generator=stream.torch))
    return torch.stack(rows).cpu()


def save_gallery(
    domain: Domain,
    generators: Sequence[Generator],
    reports: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    columns: int = 12,
    seed: int = 0,
) -> None:
    """Write the sheet as PNG.

    Args:
        domain: source images.
        generators: of the domains, on the images' device.
        reports: what the gate measured of each; may be empty.
        columns: images in a row.
    """
    from matplotlib.figure import Figure

    rows = sheet(domain, generators, columns, seed)
    count, across, _, height, width = rows.shape
    cell = 0.62
    figure = Figure(figsize=(2.3 + across * cell * width / height, 0.2 + count * cell * 1.04), layout="constrained")
    grid = figure.subplots(count, across, squeeze=False)
    for row in range(count):
        for column in range(across):
            axes = grid[row][column]
            axes.imshow(
                rows[row, column].permute(1, 2, 0).expand(-1, -1, 3).numpy(), vmin=0, vmax=1, interpolation="nearest"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        text = "source" if row == 0 else _label(row, reports)
        grid[row][0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=7)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _label(row: int, reports: Sequence[Mapping[str, Any]]) -> str:
    if row > len(reports):
        return f"domain {row}"
    report = reports[row - 1]
    return (
        f"domain {row}, {report['kind']}\nlabels kept {100 * report['agreement']:.0f} %, "
        f"judge {100 * report['judge_agreement']:.0f} %\ndistance {report['distance']:.2f}"
    )
