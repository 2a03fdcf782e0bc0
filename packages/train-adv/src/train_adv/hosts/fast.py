"""Single-step training: FGSM-RS (Wong et al. 2020) and N-FGSM (de Jorge et al. 2022)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from train_adv.attacks.gradient import ascend
from train_adv.attacks.losses import cross_entropy
from train_adv.attacks.pgd import PGD
from train_adv.hosts.pgd_at import PGDAT


class FGSMRS(PGDAT):
    """One step of 1.25 epsilon from a uniform start, projected. Published in train mode; ours, as all, in eval mode."""

    def __init__(self, attack: PGD, beta: float = 0.0) -> None:
        super().__init__(replace(attack, steps=1, step_size=1.25 * attack.epsilon, start="random"), beta)


class NFGSM(PGDAT):
    """One step of epsilon from uniform noise of twice that size; the sum is clipped to [0, 1] but not to the ball."""

    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        reach = 2 * self.attack.epsilon
        return (images + torch.empty_like(images).uniform_(-reach, reach, generator=generator)).clamp(0, 1)

    def climb(self, twin: nn.Module, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        gradient, _, _ = ascend(twin, points, labels, cross_entropy)
        return (points + self.attack.epsilon * gradient.sign()).clamp(0, 1).detach()
