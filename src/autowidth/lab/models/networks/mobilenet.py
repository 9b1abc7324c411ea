"""MobileNetV2 for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from autowidth.lab.models.parts import Head, conv_norm, initialise, scaled
from autowidth.lab.models.registry import model

INVERTED = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, width, blocks, stride of each stage: Sandler et al. 2018, table 2, with stride 1 in the stage of 24."""


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 without activation; the input is added in all but the first of a stage."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int, adds_input: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        parts = OrderedDict[str, nn.Module]()
        if expansion > 1:
            parts["expand"] = conv_norm(inputs, hidden, 1, activation=nn.ReLU6)
        parts["depthwise"] = conv_norm(hidden, hidden, 3, stride=stride, groups=hidden, activation=nn.ReLU6)
        parts["project"] = conv_norm(hidden, outputs, 1)
        self.body = nn.Sequential(parts)
        self.adds_input = adds_input

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.adds_input else out


@model("mobilenetv2", smallest=8)
class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) for CIFAR: stride 1 in the stem and in the stage of 24 channels.

    Shortcuts in all but the first block of a stage, as in the paper: 87.98 M MACs and 2.24 M parameters. The
    implementation of 94 M and 2.30 M in the literature adds 1x1 projections where only the width changes.
    Unlike the paper's, the width factor scales the last convolution of 1280 too.
    (N, in_channels, H, W) -> (N, num_classes), H and W at least 8.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(32, width)
        self.stem = conv_norm(in_channels, inputs, 3, activation=nn.ReLU6)
        stages = []
        for expansion, channels, blocks, stride in INVERTED:
            layers, outputs = [], scaled(channels, width)
            for index in range(blocks):
                # Not `inputs == outputs`: which blocks have a shortcut must not depend on the width factor.
                block = partial(InvertedResidual, expansion=expansion, adds_input=index > 0)
                layers.append(block(inputs, outputs, stride=1 if index else stride))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        last = scaled(1280, width)
        self.last = conv_norm(inputs, last, 1, activation=nn.ReLU6)
        self.head = Head(last, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.last(self.stages(self.stem(x))))
        return out
