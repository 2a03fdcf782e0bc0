"""Digital corruptions. Images are in [0, 1]; levels are 0 to 4."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from pden.data.corruptions.kernels import gaussian


def contrast(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    means = images.mean(dim=(2, 3), keepdim=True)
    return (images - means) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + means


def saturate(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    """Scales and shifts the saturation of HSV; a grey pixel has hue 0, so it turns red where there is a shift."""
    factor, shift = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[level]
    value = images.amax(dim=1, keepdim=True)
    below = value - images
    saturation = below.amax(dim=1, keepdim=True) / value.clamp(min=1e-6)
    wanted = (saturation * factor + shift).clamp(0, 1)
    red = torch.cat([torch.zeros_like(value), value, value], dim=1)
    return value - torch.where(saturation > 0, below * wanted / saturation.clamp(min=1e-6), red * wanted)


def elastic_transform(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    side = images.shape[-1]
    strength, sigma, corner = (
        (0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
    )[level]  # fmt: skip
    count, device = len(images), images.device
    middle, arm = side // 2, side // 3
    before = torch.tensor(
        [[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]], device=device
    ).float()
    moved = before + side * corner * (2 * torch.rand(count, 3, 2, generator=rng, device=device) - 1)
    ones = torch.ones(count, 3, 1, device=device)
    # Three points fix the affine map from the new picture to the old one: [x', y', 1] A = [x, y].
    affine = torch.linalg.solve(torch.cat([moved, ones], dim=2), before.expand(count, 3, 2))
    turned = F.grid_sample(images, _pixel_grid(affine, side), padding_mode="reflection", align_corners=True)
    draws = 2 * torch.rand(count, 2, side, side, generator=rng, device=device) - 1
    shifts = gaussian(draws, side * sigma, truncate=3, mode="symmetric") * side * strength
    places = torch.arange(side, device=device).float()
    grid = torch.stack([places[None, None, :] + shifts[:, 0], places[None, :, None] + shifts[:, 1]], dim=3)
    return F.grid_sample(turned, (2 * grid + 1) / side - 1, padding_mode="reflection", align_corners=False)


def _pixel_grid(affine: Tensor, side: int) -> Tensor:
    """Where each pixel of the new pictures lies in the old ones, as `grid_sample` wants it with aligned corners."""
    places = torch.arange(side, device=affine.device).float()
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)], dim=2)
    return 2 * (points.view(1, -1, 3) @ affine).view(-1, side, side, 2) / (side - 1) - 1


def pixelate(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    side = images.shape[-1]
    small = int(side * (0.95, 0.9, 0.85, 0.75, 0.65)[level])
    down, up = _box(side, small).to(images), _box(small, side).to(images)
    coarse = ((down @ images @ down.T) * 255).round() / 255
    return ((up @ coarse @ up.T) * 255).round() / 255


def _box(inputs: int, outputs: int) -> Tensor:
    """Pillow's box resampling as a matrix ``(outputs, inputs)``."""
    scale = inputs / outputs
    support = max(scale, 1.0) / 2
    matrix = torch.zeros(outputs, inputs)
    for place in range(outputs):
        centre = (place + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(inputs, int(centre + support + 0.5))
        for other in range(first, last):
            offset = (other - centre + 0.5) / max(scale, 1.0)
            matrix[place, other] = float(-0.5 < offset <= 0.5)
    return matrix / matrix.sum(dim=1, keepdim=True)


def jpeg_compression(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    """By Pillow, one image after another, as the published files were made."""
    quality = (80, 65, 58, 50, 40)[level]
    whole = (images * 255).round().to(torch.uint8).cpu()
    coded = torch.stack([_through_jpeg(each, quality) for each in whole])
    return coded.to(images.device).float() / 255


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    packed = io.BytesIO()
    to_pil_image(image).save(packed, "JPEG", quality=quality)
    pixels: Tensor = pil_to_tensor(Image.open(packed))
    return pixels
