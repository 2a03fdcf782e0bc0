"""What an attack climbs: functions of logits (batch, classes) and labels (batch,) that give one value a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from expkit.errors import UsageError

AttackLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the true label."""
    return F.cross_entropy(logits, labels, reduction="none")


def cw_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best other logit minus the true one (Carlini & Wagner 2017, f_6 without its cut): above 0 is misclassified."""
    true = logits.gather(1, labels[:, None])
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return (others.amax(1, keepdim=True) - true).squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6); needs three classes or more."""
    if logits.shape[1] < 3:
        raise UsageError(f"the loss dlr needs at least 3 classes, and the model has {logits.shape[1]}; use ce or cw")
    ordered, indices = logits.sort(dim=1)
    true = logits.gather(1, labels[:, None]).squeeze(1)
    rival = torch.where(indices[:, -1] == labels, ordered[:, -2], ordered[:, -1])
    return -(true - rival) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(targets: Tensor) -> AttackLoss:
    """DLR towards the given classes (Croce & Hein 2020, eq. 7); needs four classes or more."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        ordered = logits.sort(dim=1).values
        true, target = (logits.gather(1, each[:, None]).squeeze(1) for each in (labels, targets))
        return -(true - target) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12)

    return loss


def targeted_cross_entropy(targets: Tensor) -> AttackLoss:
    """Minus the cross-entropy of the given classes."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(logits, targets, reduction="none")

    return loss


def kl_from(probabilities: Tensor) -> AttackLoss:
    """KL(natural | adversarial) from fixed natural probabilities (batch, classes): what TRADES climbs."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1)

    return loss


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "cw": cw_margin, "dlr": dlr}


def make_loss(name: str) -> AttackLoss:
    """The loss called `name`; raises UsageError for an unknown one."""
    if name not in LOSSES:
        raise UsageError(f"unknown attack loss {name!r}; use one of {', '.join(LOSSES)}")
    return LOSSES[name]
