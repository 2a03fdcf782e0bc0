"""MART (Wang et al. 2020)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from train_adv.attacks.pgd import PGD
from train_adv.hosts.host import Forward, Host, HostLoss


class Mart(Host):
    """Boosted cross-entropy on adversarial images, plus beta * KL weighted by how unsure the natural answer is."""

    def __init__(self, attack: PGD, beta: float = 5.0) -> None:
        super().__init__(replace(attack, start="gaussian"), beta)

    def loss(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> HostLoss:
        natural, attacked = forward(images), forward(adversarial)
        own, moved = natural.logits.float(), attacked.logits.float()
        rivals = moved.softmax(1).masked_fill(F.one_hot(labels, moved.shape[1]).bool(), 0).amax(1)
        boosted = F.cross_entropy(moved, labels) - torch.log1p(1e-4 - rivals).mean()  # 1e-4 as in the published code
        gaps = F.kl_div(moved.log_softmax(1), own.log_softmax(1), reduction="none", log_target=True).sum(1)
        unsure = 1 - own.softmax(1).gather(1, labels[:, None]).squeeze(1)
        return HostLoss(boosted + self.beta * (gaps * unsure).mean(), attacked, natural)
