"""AugMix with its Jensen-Shannon consistency (Hendrycks et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from pden.baselines.erm import Erm
from pden.baselines.operations import AUGMIX, dirichlet, random_operation
from pden.losses import jensen_shannon, safety_loss
from pden.models import TaskModel
from pden.training.stream import Stream


class AugMix(Erm):
    """Args:
    chains: of operations that are mixed with Dirichlet(1) weights.
    depth: longest chain.
    magnitude: of the operations, 0 to 1; 0.3 is severity 3 of 10.
    weight: of the consistency.
    """

    def __init__(self, chains: int = 3, depth: int = 3, magnitude: float = 0.3, weight: float = 12.0) -> None:
        self.chains, self.depth, self.magnitude, self.weight = chains, depth, magnitude, weight

    def mixed(self, images: Tensor, views: int, stream: Stream) -> Tensor:
        """AugMix views of a batch, ``(views, batch, channels, height, width)``; all chains run side by side."""
        rng, count, chains = stream.torch, len(images), views * self.chains
        changed = images.repeat(chains, 1, 1, 1)
        lengths = torch.randint(1, self.depth + 1, (len(changed), 1, 1, 1), generator=rng, device=images.device)
        for step in range(self.depth):
            changed = torch.where(lengths > step, random_operation(changed, self.magnitude, rng, AUGMIX), changed)
        weights = dirichlet(views * count, self.chains, rng, images.device).T.reshape(
            self.chains, views, count, 1, 1, 1
        )
        total = (weights * torch.unflatten(changed, 0, (self.chains, views, count))).sum(dim=0)
        share = torch.rand(views, count, 1, 1, 1, generator=rng, device=images.device)  # Beta(1, 1)
        return share * images + (1 - share) * total

    def views(self, images: Tensor, stream: Stream) -> Tensor:
        return torch.cat([images[None], self.mixed(images, 2, stream)]).flatten(0, 1)

    def loss(self, model: TaskModel, views: Tensor, labels: Tensor) -> Tensor:
        logits = model(views).float().unflatten(0, (3, -1))
        return safety_loss(logits[0], labels) + self.weight * jensen_shannon(logits)
