"""Corruptions by blur. Images are in [0, 1]; levels are 0 to 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.data.corruptions.kernels import clipped_zoom, filter_images, gaussian, gaussian_line, motion


def gaussian_blur(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    return gaussian(images, (0.4, 0.6, 0.7, 0.8, 1.0)[level])


def glass_blur(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    """Neighbouring pixels are swapped at random, in the published order; each image by draws of its own."""
    sigma, reach, rounds = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[level]
    mixed = (gaussian(images, sigma) * 255).floor() / 255
    count, _, height, width = images.shape
    which = torch.arange(count, device=images.device)
    pixels = mixed.permute(0, 2, 3, 1).clone()
    for _ in range(rounds):
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                shift = torch.randint(-reach, reach, (2, count), generator=rng, device=images.device)
                here, there = (which, row, column), (which, row + shift[1], column + shift[0])
                # The published code swaps views of one array, so both places end with the neighbour's value.
                pixels[here] = pixels[there]
    return gaussian(pixels.permute(0, 3, 1, 2), sigma)


def defocus_blur(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[level]
    places = torch.arange(-3, 4)
    disk = (places[:, None] ** 2 + places[None, :] ** 2 <= radius**2).float()
    line = gaussian_line(alias, 1)
    smooth = F.conv2d(disk[None, None] / disk.sum(), (line[:, None] * line[None, :])[None, None], padding=1)
    return filter_images(images, smooth[0, 0], "reflect")


def motion_blur(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[level]
    degrees = torch.rand(len(images), generator=rng, device=images.device) * 90 - 45
    return motion(images, radius, sigma, degrees)


def zoom_blur(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    steps = (7, 12, 16, 21, 26)[level]  # as rounding has it in the published ranges of numpy
    total = images + sum(clipped_zoom(images, 1 + 0.01 * step) for step in range(steps))
    return total / (steps + 1)
