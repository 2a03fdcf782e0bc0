"""The digits net of the literature (ADA, M-ADA, PDEN): two 5x5 convolutions and two layers of 1,024."""

from __future__ import annotations

from torch import Tensor, nn

from pden.layout import channels_last


class Layers(nn.Sequential):
    """Layers in a row, on maps in the layout that suits the device."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(channels_last(images))  # type: ignore[no-any-return, no-untyped-call]


def digits_encoder(channels: int, size: int, width: float = 1.0) -> tuple[nn.Module, int]:
    """The encoder and the width of its features.

    Args:
        channels: of the images.
        size: side of the images; 32 in the literature, at least 16.
        width: factor on all layers; 1 is conv 64, conv 128, FC 1024, FC 1024.
    """
    first, second, hidden = (max(4, round(width * each)) for each in (64, 128, 1024))
    side = ((size - 4) // 2 - 4) // 2
    layers = Layers(
        nn.Conv2d(channels, first, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),  # after the pooling: the same values and gradients, of a quarter as many numbers
        nn.Conv2d(first, second, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * side * side, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
    )
    return layers, hidden
