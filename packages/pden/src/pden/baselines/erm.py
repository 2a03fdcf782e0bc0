"""ERM: cross-entropy on the source, nothing else. The other baselines differ from it in one to three methods."""

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

    def views(self, images: Tensor, stream: Stream) -> Tensor:
        """What the model is shown of a batch; without gradients.

        Args:
            images: of the pool, in [0, 1], ``(batch, channels, height, width)``.
            stream: for all random choices.

        Returns:
            images of the same kind, of one view after the other, ``(views * batch, channels, height, width)``.
        """
        return images

    def loss(self, model: TaskModel, views: Tensor, labels: Tensor) -> Tensor:
        """What a step minimises; no random choice is left here, so that it can be recorded as a CUDA graph.

        Args:
            views: as :meth:`views` gives them.
            labels: of one view, ``(batch,)``, or ``(batch, height, width)``.
        """
        return safety_loss(model(views), labels)

    def grow(self, model: TaskModel, images: Tensor, labels: Tensor) -> Tensor:
        """Images that join the pool with these labels; called before each of the steps in `growth`.

        Args:
            images: the whole pool, fp16 in [0, 1], ``(count, channels, height, width)``.

        Returns:
            images of the same kind.
        """
        raise NotImplementedError
