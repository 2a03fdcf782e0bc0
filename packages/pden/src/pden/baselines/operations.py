"""Image operations on whole batches, a random one for each image (torchvision's draw one for a whole batch).

All take images in [0, 1], ``(batch, channels, height, width)``, and a strength ``(batch, 1, 1, 1)`` in [-1, 1], whose
sign is that of the change. Ranges are those of AugMix: 30 degrees, a shear of 0.3, a third of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pden.generators.geometric import warp

Operation = Callable[[Tensor, Tensor], Tensor]


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel's grey levels become their ranks."""
    levels = (images * 255).round().long()
    flat = levels.flatten(2)
    counts = torch.zeros(*flat.shape[:2], 256, device=images.device).scatter_add_(
        2, flat, torch.ones_like(flat).float()
    )
    below = counts.cumsum(dim=2) - counts
    scaled = below / below.gather(2, flat.amax(dim=2, keepdim=True)).clamp(min=1)
    same = flat.amax(dim=2) == flat.amin(dim=2)
    return torch.where(same[..., None, None], images, scaled.gather(2, flat).view_as(images).clamp(0, 1))


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    step = 2.0 ** (strength.abs() * 4).round()
    return ((images * 255).round() / step).floor() * step / 255


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images >= 1 - strength.abs(), 1 - images, images)


def _affine(
    images: Tensor,
    angle: Tensor | float = 0.0,
    shear: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
    shift: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
) -> Tensor:
    zero = torch.zeros(len(images), device=images.device)
    turn = zero + angle
    top = torch.stack([turn.cos(), shear[0] - turn.sin(), zero + shift[0]], dim=1)
    bottom = torch.stack([turn.sin() + shear[1], turn.cos(), zero + shift[1]], dim=1)
    return warp(images, torch.stack([top, bottom], dim=1))


def _rotate(images: Tensor, strength: Tensor) -> Tensor:
    return _affine(images, angle=strength.flatten() * torch.pi / 6)


def _shear_x(images: Tensor, strength: Tensor) -> Tensor:
    return _affine(images, shear=(strength.flatten() * 0.3, 0.0))


def _shear_y(images: Tensor, strength: Tensor) -> Tensor:
    return _affine(images, shear=(0.0, strength.flatten() * 0.3))


def _translate_x(images: Tensor, strength: Tensor) -> Tensor:
    return _affine(images, shift=(strength.flatten() * 2 / 3, 0.0))


def _translate_y(images: Tensor, strength: Tensor) -> Tensor:
    return _affine(images, shift=(0.0, strength.flatten() * 2 / 3))


OPERATIONS: tuple[Operation, ...] = (
    _autocontrast,
    _equalize,
    _posterize,
    _rotate,
    _solarize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)


@torch.no_grad()
def random_operation(images: Tensor, magnitude: float, rng: torch.Generator) -> Tensor:
    """A random operation for each image, of a random sign and a strength up to `magnitude`.

    Every operation sees the whole batch and the choice is made by masks, so nothing waits for the device.
    """
    count, device = len(images), images.device
    chosen = torch.randint(len(OPERATIONS), (count, 1, 1, 1), generator=rng, device=device)
    strength = (torch.rand(count, 1, 1, 1, generator=rng, device=device) * 2 - 1) * magnitude
    changed = images
    for number, operation in enumerate(OPERATIONS):
        changed = torch.where(chosen == number, operation(images, strength), changed)
    return changed


def dirichlet(count: int, size: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Draws from Dirichlet(1, ..., 1), ``(count, size)``."""
    exponential = -torch.rand(count, size, generator=rng, device=device).clamp(min=1e-12).log()
    return exponential / exponential.sum(dim=1, keepdim=True)
