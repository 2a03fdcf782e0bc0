"""RandConv (Xu et al., 2021): a random convolution as texture, mixed with the image, and consistent predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pden.baselines.erm import Erm
from pden.losses import jensen_shannon, safety_loss
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
        return convolved(images, *self._draw(images.shape[1], stream))

    def draw(self, count: int, channels: int, share: float, stream: Stream) -> tuple[Tensor, Tensor]:
        """What :func:`convolved` takes, for so many views of which a share is convolved.

        Returns:
            kernels ``(count, channels, channels, side, side)``, smaller ones within zeros, and the shares of itself
            that each view keeps, ``(count,)``.
        """
        side = max(self.kernels)
        kernels = torch.zeros(count, channels, channels, side, side, device=stream.device)
        keep = torch.ones(count)
        for place in range(count):
            if stream.host.random() < share:
                weight, keep[place] = self._draw(channels, stream)
                kernels[place] = F.pad(weight, [(side - weight.shape[-1]) // 2] * 4)
        return kernels, keep.to(stream.device)

    def _draw(self, channels: int, stream: Stream) -> tuple[Tensor, float]:
        """A kernel and a share."""
        size = stream.host.choice(self.kernels)
        shape = (channels, channels, size, size)
        weight = torch.randn(shape, generator=stream.torch, device=stream.device) / (channels * size * size) ** 0.5
        return weight, stream.host.random()

    def views(self, images: Tensor, stream: Stream) -> Tensor:
        return torch.cat([self.convolved(images, stream) for _ in range(self.count)])

    def loss(self, model: TaskModel, views: Tensor, labels: Tensor) -> Tensor:
        logits = model(views).float().unflatten(0, (self.count, -1))
        return safety_loss(logits[0], labels) + self.weight * jensen_shannon(logits)


def convolved(images: Tensor, kernel: Tensor, keep: Tensor | float) -> Tensor:
    """Images in [0, 1] under a convolution (of their values in [-1, 1], reflected at the edge), mixed with a share of
    themselves. What it makes may leave [0, 1]."""
    centred = images * 2 - 1
    textured = F.conv2d(F.pad(centred, [kernel.shape[-1] // 2] * 4, mode="reflect"), kernel.to(images.dtype))
    return (keep * centred + (1 - keep) * textured + 1) / 2
