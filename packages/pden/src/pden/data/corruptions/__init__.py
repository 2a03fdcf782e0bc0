"""The corruptions of CIFAR-10-C (Hendrycks and Dietterich, 2019) on whole batches, with the CIFAR constants.

15 are the benchmark's (`COMMON`), 4 more are its extra ones. All code is ours; differences from the published files:
random draws; motion blur and snow follow ImageMagick's kernel without its sub-pixel arithmetic; frost needs the
authors' photographs for the same textures; spatter's water finds edges without hysteresis.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pden.data.corruptions import blur, digital, noise, weather

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
CORRUPTIONS = (*COMMON, *EXTRA)
_HOMES = (noise, blur, weather, digital)


def corrupt(images: Tensor, name: str, level: int, rng: torch.Generator, *, frost: Path | None = None) -> Tensor:
    """Corrupted images.

    Args:
        images: uint8, ``(batch, 3, 32, 32)``; other even sides work, with the constants of 32.
        name: one of `CORRUPTIONS`.
        level: severity, 1 to 5.
        rng: on the images' device.
        frost: folder of frost photographs; without one the texture is made by a procedure of ours.
    """
    function = next(getattr(home, name) for home in _HOMES if hasattr(home, name))
    options = {"textures": frost} if name == "frost" else {}
    made: Tensor = function(images.float() / 255, level - 1, rng, **options)
    return (made.clamp(0, 1) * 255).to(torch.uint8)  # cut off, as the published files are
