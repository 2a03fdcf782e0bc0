"""Corruptions by noise. Images are in [0, 1]; levels are 0 to 4."""

from __future__ import annotations

import torch
from torch import Tensor


def _normal(images: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=rng, device=images.device)


def gaussian_noise(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    return images + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * _normal(images, rng)


def shot_noise(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[level]
    return torch.poisson(images * photons, generator=rng) / photons


def impulse_noise(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    amount = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    draw = torch.rand(images.shape, generator=rng, device=images.device)
    salted = torch.where(draw < amount / 2, torch.ones_like(images), images)
    return torch.where(draw > 1 - amount / 2, torch.zeros_like(images), salted)


def speckle_noise(images: Tensor, level: int, rng: torch.Generator) -> Tensor:
    return images + images * (0.06, 0.1, 0.12, 0.16, 0.2)[level] * _normal(images, rng)
