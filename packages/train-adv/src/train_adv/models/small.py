"""A small network for small images: what the embedded digits need, trained in seconds on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from train_adv.models.resnet import average_pool, classified, conv3x3


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, the last two at half the size, and a linear layer."""

    def __init__(self, classes: int = 10, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv3x3(channels, width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv3x3(width, 2 * width, 2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            conv3x3(2 * width, 4 * width, 2),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        )
        self.linear = nn.Linear(4 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (batch, 4 * width) of normalised images."""
        return average_pool(self.trunk(x))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of pooled features."""
        return classified(self.linear, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))
