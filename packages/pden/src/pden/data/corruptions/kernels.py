"""Filters that several corruptions share, on batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def filter_images(images: Tensor, kernel: Tensor, mode: str = "replicate") -> Tensor:
    """Correlate every channel with one kernel ``(rows, columns)``, both odd.

    Args:
        mode: of `torch.nn.functional.pad`, or "symmetric": reflection that repeats the edge, as scipy's "reflect" does.
    """
    channels = images.shape[1]
    rows, columns = kernel.shape
    if mode == "symmetric":
        down, across = (_symmetric(size, reach // 2).to(images.device)
                        for size, reach in zip(images.shape[2:], (rows, columns), strict=True))  # fmt: skip
        padded = images[:, :, down][:, :, :, across]
    else:
        padded = F.pad(images, (columns // 2, columns // 2, rows // 2, rows // 2), mode=mode)
    return F.conv2d(padded, kernel.to(images).expand(channels, 1, rows, columns), groups=channels)


def _symmetric(size: int, reach: int) -> Tensor:
    """Indices of a line of `size` values with `reach` more on either side."""
    places = torch.arange(-reach, size + reach) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)


def gaussian_line(sigma: float, radius: int) -> Tensor:
    """A Gaussian of 2 radius + 1 values, whose sum is 1."""
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (places / sigma) ** 2)
    return (line / line.sum()).float()


def gaussian(images: Tensor, sigma: float, truncate: float = 4.0, mode: str = "replicate") -> Tensor:
    """Gaussian blur, cut off at `truncate` sigmas; nothing at sigma 0."""
    radius = int(truncate * sigma + 0.5) if sigma > 0 else 0
    if radius == 0:
        return images
    line = gaussian_line(sigma, radius)
    return filter_images(filter_images(images, line[:, None], mode), line[None, :], mode)


def motion(images: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """A one-sided Gaussian smear along a direction of each image's own, ``(batch,)``, in ImageMagick's manner."""
    width = 2 * radius + 1
    weights = torch.exp(-(torch.arange(width, dtype=torch.float64) ** 2) / (2 * sigma * sigma))
    weights = weights / weights.sum()
    angle = torch.deg2rad(degrees)
    batch, _, height, across = images.shape
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(across, device=images.device)[None, None, :]
    which = torch.arange(batch, device=images.device)[:, None, None]
    last, total = images.permute(0, 2, 3, 1), torch.zeros_like(images)
    for step, weight in enumerate(weights.tolist()):
        if weight < 1e-6:
            break
        down = (step * angle.sin() - 0.5).ceil().long()[:, None, None]
        right = (step * angle.cos() - 0.5).ceil().long()[:, None, None]
        place = (which, (rows + down).clamp(0, height - 1), (columns + right).clamp(0, across - 1))
        total = total + weight * last[place].permute(0, 3, 1, 2)
    return total


def clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """The middle of the images, enlarged to their size: corners map to corners."""
    side = images.shape[-1]
    inner = math.ceil(side / factor)
    start = (side - inner) // 2
    middle = images[..., start : start + inner, start : start + inner]
    large = round(inner * factor)
    zoomed = F.interpolate(middle, (large, large), mode="bilinear", align_corners=True)
    trim = (large - side) // 2
    return zoomed[..., trim : trim + side, trim : trim + side]


def plasma(count: int, side: int, decay: float, rng: torch.Generator) -> Tensor:
    """Diamond-square height maps in [0, 1], ``(count, side, side)``, that wrap around; `side` is a power of two."""
    heights = torch.zeros(count, side, side, device=rng.device)
    step, wibble = side, 100.0

    def moved(total: Tensor) -> Tensor:
        noise = torch.rand(total.shape, generator=rng, device=rng.device) * 2 - 1
        return total / 4 + wibble * wibble * noise

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        square = corners + corners.roll(-1, 1)
        square = square + square.roll(-1, 2)
        heights[:, half::step, half::step] = moved(square)
        centres = heights[:, half::step, half::step]
        corners = heights[:, ::step, ::step]
        top = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        heights[:, ::step, half::step] = moved(top)
        left = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, half::step, ::step] = moved(left)
        step, wibble = half, wibble / decay
    low, high = heights.amin(dim=(1, 2), keepdim=True), heights.amax(dim=(1, 2), keepdim=True)
    return (heights - low) / (high - low)
