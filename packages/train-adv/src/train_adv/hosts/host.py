"""What every host has: a start that draws, an attack that does not, and a loss that may be computed twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train_adv.attacks.pgd import PGD
from train_adv.models.classifier import Output

Forward = Callable[[Tensor], Output]


@dataclass(frozen=True)
class HostLoss:
    """One evaluation of a host's loss.

    Attributes:
        total: scalar, fp32.
        attacked: output of the adversarial images.
        natural: output of the natural images in train mode, where the host has such a forward.
    """

    total: Tensor
    attacked: Output
    natural: Output | None = None


class Host(nn.Module):
    """Base of all hosts. A module, because some own a second network.

    Args:
        attack: radius, steps and norm of the training attack.
        beta: weight of the host's second term, where it has one.
    """

    attacks = True  # whether training needs adversarial images at all

    def __init__(self, attack: PGD, beta: float = 6.0) -> None:
        super().__init__()
        self.attack, self.beta = attack, beta

    def start(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Where the attack begins: the only random part."""
        return self.attack.draw(images, generator)

    def climb(self, twin: nn.Module, points: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (batch, ...) against the twin, in eval mode. Draws nothing: a graph can hold it."""
        return self.attack.climb(twin, points, images, labels)

    def loss(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> HostLoss:
        """The loss of the network that `forward` runs in train mode; every call runs it anew."""
        raise NotImplementedError

    def closure(self, forward: Forward, images: Tensor, adversarial: Tensor, labels: Tensor) -> Callable[[], HostLoss]:
        """`loss` of this batch, to be called at the weights as they then are (AWP calls it twice)."""
        return lambda: self.loss(forward, images, adversarial, labels)
