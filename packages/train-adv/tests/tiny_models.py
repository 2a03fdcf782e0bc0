"""Small real models and data for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tiny_net(classes: int = 4, channels: int = 3, seed: int = 0, width: int = 8) -> nn.Sequential:
    """A convolutional network with BatchNorm on images of any size."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def tiny_batch(
    count: int = 16, classes: int = 4, channels: int = 3, size: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] whose brightness in one quarter tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    images = 0.4 * torch.rand(count, channels, size, size, generator=generator)
    half = size // 2
    for index, label in enumerate(labels.tolist()):
        row, column = (label // 2) % 2 * half, label % 2 * half
        images[index, :, row : row + half, column : column + half] += 0.5
    return images.clamp(0, 1), labels
