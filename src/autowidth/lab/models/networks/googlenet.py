"""GoogLeNet for CIFAR: inception blocks with norms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from autowidth.lab.models.parts import Head, conv_norm, initialise, scaled
from autowidth.lab.models.registry import model


@dataclass(frozen=True, slots=True)
class Inception:
    """Widths of an inception block: 1x1; 1x1 before 3x3, 3x3; 1x1 before 5x5, 5x5; 1x1 after pooling."""

    one: int
    before_three: int
    three: int
    before_five: int
    five: int
    pooled: int

    def scaled(self, width: float) -> Inception:
        """These widths times the factor."""
        return Inception(
            scaled(self.one, width),
            scaled(self.before_three, width),
            scaled(self.three, width),
            scaled(self.before_five, width),
            scaled(self.five, width),
            scaled(self.pooled, width),
        )

    @property
    def outputs(self) -> int:
        return self.one + self.three + self.five + self.pooled


INCEPTIONS = (
    (Inception(64, 96, 128, 16, 32, 32), Inception(128, 128, 192, 32, 96, 64)),
    (
        Inception(192, 96, 208, 16, 48, 64),
        Inception(160, 112, 224, 24, 64, 64),
        Inception(128, 128, 256, 24, 64, 64),
        Inception(112, 144, 288, 32, 64, 64),
        Inception(256, 160, 320, 32, 128, 128),
    ),
    (Inception(256, 160, 320, 32, 128, 128), Inception(384, 192, 384, 48, 128, 128)),
)
"""Szegedy et al. 2015, table 1, stages 3, 4 and 5."""


class InceptionBlock(nn.Module):
    """Four branches side by side, concatenated: (N, inputs, H, W) -> (N, widths.outputs, H, W)."""

    def __init__(self, inputs: int, widths: Inception) -> None:
        super().__init__()
        w, conv = widths, partial(conv_norm, activation=nn.ReLU)
        self.one = conv(inputs, w.one, 1)
        self.three = nn.Sequential(conv(inputs, w.before_three, 1), conv(w.before_three, w.three, 3))
        # The 5x5 window as two of 3x3, as in the networks for CIFAR.
        self.five = nn.Sequential(
            conv(inputs, w.before_five, 1), conv(w.before_five, w.five, 3), conv(w.five, w.five, 3)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(inputs, w.pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


@model("googlenet", smallest=4)
class GoogLeNet(nn.Module):
    """GoogLeNet for CIFAR: a 3x3 stem of 192 channels, the inception blocks of the paper, no side classifiers.

    It has 1.52 G MACs and 6.16 M parameters.
    (N, in_channels, H, W) -> (N, num_classes), H and W at least 4.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(192, width)
        self.stem = conv_norm(in_channels, inputs, 3, activation=nn.ReLU)
        stages = []
        for index, plan in enumerate(INCEPTIONS):
            layers: list[nn.Module] = [nn.MaxPool2d(3, stride=2, padding=1)] if index else []
            for widths in (w.scaled(width) for w in plan):
                layers.append(InceptionBlock(inputs, widths))
                inputs = widths.outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = Head(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(x)))
        return out
