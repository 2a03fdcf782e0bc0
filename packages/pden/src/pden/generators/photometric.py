"""The photometric generator: a small convolutional autoencoder whose style is set by noise (PDEN, section 3.2).

Four 3x3 convolutions, channels -> w -> 2w -> 4w -> channels, AdaIN after the second, a sigmoid at the end; w = 16
and 10 noise values (26,019 parameters) for 32x32 colour images. Resolution is kept, so any size works. Noise enters
after the second convolution alone, so what comes before it is computed once for all draws of one batch.

Ours is that the style may differ by place besides, on a coarse grid: one that is the same everywhere turns an even
ground into an even ground, and a model that has seen no other takes whatever stands there for strokes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expkit.errors import UsageError
from pden.generators.base import Generator
from pden.layout import channels_last


class AdaIN(nn.Module):
    """Instance normalisation whose scale and shift come from the noise: ``(1 + gamma(z)) * norm(x) + beta(z)``.

    Args:
        noise: size of z.
        features: of the maps.
        grid: side of a grid over the maps on which the noise adds to scale and shift in each cell, with linear passages
            between cells (ours); 0 leaves it out.
        grid_share: of the draws that have such a style; the first noise value says which, and is part of the style of
            both.

    Raises:
        UsageError: a share that is none.
    """

    def __init__(self, noise: int, features: int, grid: int = 0, grid_share: float = 1.0) -> None:
        super().__init__()
        if not 0 < grid_share <= 1:
            raise UsageError(f"grid_share is {grid_share}; it must be in (0, 1]")
        self.grid, self.limit = grid, NormalDist().inv_cdf(grid_share) if grid_share < 1 else inf
        self.style = nn.Linear(noise, 2 * features)
        self.places = nn.Linear(noise, 2 * features * grid * grid) if grid else None

    def forward(self, maps: Tensor, noise: Tensor) -> Tensor:
        """Maps ``(batch, features, height, width)`` in the style of noise ``(batch, noise)``."""
        return self.styled(normalised(maps), noise)

    def styled(self, norms: Tensor, noise: Tensor) -> Tensor:
        """The same of maps that are normalised already."""
        style = self.style(noise)[:, :, None, None]
        if self.places is not None:
            cells = self.places(noise)
            if self.limit < inf:
                cells = cells * (noise[:, :1] < self.limit)
            cells = cells.unflatten(1, (-1, self.grid, self.grid)) + style
            style = channels_last(enlarged(cells, norms.shape[-2], norms.shape[-1]))
        gamma, beta = style.chunk(2, dim=1)
        return torch.addcmul(beta, 1 + gamma, norms)


def enlarged(cells: Tensor, height: int, width: int) -> Tensor:
    """Square maps ``(..., grid, grid)`` as ``(..., height, width)``, bilinear.

    As a product of matrices, whose gradients are the same in every run; those of `interpolate` are not on a GPU.
    """
    grid = cells.shape[-1]
    unit = torch.eye(grid * grid, device=cells.device, dtype=cells.dtype).view(1, -1, grid, grid)
    shares = F.interpolate(unit, (height, width), mode="bilinear", align_corners=False)[0].flatten(1)
    return torch.unflatten(cells.flatten(-2) @ shares, -1, (height, width))


def normalised(maps: Tensor) -> Tensor:
    """Each map of each image with mean 0 and variance 1: instance normalisation.

    On a CPU as group normalisation, which is faster there, and of contiguous maps: on others it loses two digits.
    """
    if maps.device.type == "cpu":
        return F.group_norm(maps.contiguous(), maps.shape[1])
    return F.instance_norm(maps)


class Photometric(Generator):
    """Changes colours, contrast and texture; keeps shapes in place.

    Args:
        channels: of the images.
        width: channels after the first convolution.
        noise: size of z; 0 leaves AdaIN out.
        grid: of `AdaIN`; 0 is the paper's.
        grid_share: of `AdaIN`.
    """

    def __init__(
        self, channels: int = 3, width: int = 16, noise: int = 10, grid: int = 0, grid_share: float = 1.0
    ) -> None:
        super().__init__(channels, noise)
        self.width, self.grid, self.grid_share = width, grid, grid_share
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.adain = AdaIN(noise, 2 * width, grid, grid_share) if noise else None
        self.third = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.last = nn.Conv2d(4 * width, channels, 3, padding=1)

    def transform(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.draws(images, [noise])[0]

    def draws(self, images: Tensor, noises: Sequence[Tensor]) -> list[Tensor]:
        maps = F.relu(self.second(F.relu(self.first(channels_last(images)), inplace=True)), inplace=True)
        if self.adain is None:
            return [self._painted(maps) for _ in noises]
        norms = channels_last(normalised(maps))
        return [self._painted(self.adain.styled(norms, noise)) for noise in noises]

    def _painted(self, maps: Tensor) -> Tensor:
        painted: Tensor = self.last(F.relu(self.third(maps), inplace=True))
        if painted.requires_grad:
            # From another layout its convolution goes back more slowly.
            painted.register_hook(channels_last)  # type: ignore[no-untyped-call]
        return painted.float().sigmoid()
