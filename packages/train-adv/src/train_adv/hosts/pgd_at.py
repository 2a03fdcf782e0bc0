"""PGD adversarial training (Madry et al. 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from train_adv.hosts.host import Forward, Host, HostLoss


class PGDAT(Host):
    """Cross-entropy on adversarial images."""

    def loss(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> HostLoss:
        attacked = forward(adversarial)
        return HostLoss(F.cross_entropy(attacked.logits.float(), labels), attacked)
