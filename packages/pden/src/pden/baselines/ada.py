"""ADA (Volpi et al., 2018): worst-case copies of the source, near in feature space, join the training pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.erm import Erm
from pden.models import TaskModel

_CHUNK = 256


class Ada(Erm):
    """Early in training, while the loss still has a slope, the pool grows by adversarial copies of the source.

    Args:
        growth: steps before which it does so; after 100, 200 and 300 steps by default.
        steps: of gradient ascent on the pixels.
        lr: of those, per image, with pixels in [-1, 1].
        gamma: weight of the squared distance to the source's features.
        eta: weight of the predictions' entropy; ME-ADA sets it.
    """

    def __init__(
        self,
        growth: tuple[int, ...] = (100, 200, 300),
        steps: int = 15,
        lr: float = 1.0,
        gamma: float = 1.0,
        eta: float = 0.0,
    ) -> None:
        self.growth, self.steps, self.lr, self.gamma, self.eta = growth, steps, lr, gamma, eta

    def grow(self, model: TaskModel, images: Tensor, labels: Tensor) -> Tensor:
        model.eval()
        parts = zip(torch.split(images, _CHUNK), torch.split(labels, _CHUNK), strict=True)
        made = [self.worst(model, part.float() / 255, answer) for part, answer in parts]
        return torch.cat([(each * 255).round().to(torch.uint8) for each in made])

    def worst(self, model: TaskModel, images: Tensor, labels: Tensor) -> Tensor:
        """Images in [0, 1] moved up the loss; the model must be in eval mode."""
        with torch.no_grad():
            anchor = model.full(images).features.float()
        moved = images.clone()
        for _ in range(self.steps):
            moved.requires_grad_()
            seen = model.full(moved)
            loss = F.cross_entropy(seen.logits.float(), labels, reduction="sum")
            away = (seen.features.float() - anchor).square().flatten(1).mean(dim=1).sum()
            gain = loss - self.gamma * away + self.eta * entropy(seen.logits).sum()
            (gradient,) = torch.autograd.grad(gain, moved)
            # Pixels in [-1, 1] have half the gradient, and a step of theirs is half of one in [0, 1].
            moved = (moved.detach() + self.lr * gradient / 4).clamp(0, 1)
        return moved


def entropy(logits: Tensor) -> Tensor:
    """Of the predictions, in nats, ``(batch,)``."""
    logs = logits.float().log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)
