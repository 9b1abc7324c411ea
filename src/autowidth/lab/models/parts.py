"""Parts that several networks share: scaled widths, a convolution with its norm, a head, fresh weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn


def scaled(channels: int, width: float) -> int:
    """`channels` times the width factor, rounded, at least 1. Raises ValueError for a factor that is not positive."""
    if not width > 0:
        raise ValueError(f"the width factor must be positive, got {width}")
    return max(1, round(channels * width))


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """A convolution without bias that keeps the map's extent (up to the stride), its norm, and an activation if given.

    The children are named conv, norm, act.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    parts = OrderedDict[str, nn.Module](conv=conv, norm=nn.BatchNorm2d(outputs))
    if activation is not None:
        parts["act"] = activation()
    return nn.Sequential(parts)


def initialise(model: nn.Module) -> None:
    """Draws all weights from the global generator: normal with variance 2 / fan-in before a ReLU (He et al. 2015,
    eq. 10) and 1 / fan-in in linear layers; norms start at weight one and bias zero, other biases at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Head(nn.Sequential):
    """Global average pooling and one linear layer: (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__(
            OrderedDict[str, nn.Module](
                pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), linear=nn.Linear(inputs, num_classes)
            )
        )
