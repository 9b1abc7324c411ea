"""ResNets for CIFAR, with projections or padding as shortcuts."""

from __future__ import annotations

import re
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import pad

from autowidth.lab.models.parts import Head, conv_norm, initialise, scaled
from autowidth.lab.models.registry import ModelSpec, UnknownModelError, family, model

Shortcut = Literal["projection", "padding"]
"""How a ResNet shortcut gets more channels: a strided 1x1 convolution with a norm (option B of He et al. 2016), or
strided slicing and channels of zeros (option A)."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, 3, stride=stride, activation=nn.ReLU)
        self.second = conv_norm(outputs, outputs, 3)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        main = self.second(self.first(x))
        side = self.shortcut(x, main) if isinstance(self.shortcut, PaddingShortcut) else self.shortcut(x)
        out: Tensor = self.act(main + side)
        return out


class PaddingShortcut(nn.Module):
    """Every `stride`-th pixel, and channels of zeros behind the last one, as many as the main branch has more."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, main: Tensor) -> Tensor:
        # Both counts are read from the live tensors, so the shortcut follows every resize of the two streams.
        missing = main.shape[1] - x.shape[1]
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, missing))


def _shortcut(inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if shortcut == "padding":
        return PaddingShortcut(stride)
    return conv_norm(inputs, outputs, 1, stride=stride)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n+2 with widths 16, 32, 64 (He et al. 2016, section 4.2).

    ResNet-56 has 125.49 M MACs and 853,018 parameters with padding shortcuts, as published (125.49 M, 0.85 M), and
    125.75 M and 855,770 with projections. Published figures of 126.6 M and 127.1 M add norms and other elementwise
    work to these.
    (N, in_channels, H, W) -> (N, num_classes), H and W at least 4. Raises ValueError for another depth.
    """

    def __init__(
        self,
        depth: int,
        *,
        shortcut: Shortcut = "projection",
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has a depth of 6n+2 (8, 14, 20, 26, 32, ...), got {depth}")
        channels = [scaled(c, width) for c in (16, 32, 64)]
        self.stem = conv_norm(in_channels, channels[0], 3, activation=nn.ReLU)
        inputs = channels[0]
        stages: list[nn.Module] = []
        for outputs in channels:
            blocks = []
            for index in range((depth - 2) // 6):
                stride = 2 if stages and index == 0 else 1
                blocks.append(BasicBlock(inputs, outputs, stride=stride, shortcut=shortcut))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = Head(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(x)))
        return out


for _depth in (20, 32, 56, 110):
    model(f"resnet{_depth}", smallest=4)(partial(ResNet, _depth, shortcut="projection"))
for _depth in (20, 32, 56, 110):
    model(f"resnet{_depth}-padding", smallest=4)(partial(ResNet, _depth, shortcut="padding"))


@family("any resnetN with N = 6n+2")
def _of_any_depth(name: str) -> ModelSpec | None:
    """A ResNet that is named by its depth. Raises UnknownModelError with the nearest depth for one that is not 6n+2."""
    match = re.fullmatch(r"resnet(\d+)(-padding)?", name)
    if match is None:
        return None
    depth = int(match[1])
    if depth < 8 or (depth - 2) % 6:
        near = f"resnet{max(8, 6 * round((depth - 2) / 6) + 2)}{match[2] or ''}"
        raise UnknownModelError(f"no model is named {name!r}: ResNets here have a depth of 6n+2, nearest is {near}")
    shortcut: Shortcut = "padding" if match[2] else "projection"
    return ModelSpec(builder=partial(ResNet, depth, shortcut=shortcut), smallest=4)
