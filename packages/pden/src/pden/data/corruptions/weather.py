"""Corruptions by weather. Images are in [0, 1]; levels are 0 to 4."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expkit.errors import UsageError
from pden.data.corruptions.kernels import clipped_zoom, gaussian, motion, plasma


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def brightness(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    """Raises the value of HSV; hue and saturation stay, so the channels scale with it."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[level]).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-6), raised)


def fog(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[level]
    side = images.shape[-1]
    power = 1 << (side - 1).bit_length()
    haze = plasma(len(images), power, decay, rng)[:, None, :side, :side]
    most = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images + amount * haze) * most / (most + amount)


def snow(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    mean, deviation, zoom, threshold, radius, sigma, kept = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[level]
    count, _, height, width = images.shape
    flakes = mean + deviation * torch.randn(count, 1, height, width, generator=rng, device=images.device)
    flakes = clipped_zoom(flakes, zoom)
    flakes = torch.where(flakes < threshold, torch.zeros_like(flakes), flakes).clamp(0, 1)
    degrees = -135 + 90 * torch.rand(count, generator=rng, device=images.device)
    fallen = motion(flakes, radius, sigma, degrees)
    whiter = kept * images + (1 - kept) * torch.maximum(images, _grey(images) * 1.5 + 0.5)
    return whiter + fallen + fallen.rot90(2, (2, 3))


def frost(images: Tensor, level: int, rng: torch.Generator, textures: Path | None = None) -> Tensor:
    """Crops of frost photographs at a fifth of their size, or of a texture that we make, over the images."""
    kept, amount = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    side = images.shape[-1]
    sheets = _ice(rng) if textures is None else _photographs(textures, rng.device)
    if min(size for sheet in sheets for size in sheet.shape[1:]) < side:
        raise UsageError(f"a frost texture is smaller than the images, {side} pixels")
    crops = []
    # all drawn before the host asks for any: a GPU would be waited for three times an image
    for which, *corner in torch.rand(len(images), 3, generator=rng, device=rng.device).tolist():
        sheet = sheets[int(which * len(sheets))]
        top, left = (int(share * (size - side)) for share, size in zip(corner, sheet.shape[1:], strict=True))
        crops.append(sheet[:, top : top + side, left : left + side])
    return kept * images + amount * torch.stack(crops)


def _ice(rng: torch.Generator) -> list[Tensor]:
    """Five bluish sheets of ridges on rough ground, ``(3, 256, 256)`` (ours: no photograph comes with the package)."""
    ridges = 1 - (2 * plasma(5, 256, 1.6, rng) - 1).abs()
    ground = plasma(5, 256, 2.2, rng)
    light = (0.35 + 0.65 * (0.6 * ridges**3 + 0.4 * ground)).clamp(0, 1)
    tint = torch.tensor([0.86, 0.94, 1.0], device=rng.device)
    return list(light[:, None] * tint[None, :, None, None])


def _photographs(folder: Path, device: torch.device) -> list[Tensor]:
    from pden.data.folder import image_files, read_image

    sheets = [read_image(path).float().to(device) / 255 for path in image_files(folder)]
    small = [F.interpolate(each[None], scale_factor=0.2, mode="bilinear")[0] for each in sheets]
    usable = [each for each in small if min(each.shape[1:]) > 32]
    if not usable:
        raise UsageError(f"{folder} has no frost photograph of more than 160 pixels")
    return usable


def spatter(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    mean, deviation, sigma, threshold, strength, mud = (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1.0, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    )[level]
    count, _, height, width = images.shape
    liquid = mean + deviation * torch.randn(count, 1, height, width, generator=rng, device=images.device)
    liquid = gaussian(liquid, sigma)
    liquid = torch.where(liquid < threshold, torch.zeros_like(liquid), liquid)
    if mud:
        cover = gaussian((liquid > threshold).float(), strength)
        cover = torch.where(cover < 0.8, torch.zeros_like(cover), cover)
        brown = torch.tensor([63, 42, 20], device=images.device)[:, None, None] / 255
        return images * (1 - cover) + brown * cover
    film = liquid * _edges(liquid)
    film = strength * film / film.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    water = torch.tensor([175, 238, 238], device=images.device)[:, None, None] / 255
    return images + film * water


def _edges(liquid: Tensor) -> Tensor:
    """Brighter towards the rims of drops: distance from an edge, cut off, equalised by rank, sharpened to one side."""
    from scipy.ndimage import distance_transform_edt

    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=liquid.device)[None, None]
    steep = F.conv2d(liquid * 255, across, padding=1).abs() + F.conv2d(liquid * 255, across.mT, padding=1).abs()
    maps = [torch.from_numpy(distance_transform_edt(each)) for each in (steep <= 150)[:, 0].cpu().numpy()]
    far = F.avg_pool2d(torch.stack(maps)[:, None].float().to(liquid.device).clamp(max=20), 3, 1, 1).floor()
    ranks = (far.flatten(1)[:, :, None] > far.flatten(1)[:, None, :]).float().mean(dim=2).view_as(far)
    kernel = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], device=liquid.device)[None, None]
    return F.avg_pool2d(F.conv2d(F.pad(ranks, [1] * 4, mode="reflect"), kernel).clamp(0, 1), 3, 1, 1)
