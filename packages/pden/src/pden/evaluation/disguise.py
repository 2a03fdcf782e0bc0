"""The source in disguise: what settings may be chosen by, since it needs held-out source images and no target (ours).

The plain held-out source is no guide: every setting labels it rightly. In disguise it shows how a model bears changes
that it was not trained on. There are two: "texture", a random convolution of each image's own, stretched to [0, 1] (it
changes colours, polarity, edges); "operations", three random operations of AugMix's list at full strength (which was
made to share nothing with CIFAR-10-C). Neither is a target's recipe here: no photographs, fonts, corruptions.
RandConv, RandAugment and AugMix train on the like, so the figure may choose among settings of PDEN, but does not
compare it with them; nor does "texture" tell what `data.randconv` is worth, and "operations", which turn, shear and
shift too, are kind to geometric domains.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.operations import random_operation
from pden.data.domain import Domain, to_uint8

_SIZES = (1, 3, 5, 7)  # of the random convolutions, in equal parts
_SEED = 20_210_316  # the same for every run, so that runs can be compared


def disguises(domain: Domain, limit: int = 1000) -> list[Domain]:
    """Up to `limit` images of a domain in each disguise, the same ones in every run; for segmentation in "texture"
    alone, since operations would move the labels."""
    part = domain.spread(limit)
    images = part.images.cpu().float() / 255  # on the CPU, so that all devices see the same
    rng = torch.Generator().manual_seed(_SEED)
    made = {"texture": textured(images, rng)}
    if not domain.dense:
        changed = images
        for _ in range(3):
            changed = random_operation(changed, 1.0, rng)
        made["operations"] = changed
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
