"""LBGAT (Cui et al. 2021): a jointly trained natural teacher draws the boundary."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_adv.attacks.gradient import logits_of
from train_adv.attacks.losses import kl_from
from train_adv.attacks.pgd import PGD
from train_adv.hosts.host import Forward, Host, HostLoss
from train_adv.models.classifier import Classifier


class LBGAT(Host):
    """MSE(student's adversarial logits, teacher's natural logits) + CE(teacher) + beta * KL of the student.

    Gradients reach the teacher from both of its terms, as published. With beta 0 the student has no natural forward.

    Args:
        teacher: trained along; its parameters belong into the optimiser.
    """

    def __init__(self, attack: PGD, teacher: Classifier, beta: float = 0.0) -> None:
        super().__init__(replace(attack, start="gaussian"), beta)
        self.teacher = teacher

    def climb(self, twin: nn.Module, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities = logits_of(twin, images).softmax(1)
        return self.attack.climb(twin, points, images, labels, kl_from(probabilities))

    def loss(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> HostLoss:
        natural = forward(images) if self.beta > 0 else None
        attacked = forward(adversarial)
        moved, taught = attacked.logits.float(), self.teacher(images).float()
        total = F.mse_loss(moved, taught) + F.cross_entropy(taught, labels)
        if natural is not None:
            own = natural.logits.float().log_softmax(1)
            total = total + self.beta * F.kl_div(moved.log_softmax(1), own, reduction="batchmean", log_target=True)
        return HostLoss(total, attacked, natural)
