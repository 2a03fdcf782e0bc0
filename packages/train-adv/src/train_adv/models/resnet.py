"""ResNet-18 (He et al. 2016a) and PreActResNet-18 (He et al. 2016b) in their CIFAR form: 3x3 stem, no max-pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def average_pool(x: Tensor) -> Tensor:
    """Mean over space, (batch, channels, height, width) -> (batch, channels), in fp32 whatever the model runs in."""
    return torch.flatten(F.adaptive_avg_pool2d(x.float(), 1), 1)


def classified(linear: nn.Linear, features: Tensor) -> Tensor:
    """Logits of pooled features in the weights' own precision, under autocast too: bf16 has 8 bits for all of them."""
    with torch.autocast(features.device.type, enabled=False):
        logits: Tensor = linear(features.to(linear.weight.dtype))
    return logits


class BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm, plus the shortcut, then relu."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class PreActBlock(nn.Module):
    """norm-relu-conv-norm-relu-conv, plus the shortcut, which starts after the first relu where it projects."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(ready)
        out = self.conv1(ready)
        out = self.conv2(F.relu(self.bn2(out)))
        summed: Tensor = out + shortcut
        return summed


class ResNet(nn.Module):
    """Four stages of blocks at 64, 128, 256 and 512 channels, the last three at half the size each."""

    def __init__(
        self,
        block: type[BasicBlock] | type[PreActBlock],
        depths: Sequence[int] = (2, 2, 2, 2),
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__()
        preact = block is PreActBlock
        self.conv1 = conv3x3(channels, 64)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate(depths):
            outputs = 64 * 2**stage
            for index in range(depth):
                blocks.append(block(inputs, outputs, 2 if stage > 0 and index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs) if preact else nn.Identity()
        self.preact = preact
        self.linear = nn.Linear(inputs, classes)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (batch, 512) of normalised images."""
        x = self.conv1(x)
        if not self.preact:
            x = F.relu(self.bn1(x))
        x = self.blocks(x)
        if self.preact:
            x = F.relu(self.norm(x))
        return average_pool(x)

    def classify(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of pooled features."""
        return classified(self.linear, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))
