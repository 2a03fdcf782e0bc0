"""AugMix with its Jensen-Shannon consistency (Hendrycks et al., 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.erm import Erm
from pden.baselines.operations import dirichlet, random_operation
from pden.losses import safety_loss
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

    def mixed(self, images: Tensor, stream: Stream) -> Tensor:
        """One AugMix view of a batch."""
        rng, count = stream.torch, len(images)
        weights = dirichlet(count, self.chains, rng, images.device)
        total = torch.zeros_like(images)
        for chain in range(self.chains):
            lengths = torch.randint(1, self.depth + 1, (count, 1, 1, 1), generator=rng, device=images.device)
            changed = images
            for step in range(self.depth):
                changed = torch.where(lengths > step, random_operation(changed, self.magnitude, rng), changed)
            total = total + weights[:, chain, None, None, None] * changed
        share = torch.rand(count, 1, 1, 1, generator=rng, device=images.device)  # Beta(1, 1)
        return share * images + (1 - share) * total

    def loss(self, model: TaskModel, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        views = torch.cat([images, self.mixed(images, stream), self.mixed(images, stream)])
        logits = model(views).float().unflatten(0, (3, -1))
        return safety_loss(logits[0], labels) + self.weight * jensen_shannon(logits)


def jensen_shannon(logits: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of the views' predictions, ``(views, batch, classes, ...)``, in nats."""
    logs = logits.log_softmax(dim=2)
    middle = logs.exp().mean(dim=0).clamp(min=1e-7).log()
    per_class = F.kl_div(middle.expand_as(logs), logs, reduction="none", log_target=True)
    return per_class.sum(dim=2).mean()
