"""ADA (Volpi et al., 2018): worst-case copies of the source, near in feature space, join the training pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.erm import Erm
from pden.models import TaskModel

_CHUNK = 256
_BATCH = 32  # the published loss is the mean over so many images, which divides each image's step


class Ada(Erm):
    """Early in training, while the loss still has a slope, the pool grows by an adversarial copy of each of its images:
    step, distance and doubling are those of the code published with ME-ADA.

    Args:
        growth: steps before which it does so; after 100, 200 and 300 steps by default.
        steps: of gradient ascent on the pixels.
        lr: of those, on pixels in [0, 1] and the mean loss of batches of 32.
        gamma: weight of the mean squared distance to the image's own features.
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
        return torch.cat([self.worst(model, part.float(), answer).half() for part, answer in parts])

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
            moved = moved.detach() + self.lr / _BATCH * gradient
        return moved.clamp(0, 1)


def entropy(logits: Tensor) -> Tensor:
    """Of the predictions, in nats, ``(batch,)``."""
    logs = logits.float().log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)
