"""The photometric generator: a small convolutional autoencoder whose style is set by noise (PDEN, section 3.2).

Four 3x3 convolutions, channels -> w -> 2w -> 4w -> channels, AdaIN after the second, a sigmoid at the end; w = 16
and 10 noise values (26,019 parameters) for 32x32 colour images. Resolution is kept, so any size works.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pden.generators.base import Generator


class AdaIN(nn.Module):
    """Instance normalisation whose scale and shift come from the noise: ``(1 + gamma(z)) * norm(x) + beta(z)``."""

    def __init__(self, noise: int, features: int) -> None:
        super().__init__()
        self.style = nn.Linear(noise, 2 * features)

    def forward(self, maps: Tensor, noise: Tensor) -> Tensor:
        """Maps ``(batch, features, height, width)`` in the style of noise ``(batch, noise)``."""
        gamma, beta = self.style(noise)[:, :, None, None].chunk(2, dim=1)
        styled: Tensor = (1 + gamma) * F.instance_norm(maps) + beta
        return styled


class Photometric(Generator):
    """Changes colours, contrast and texture; keeps shapes in place.

    Args:
        channels: of the images.
        width: channels after the first convolution.
        noise: size of z; 0 leaves AdaIN out.
    """

    def __init__(self, channels: int = 3, width: int = 16, noise: int = 10) -> None:
        super().__init__(channels, noise)
        self.width = width
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.adain = AdaIN(noise, 2 * width) if noise else None
        self.third = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.last = nn.Conv2d(4 * width, channels, 3, padding=1)

    def transform(self, images: Tensor, noise: Tensor) -> Tensor:
        maps = F.relu(self.second(F.relu(self.first(images))))
        if self.adain is not None:
            maps = self.adain(maps, noise)
        return self.last(F.relu(self.third(maps))).float().sigmoid()  # type: ignore[no-any-return]
