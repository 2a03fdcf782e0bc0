"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016): WRN-depth-width, pre-activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """BN-ReLU-conv twice with a shortcut; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = F.relu(self.norm1(maps))
        kept = maps if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(active))))  # type: ignore[no-any-return]


def wide_resnet_encoder(channels: int, depth: int = 16, factor: int = 4) -> tuple[nn.Module, int]:
    """The encoder and the width of its features; WRN-16-4 has 2.7 million weights.

    Args:
        channels: of the images.
        depth: 6 n + 4.
        factor: widths are 16, 32 and 64 times this.

    Raises:
        ValueError: a depth that is not 6 n + 4, or a factor below 1.
    """
    if depth < 10 or (depth - 4) % 6 or factor < 1:
        raise ValueError(f"wrn-{depth}-{factor}: the depth must be 10, 16, 22, ... and the factor at least 1")
    blocks, inputs = [], 16
    for stage, outputs in enumerate((16 * factor, 32 * factor, 64 * factor)):
        for place in range((depth - 4) // 6):
            blocks.append(Block(inputs, outputs, stride=2 if stage > 0 and place == 0 else 1))
            inputs = outputs
    encoder = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return encoder, inputs
