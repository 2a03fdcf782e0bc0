"""95 % intervals for accuracies, and for differences of accuracies on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_Z = 1.959964  # of the normal distribution, two-sided 95 %


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    if count == 0:
        return (0.0, 1.0)
    share, square = right / count, _Z**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return (max(0.0, centre - half), min(1.0, centre + half))


def accuracy(right: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """Accuracy of boolean (n,) answers, its interval, and both for each class."""
    table = [(int(right[labels == label].sum()), int((labels == label).sum())) for label in range(classes)]
    total = int(right.sum())
    return {
        "accuracy": total / max(len(right), 1),
        "interval": wilson(total, len(right)),
        "images": len(right),
        "per_class": [
            {"accuracy": own / count if count else None, "interval": wilson(own, count), "images": count}
            for own, count in table
        ],
    }


def paired_difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Accuracy of the first minus that of the second of each pair, all on the same images.

    Several pairs (seeds) are averaged image by image before the interval is taken, which counts how images differ; how
    seeds differ is in `pairs`. The interval is Bonett and Price's (2012): normal, with one image more for either side,
    so that it has a width where no image differs.
    """
    differences = torch.stack([(first.double() - second.double()) for first, second in pairs])
    by_image = differences.mean(0)
    adjusted = torch.cat([by_image, by_image.new_tensor([1.0, -1.0])])
    centre, half = float(adjusted.mean()), _Z * float(adjusted.std(correction=0)) / math.sqrt(len(adjusted))
    return {
        "difference": float(by_image.mean()),
        "interval": (max(-1.0, centre - half), min(1.0, centre + half)),
        "images": by_image.numel(),
        "pairs": [float(each.mean()) for each in differences],
    }
