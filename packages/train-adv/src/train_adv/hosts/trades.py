"""TRADES (Zhang et al. 2019)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_adv.attacks.gradient import logits_of
from train_adv.attacks.losses import kl_from
from train_adv.attacks.pgd import PGD
from train_adv.hosts.host import Forward, Host, HostLoss


class Trades(Host):
    """CE(natural) + beta * KL(natural | adversarial); the attack climbs that KL from images + 0.001 N(0, 1).

    The natural probabilities of the attack are computed once a batch: the eval-mode model does not change within it.
    """

    def __init__(self, attack: PGD, beta: float = 6.0) -> None:
        super().__init__(replace(attack, start="gaussian"), beta)

    def climb(self, twin: nn.Module, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities = logits_of(twin, images).softmax(1)
        return self.attack.climb(twin, points, images, labels, kl_from(probabilities))

    def loss(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> HostLoss:
        natural, attacked = forward(images), forward(adversarial)
        own, moved = natural.logits.float(), attacked.logits.float()
        gap = F.kl_div(moved.log_softmax(1), own.log_softmax(1), reduction="batchmean", log_target=True)
        return HostLoss(F.cross_entropy(own, labels) + self.beta * gap, attacked, natural)
