"""Wide residual networks (Zagoruyko & Komodakis 2016) of depth 6n + 4."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from train_adv.models.resnet import PreActBlock, average_pool, classified, conv3x3


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of pre-activation blocks at 16, 32 and 64 times `width` channels."""

    def __init__(self, depth: int, width: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6n + 4")
        self.conv1 = conv3x3(channels, 16)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * width * 2**stage
            for index in range((depth - 4) // 6):
                blocks.append(PreActBlock(inputs, outputs, 2 if stage > 0 and index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (batch, 64 * width) of normalised images."""
        x = F.relu(self.norm(self.blocks(self.conv1(x))))
        return average_pool(x)

    def classify(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of pooled features."""
        return classified(self.linear, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))
