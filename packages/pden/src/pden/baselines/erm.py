"""ERM: cross-entropy on the source, nothing else. The other baselines differ from it in one or two methods."""

from __future__ import annotations

from torch import Tensor

from pden.losses import safety_loss
from pden.models import TaskModel
from pden.training.stream import Stream


class Erm:
    """A method that learns from the source by one loss per step."""

    def loss(self, model: TaskModel, images: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        """What a step minimises.

        Args:
            images: of the pool, in [0, 1], ``(batch, channels, height, width)``.
            stream: for all random choices.
        """
        return safety_loss(model(images), labels)

    def grow(
        self, model: TaskModel, images: Tensor, labels: Tensor, round: int, stream: Stream
    ) -> tuple[Tensor, Tensor] | None:
        """Images that join the pool at the start of a round, with their labels; None adds nothing.

        Args:
            images: all source images, uint8.
            round: from 1.
        """
        return None
