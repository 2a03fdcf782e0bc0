"""Plain training on natural images: the reference of TRAIN, and the upper end of natural accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_adv.hosts.host import Forward, Host, HostLoss


class Standard(Host):
    """Cross-entropy on natural images."""

    attacks = False

    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return images

    def climb(self, twin: nn.Module, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return points

    def loss(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> HostLoss:
        natural = forward(images)
        return HostLoss(F.cross_entropy(natural.logits.float(), labels), natural, natural)
