"""`train-adv topology`: every metric for a set of checkpoints against one standard model, and what plots need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expkit.cli import progress
from expkit.errors import UsageError
from train_adv.data.dataset import DataSet
from train_adv.evaluation.evaluate import require_fit
from train_adv.models.checkpoint import load_model
from train_adv.models.classifier import Classifier
from train_adv.topology import metrics
from train_adv.training.measure import features_of, right_answers


@dataclass(frozen=True)
class Measured:
    """One checkpoint's figures and features.

    Attributes:
        name: as shown.
        natural: accuracy on the same images.
        figures: see `train_adv.topology.metrics.measure`.
        features: (n, dim), on the CPU.
    """

    name: str
    natural: float
    figures: dict[str, float]
    features: Tensor


def measure_checkpoints(
    checkpoints: Sequence[Path], reference: Path, data: DataSet, *, limit: int, device: torch.device, size: int = 500
) -> tuple[list[Measured], Tensor]:
    """The reference itself (against which it scores perfectly) and each checkpoint, on the first `limit` test images.

    Returns:
        Figures in order, the reference first, and the labels (n,) of the images.

    Raises:
        UsageError: a checkpoint that cannot be read or compared, or too few images.
    """
    count = min(limit or len(data.test), len(data.test))
    if count < 4:
        raise UsageError(f"{count} images are too few for neighbours; use at least 4")
    split = data.test.select(torch.arange(count))
    models: list[tuple[str, Classifier]] = []
    for path in (reference, *checkpoints):
        model = load_model(path, device)
        require_fit(model, data, path)
        models.append((run_name(path), model))
    found: list[Measured] = []
    with progress() as bar:
        task = bar.add_task("topology", total=len(models))
        for name, model in models:
            features = features_of(model, split, size=size, device=device)
            natural = float(right_answers(model, split, size=size, device=device).float().mean())
            base = found[0].features if found else features.cpu()
            found.append(Measured(name, natural, metrics.measure(features.cpu(), base), features.cpu()))
            bar.advance(task)
    return found, split.labels.cpu()


def run_name(path: Path) -> str:
    """How a checkpoint is called: by its run, and its file where that is not the best one."""
    if path.is_dir():
        return path.name
    folder = path.resolve().parent.name
    return folder if path.stem == "best" else f"{folder}/{path.stem}"


def rows(found: Sequence[Measured], labels: Tensor, classes: int) -> list[dict[str, Any]]:
    """For JSON: figures and the class-by-class shares of neighbours."""
    return [
        {
            "name": each.name,
            "natural": each.natural,
            **each.figures,
            "neighbour_confusion": metrics.neighbour_confusion(each.features, labels, classes).tolist(),
        }
        for each in found
    ]


def table(found: Sequence[Measured]) -> str:
    """A Markdown table."""
    names = list(found[0].figures)
    lines = ["| model | natural | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for each in found:
        cells = [f"{100 * each.natural:.2f}", *(f"{each.figures[name]:.4f}" for name in names)]
        lines.append(f"| {each.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
