"""The task model M: encoder F, classifier C and projection head P (normalised), with input scaling inside."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pden.models.scaling import to_unit


class TaskOutput(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: ``(batch, classes)``; ``(batch, classes, height, width)`` for segmentation.
        embeddings: normalised, ``(batch, embedding)``.
        features: of the encoder, pooled, ``(batch, width)``.
    """

    logits: Tensor
    embeddings: Tensor
    features: Tensor


class TaskModel(nn.Module):
    """A classifier with a projection head for contrast.

    Args:
        encoder: images in [-1, 1] to features ``(batch, width)``; for segmentation maps
            ``(batch, width, rows, columns)``.
        width: of the features.
        classes: of the labels.
        embedding: size of the projection.
        dense: whether there is a label for each pixel.
    """

    def __init__(
        self, encoder: nn.Module, width: int, classes: int, *, embedding: int = 128, dense: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.dense, self.classes = encoder, dense, classes
        self.classifier: nn.Module = nn.Conv2d(width, classes, 1) if dense else nn.Linear(width, classes)
        self.projection = nn.Linear(width, embedding)

    def full(self, images: Tensor) -> TaskOutput:
        """Logits, embeddings and features of images in [0, 1], ``(batch, channels, height, width)``, in one pass."""
        features = self.encoder(to_unit(images))
        pooled = features.mean(dim=(2, 3)) if self.dense else features
        logits = self.classifier(features)
        if self.dense:
            logits = F.interpolate(logits.float(), images.shape[-2:], mode="bilinear", align_corners=False)
        return TaskOutput(logits, F.normalize(self.projection(pooled).float(), dim=1), pooled)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images in [0, 1]."""
        return self.full(images).logits
