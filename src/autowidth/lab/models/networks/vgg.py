"""VGG with norms, for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autowidth.lab.models.parts import Head, conv_norm, initialise, scaled
from autowidth.lab.models.registry import model

VGG8 = ((32, 32), (64, 64), (128, 128), (128, 128))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """3x3 convolutions with norms, 2x2 max pooling between stages, global average pooling, one linear classifier.

    `plan` holds the widths, stage by stage. With `VGG16` (Simonyan and Zisserman 2015, configuration D, with norms and
    for CIFAR) it has 313.20 M MACs and 14.72 M parameters: the variant whose classifier is a single linear layer. The
    variant of 313.7 M and 14.98 M in the literature has a hidden linear layer of 512 as well, and counts
    one operation for each output of a norm.
    (N, in_channels, H, W) -> (N, num_classes), H and W at least 2 ** (stages - 1).
    """

    def __init__(
        self,
        plan: Sequence[Sequence[int]],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        stages, inputs = [], in_channels
        for index, widths in enumerate(plan):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for outputs in (scaled(c, width) for c in widths):
                layers.append(conv_norm(inputs, outputs, 3, activation=nn.ReLU))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = Head(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(x))
        return out


@model("vgg8", smallest=8)
def vgg8(*, num_classes: int, in_channels: int, width: float) -> VGG:
    """Eight convolutions in four stages."""
    return VGG(VGG8, num_classes=num_classes, in_channels=in_channels, width=width)


@model("vgg16", smallest=16)
def vgg16(*, num_classes: int, in_channels: int, width: float) -> VGG:
    """Thirteen convolutions in five stages."""
    return VGG(VGG16, num_classes=num_classes, in_channels=in_channels, width=width)
