"""ERM: cross-entropy on the source, nothing else. The other baselines differ from it in one or two methods."""

from __future__ import annotations

from torch import Tensor

from pden.losses import safety_loss
from pden.models import TaskModel
from pden.training.stream import Stream


class Erm:
    """A method that learns from the source by one loss per step.

    Attributes:
        growth: steps of the run before which the training pool grows.
    """

    growth: tuple[int, ...] = ()

    def loss(self, model: TaskModel, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        """What a step minimises.

        Args:
            images: of the pool, in [0, 1], ``(batch, channels, height, width)``.
            stream: for all random choices.
        """
        return safety_loss(model(images), labels)

    def grow(self, model: TaskModel, images: Tensor, labels: Tensor) -> Tensor:
        """uint8 images that join the pool with these labels; called before each of the steps in `growth`.

        Args:
            images: all source images, uint8.
        """
        raise NotImplementedError
