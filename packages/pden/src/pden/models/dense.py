"""Encoders for segmentation: torchvision's ResNets with dilated last stages, as in FCN, and a small one for CPUs."""

from __future__ import annotations

import torchvision
from torch import Tensor, nn


class DilatedResNet(nn.Module):
    """A torchvision ResNet-50 whose maps are an eighth of the image, narrowed to 512 channels as FCN's head does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        backbone = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
        if channels != 3:
            backbone.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
        self.stages = nn.Sequential(backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.neck = nn.Sequential(nn.Conv2d(2048, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.neck(self.stages(self.stem(images)))
        return maps


def fcn_encoder(channels: int, width: float = 1.0) -> tuple[nn.Module, int]:
    """FCN on ResNet-50 (the network of the paper's SYNTHIA figures); `width` has no effect."""
    return DilatedResNet(channels), 512


def small_fcn_encoder(channels: int, width: float = 1.0) -> tuple[nn.Module, int]:
    """Six convolutions, an eighth of the resolution, a dilated last pair (ours, for CPUs and tests)."""
    first, second, third = (max(4, round(width * each)) for each in (32, 64, 128))

    def layer(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    layers = nn.Sequential(
        layer(channels, first, 2),
        layer(first, second, 2),
        layer(second, second),
        layer(second, third, 2),
        layer(third, third, dilation=2),
        layer(third, third, dilation=4),
    )
    return layers, third
