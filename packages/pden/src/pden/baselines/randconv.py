"""RandConv (Xu et al., 2021): a random convolution as texture, mixed with the image, and consistent predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.augmix import jensen_shannon
from pden.baselines.erm import Erm
from pden.losses import safety_loss
from pden.models import TaskModel
from pden.training.stream import Stream


class RandConv(Erm):
    """The mixing form with multi-scale kernels.

    Args:
        kernels: sizes, one of which is drawn for each view of a batch.
        count: of views, with random convolutions of their own.
        weight: of the consistency across views (Jensen-Shannon).
    """

    def __init__(self, kernels: tuple[int, ...] = (1, 3, 5, 7), count: int = 3, weight: float = 10.0) -> None:
        self.kernels, self.count, self.weight = kernels, count, weight

    def convolved(self, images: Tensor, stream: Stream) -> Tensor:
        """Images in [0, 1] after one random convolution, mixed with themselves by a uniform share."""
        size, channels = stream.host.choice(self.kernels), images.shape[1]
        shape = (channels, channels, size, size)
        weight = torch.randn(shape, generator=stream.torch, device=images.device) / (channels * size * size) ** 0.5
        centred = images * 2 - 1
        textured = F.conv2d(F.pad(centred, [size // 2] * 4, mode="reflect"), weight)
        share = stream.host.random()
        return (share * centred + (1 - share) * textured + 1) / 2

    def views(self, images: Tensor, stream: Stream) -> Tensor:
        return torch.cat([self.convolved(images, stream) for _ in range(self.count)])

    def loss(self, model: TaskModel, views: Tensor, labels: Tensor) -> Tensor:
        logits = model(views).float().unflatten(0, (self.count, -1))
        return safety_loss(logits[0], labels) + self.weight * jensen_shannon(logits)
