"""Image operations on whole batches, a random one for each image (torchvision's draw one for a whole batch).

Ranges are those of AugMix at full strength: 30 degrees, a shear of 0.3, a third of the image. The five geometric
operations are one affine map, and choices are made by masks: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pden.generators.geometric import warp

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel from 0 to 1; it has no strength."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel's grey levels become their ranks; it has no strength."""
    flat = (images * 255).round().long().flatten(2)
    counts = torch.zeros(*flat.shape[:2], 256, device=images.device).scatter_add_(
        2, flat, torch.ones_like(images).flatten(2)
    )
    below = counts.cumsum(dim=2) - counts
    most = below.gather(2, flat.amax(dim=2, keepdim=True))
    return torch.where(most[..., None] > 0, (below / most.clamp(min=1)).gather(2, flat).view_as(images), images)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Fewer bits, RandAugment's: from 8 to 4 at full strength."""
    return _cut(images, (strength.abs() * 4).round())


def posterize_strongly(images: Tensor, strength: Tensor) -> Tensor:
    """Fewer bits, AugMix's: from 4 to none at full strength."""
    return _cut(images, 4 + (strength.abs() * 4).floor())


def _cut(images: Tensor, bits: Tensor) -> Tensor:
    """Without the lowest bits of 8."""
    step = 2.0**bits
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Negatives of what is brighter than 1 - strength."""
    return torch.where(images >= 1 - strength.abs(), 1 - images, images)


Photometric = tuple[Callable[[Tensor, Tensor], Tensor], ...]
PHOTOMETRIC: Photometric = (autocontrast, equalize, posterize, solarize)
AUGMIX: Photometric = (autocontrast, equalize, posterize_strongly, solarize)
NAMES = (*(each.__name__ for each in PHOTOMETRIC), *GEOMETRIC)


def affine_maps(kinds: Tensor, strength: Tensor) -> Tensor:
    """The map of each image's geometric operation, ``(batch, 2, 3)``; the identity for a photometric one.

    Args:
        kinds: indices of `NAMES`, ``(batch,)``.
        strength: in [-1, 1], ``(batch,)``.
    """

    def amount(name: str, most: float) -> Tensor:
        return torch.where(kinds == NAMES.index(name), strength * most, 0.0)

    turn = amount("rotate", torch.pi / 6)
    top = torch.stack([turn.cos(), amount("shear_x", 0.3) - turn.sin(), amount("translate_x", 2 / 3)], dim=1)
    bottom = torch.stack([turn.sin() + amount("shear_y", 0.3), turn.cos(), amount("translate_y", 2 / 3)], dim=1)
    return torch.stack([top, bottom], dim=1)


@torch.no_grad()
def operate(images: Tensor, kinds: Tensor, strength: Tensor, photometric: Photometric = PHOTOMETRIC) -> Tensor:
    """One operation on each image.

    Args:
        images: ``(batch, channels, height, width)``, cut off at 0 and 1 (beyond which random convolutions go).
        kinds: indices of `NAMES`, ``(batch,)``.
        strength: in [-1, 1], ``(batch,)``; its sign is that of the change.
        photometric: `PHOTOMETRIC` or `AUGMIX`.
    """
    chosen, amounts = kinds[:, None, None, None], strength[:, None, None, None]
    images = images.clamp(0, 1)
    moved = warp(images, affine_maps(kinds, strength))
    changed = torch.where(chosen >= len(PHOTOMETRIC), moved, images)
    for number, operation in enumerate(photometric):
        changed = torch.where(chosen == number, operation(images, amounts), changed)
    return changed


def random_operation(
    images: Tensor,
    magnitude: float,
    rng: torch.Generator,
    photometric: Photometric = PHOTOMETRIC,
    *,
    fixed: bool = False,
) -> Tensor:
    """A random operation for each image, of a random sign and a strength up to `magnitude`, or of it where `fixed`."""
    count, device = len(images), images.device
    kinds = torch.randint(len(NAMES), (count,), generator=rng, device=device)
    strength = torch.rand(count, generator=rng, device=device) * 2 - 1
    return operate(images, kinds, (strength.sign() if fixed else strength) * magnitude, photometric)


def dirichlet(count: int, size: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Draws from Dirichlet(1, ..., 1), ``(count, size)``."""
    exponential = -torch.rand(count, size, generator=rng, device=device).clamp(min=1e-12).log()
    return exponential / exponential.sum(dim=1, keepdim=True)
