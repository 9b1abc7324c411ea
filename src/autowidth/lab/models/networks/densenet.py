"""DenseNet without bottleneck and without compression, for CIFAR."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from autowidth.lab.models.parts import Head, initialise, scaled
from autowidth.lab.models.registry import model


def norm_conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Norm, ReLU, convolution without bias: the order of DenseNet. The children are named norm, act, conv."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict[str, nn.Module](norm=nn.BatchNorm2d(inputs), act=nn.ReLU(), conv=conv))


class DenseLayer(nn.Module):
    """Appends `growth` channels: (N, inputs, H, W) -> (N, inputs + growth, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = norm_conv(inputs, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


class DenseNet(nn.Module):
    """DenseNet without bottleneck and without compression (Huang et al. 2017), three stages of equal depth.

    At depth 40 and growth 12 it has 282.92 M MACs and 1.06 M parameters, 1.04 M of them in weights. The stem has twice
    the growth, as in the implementations that pruning papers measure (283 M, 1.04 M), where the paper has 16 channels.
    (N, in_channels, H, W) -> (N, num_classes), H and W at least 4. Raises ValueError for a depth that is not 3n+4.
    """

    def __init__(
        self,
        depth: int = 40,
        *,
        growth: int = 12,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f"a DenseNet of three stages has a depth of 3n+4 (7, 10, ..., 40, ...), got {depth}")
        inputs, step = scaled(2 * growth, width), scaled(growth, width)
        self.stem = nn.Conv2d(in_channels, inputs, 3, padding=1, bias=False)
        stages = []
        for index in range(3):
            layers: list[nn.Module] = []
            if index:
                layers.append(nn.Sequential(norm_conv(inputs, inputs, 1), nn.AvgPool2d(2)))
            for _ in range((depth - 4) // 3):
                layers.append(DenseLayer(inputs, step))
                inputs += step
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.head = Head(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.stages(self.stem(x))))
        return out


@model("densenet22", smallest=4)
def densenet22(*, num_classes: int, in_channels: int, width: float) -> DenseNet:
    """Three stages of six layers."""
    return DenseNet(22, num_classes=num_classes, in_channels=in_channels, width=width)


@model("densenet40", smallest=4)
def densenet40(*, num_classes: int, in_channels: int, width: float) -> DenseNet:
    """Three stages of twelve layers."""
    return DenseNet(40, num_classes=num_classes, in_channels=in_channels, width=width)
