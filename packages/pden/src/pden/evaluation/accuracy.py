"""Accuracy, or mean intersection over union, of a model on a domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expkit.device import tf32
from pden.data.domain import Domain
from pden.losses.safety import IGNORED
from pden.models import TaskModel

_CHUNK = 512


@dataclass(frozen=True)
class Score:
    """A model on a domain.

    Attributes:
        domain: its name.
        accuracy: share of images (or pixels) that are labelled rightly.
        miou: mean intersection over union over the classes that occur; None for classification.
        per_class: accuracy (or intersection over union) by class name; classes that do not occur are left out.
        images: how many were scored.
        absent: classes of the model that do not occur in the domain.
    """

    domain: str
    accuracy: float
    miou: float | None
    per_class: dict[str, float]
    images: int
    absent: tuple[str, ...]

    @property
    def value(self) -> float:
        """The figure of reports: mIoU for segmentation, else accuracy."""
        return self.accuracy if self.miou is None else self.miou

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "absent": list(self.absent)}


@torch.no_grad()
@tf32(False)
def confusion(model: TaskModel, domain: Domain, chunk: int = _CHUNK) -> Tensor:
    """Counts ``(true, predicted)`` over images or pixels; the model is in eval mode and multiplies in fp32
    meanwhile."""
    training, classes = model.training, len(domain.classes)
    device = next(model.parameters()).device
    model.eval()
    total = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    chunk = max(1, chunk // 64) if domain.dense else chunk
    for start in range(0, len(domain), chunk):
        images, labels = domain.batch(torch.arange(start, min(start + chunk, len(domain)), device=domain.images.device))
        predicted, labels = model(images.to(device)).argmax(dim=1), labels.to(device)
        pairs = (labels * classes + predicted)[labels != IGNORED] if domain.dense else labels * classes + predicted
        total += torch.bincount(pairs.flatten(), minlength=classes * classes)
    model.train(training)
    return total.view(classes, classes)


def evaluate(model: TaskModel, domain: Domain) -> Score:
    """Score a model on a domain whose images fit it."""
    counts = confusion(model, domain).double().cpu()
    right, of_class = counts.diagonal(), counts.sum(dim=1)
    union = of_class + counts.sum(dim=0) - right if domain.dense else of_class
    present = [number for number in range(len(domain.classes)) if of_class[number] > 0]
    shares = {domain.classes[number]: float(right[number] / union[number]) for number in present}
    return Score(
        domain=domain.name,
        accuracy=float(right.sum() / of_class.sum().clamp(min=1)),
        miou=sum(shares.values()) / max(1, len(shares)) if domain.dense else None,
        per_class=shares,
        images=len(domain),
        absent=tuple(each for number, each in enumerate(domain.classes) if number not in present),
    )
