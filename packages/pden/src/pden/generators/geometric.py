"""The geometric generator: a spatial transformer whose affine map depends on image and noise (PDEN, section 3.2).

The noise becomes a 32x32 plane beside the image, seen at 32x32 (so that any resolution works); two convolutions and
two linear layers give the six numbers of an affine map. Ours is that the noise goes to the last layer besides, and that
maps start a little to all sides of the identity: of the plane alone little comes through two poolings, and a domain's
draws were one map with hardly any spread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pden.generators.base import Generator

_LOOK = 32  # side of what the localisation network sees


class Geometric(Generator):
    """Moves, turns, scales and shears; keeps colours.

    Args:
        channels: of the images.
        width: channels after the first convolution of the localisation network.
        noise: size of z; 0 leaves the noise plane out.
    """

    def __init__(self, channels: int = 3, width: int = 16, noise: int = 10) -> None:
        super().__init__(channels, noise)
        self.width = width
        self.plane = nn.Linear(noise, _LOOK * _LOOK) if noise else None
        self.localise = nn.Sequential(
            nn.Conv2d(channels + (1 if noise else 0), width, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 5 * 5, 2 * width),
            nn.ReLU(),
        )
        self.affine = nn.Linear(2 * width + noise, 6)
        # Near zero, not zero: two draws that are equal have no gradient that could part them. With ten values of noise
        # each of the six numbers has a deviation of 0.16: nine degrees, or two and a half pixels of 32.
        nn.init.normal_(self.affine.weight, std=0.02)
        nn.init.normal_(self.affine.weight[:, 2 * width :], std=0.05)
        nn.init.zeros_(self.affine.bias)
        self.register_buffer("identity", torch.tensor([1.0, 0, 0, 0, 1, 0]), persistent=False)

    def maps(self, images: Tensor, noise: Tensor) -> Tensor:
        """The affine maps, ``(batch, 2, 3)``, from output to input positions in [-1, 1]."""
        seen = images
        if seen.shape[-2:] != (_LOOK, _LOOK):
            seen = F.interpolate(seen, (_LOOK, _LOOK), mode="bilinear", antialias=True)
        if self.plane is not None:
            seen = torch.cat([seen, self.plane(noise).view(-1, 1, _LOOK, _LOOK).to(seen.dtype)], dim=1)
        looked = torch.cat([self.localise(seen), noise.to(seen.dtype)], dim=1)
        moved: Tensor = self.affine(looked).float() + self.identity
        return moved.view(-1, 2, 3)

    def transform(self, images: Tensor, noise: Tensor) -> Tensor:
        return warp(images, self.maps(images, noise))


def warp(images: Tensor, maps: Tensor, mode: str = "bilinear") -> Tensor:
    """Images ``(batch, channels, height, width)`` seen through affine maps ``(batch, 2, 3)``; edges go on outwards."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode=mode, padding_mode="border", align_corners=False)
