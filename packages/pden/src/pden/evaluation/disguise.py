"""The source in disguise: what settings may be chosen by, since it needs held-out source images and no target (ours).

The plain held-out source is no guide: every setting labels it rightly. In disguise it shows how a model bears changes
that it was not trained on. There are three: "texture", a random convolution of each image's own, stretched to [0, 1]
(it changes colours, polarity, edges); "operations", three random operations of AugMix's list at full strength (which
was made to share nothing with CIFAR-10-C; some move pixels); "ground", a smooth pattern of random colours wherever it
is lighter than the image. None is a target's recipe here: no photographs, fonts, corruptions.

RandConv, RandAugment and AugMix train on the like, so the figure may choose among settings of PDEN, but does not
compare it with them. Nor does a disguise tell what a setting that is made alike is worth: "texture" is kind to
`data.randconv`, "operations" are to geometric domains and `data.randaugment`, "ground" is to `generator.grid`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.operations import random_operation
from pden.data.domain import Domain, to_uint8

_SIZES = (1, 3, 5, 7)  # of the random convolutions, in equal parts
_CELLS = 8  # random colours to a side of the ground
_SEED = 20_210_316  # the same for every run, so that runs can be compared


def disguises(domain: Domain, limit: int = 1000) -> list[Domain]:
    """Up to `limit` images of a domain in each disguise, the same ones in every run; for segmentation without
    "operations", which would move the labels."""
    part = domain.spread(limit)
    images = part.images.cpu().float() / 255  # on the CPU, so that all devices see the same
    rng = torch.Generator().manual_seed(_SEED)
    made = {"texture": textured(images, rng)}
    if not domain.dense:
        changed = images
        for _ in range(3):
            changed = random_operation(changed, 1.0, rng)
        made["operations"] = changed
    made["ground"] = grounded(images, rng)
    return [
        replace(part, name=f"{domain.name}, {name}", images=to_uint8(each.clamp(0, 1), name).to(part.images.device))
        for name, each in made.items()
    ]


def textured(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images in [0, 1], ``(batch, channels, height, width)``, each after a random convolution of its own and stretched
    to [0, 1], so that it stays legible."""
    made = torch.empty_like(images)
    channels = images.shape[1]
    for place, size in enumerate(_SIZES):
        part = images[place :: len(_SIZES)]
        if not len(part):
            continue
        weight = torch.randn(len(part) * channels, channels, size, size, generator=rng)
        padded = F.pad(part * 2 - 1, [size // 2] * 4, mode="reflect").flatten(0, 1)[None]
        made[place :: len(_SIZES)] = F.conv2d(padded, weight, groups=len(part)).view_as(part)
    low, high = (edge(made.flatten(1), dim=1)[:, None, None, None] for edge in (torch.amin, torch.amax))
    return (made - low) / (high - low).clamp(min=1e-6)


def grounded(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images in [0, 1], ``(batch, channels, height, width)``, over a smooth pattern of random colours, the
    lighter of the two in each channel."""
    cells = torch.rand(*images.shape[:2], _CELLS, _CELLS, generator=rng)
    pattern = F.interpolate(cells, images.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.maximum(images, pattern)
