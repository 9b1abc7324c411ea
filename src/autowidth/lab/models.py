"""Networks of the laboratory: CIFAR ResNet, VGG, DenseNet, GoogLeNet, MobileNetV2, each with a width factor.

MACs in this file are those of convolutions and linear layers at 3 x 32 x 32 with 10 classes. Figures in the literature
often count normalisations, activations and additions as well; where ours differ from a published one, the docstring
of the network says by what.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Shortcut = Literal["projection", "padding"]
"""How a ResNet shortcut gets more channels: a strided 1x1 convolution with a norm (option B of He et al. 2016), or
strided slicing and channels of zeros (option A)."""


class UnknownModelError(ValueError):
    """A text that names no network, neither a built-in one nor an importable one."""


# --- parts ----------------------------------------------------------------------------------------------------------


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


# --- ResNet ---------------------------------------------------------------------------------------------------------


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


# --- VGG ------------------------------------------------------------------------------------------------------------

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


# --- DenseNet -------------------------------------------------------------------------------------------------------


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


# --- GoogLeNet ------------------------------------------------------------------------------------------------------


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


# --- MobileNetV2 ----------------------------------------------------------------------------------------------------

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


# --- names ----------------------------------------------------------------------------------------------------------


class Builder(Protocol):
    """What makes a network of these sizes."""

    def __call__(self, *, num_classes: int, in_channels: int, width: float) -> nn.Module: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A built-in network: how it is made, the input it was published for (C, H, W), the least H and W that it takes."""

    builder: Builder
    smallest: int
    input_shape: tuple[int, int, int] = (3, 32, 32)


def _resnet_spec(depth: int, shortcut: Shortcut) -> ModelSpec:
    return ModelSpec(builder=partial(ResNet, depth, shortcut=shortcut), smallest=4)


MODELS: Mapping[str, ModelSpec] = {
    **{f"resnet{depth}": _resnet_spec(depth, "projection") for depth in (20, 32, 56, 110)},
    **{f"resnet{depth}-padding": _resnet_spec(depth, "padding") for depth in (20, 32, 56, 110)},
    "vgg8": ModelSpec(builder=partial(VGG, VGG8), smallest=8),
    "vgg16": ModelSpec(builder=partial(VGG, VGG16), smallest=16),
    "densenet22": ModelSpec(builder=partial(DenseNet, 22), smallest=4),
    "densenet40": ModelSpec(builder=partial(DenseNet, 40), smallest=4),
    "googlenet": ModelSpec(builder=GoogLeNet, smallest=4),
    "mobilenetv2": ModelSpec(builder=MobileNetV2, smallest=8),
}
"""The built-in networks by name. `spec` knows the ResNets of all other depths 6n+2 too."""


def spec(name: str) -> ModelSpec:
    """The built-in network of this name. Raises UnknownModelError with close names."""
    if name in MODELS:
        return MODELS[name]
    if match := re.fullmatch(r"resnet(\d+)(-padding)?", name):
        depth = int(match[1])
        if depth < 8 or (depth - 2) % 6:
            near = f"resnet{max(8, 6 * round((depth - 2) / 6) + 2)}{match[2] or ''}"
            raise UnknownModelError(f"no model is named {name!r}: ResNets here have a depth of 6n+2, nearest is {near}")
        return _resnet_spec(depth, "padding" if match[2] else "projection")
    raise UnknownModelError(
        f"no model is named {name!r}; {_near(name, MODELS)}; any resnetN with N = 6n+2 and module:callable will do too"
    )


def build(name: str, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """A built-in network with fresh weights from the global generator. Raises UnknownModelError with close names."""
    return spec(name).builder(num_classes=num_classes, in_channels=in_channels, width=width)


def resolve(text: str, *, num_classes: int | None = None, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """The network that `text` names: a built-in name, or `module:callable`, which is imported and called.

    The callable gets those of the keywords num_classes, in_channels and width that its signature takes; where it takes
    any keyword and hands them on, those that are not refused further down. Without num_classes a built-in network has
    ten classes, and a callable its own number, or ten if it has none.
    Raises UnknownModelError where the text leads nowhere, TypeError where it leads to something that is no module,
    and ValueError for a width factor that the callable does not take.
    """
    if ":" not in text:
        return build(text, num_classes=num_classes or 10, in_channels=in_channels, width=width)
    maker = _import(text)
    if not callable(maker) or isinstance(maker, nn.Module):
        raise TypeError(f"{text} is {_a(maker)}, expected a class or function that returns an nn.Module")
    offered: dict[str, object] = {"num_classes": num_classes or 10, "in_channels": in_channels, "width": width}
    if num_classes is None and not _requires(maker, "num_classes"):
        del offered["num_classes"]
    taken = _accepted(maker, offered)
    if width != 1.0 and "width" not in taken:
        raise ValueError(f"{text} takes no keyword 'width', so the width factor {width} cannot be given to it; use 1.0")
    model = _made(maker, taken)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{text} returned {_a(model)}, expected an nn.Module")
    return model


def _import(text: str) -> object:
    """What `module:name` names; the name may be dotted."""
    module_name, _, path = text.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", text):
        raise UnknownModelError(f"cannot import a model from {text!r}: the form is module:callable")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, something that it imports does not
        raise UnknownModelError(
            f"cannot import {text!r}: no module is named {error.name!r} on the Python path"
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise UnknownModelError(f"{text!r} names no callable: there is no {name!r}; {_near(name, vars(found))}")
        found = getattr(found, name)
    return found


def _accepted(maker: Callable[..., object], offered: Mapping[str, object]) -> dict[str, object]:
    """Those of the keywords that the callable's signature takes."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except ValueError:
        raise TypeError(
            f"{maker!r} has no readable signature, expected a class or function written in Python"
        ) from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(offered)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name for p in parameters if p.kind in by_keyword}
    return {name: value for name, value in offered.items() if name in names}


def _requires(maker: Callable[..., object], name: str) -> bool:
    """Whether the callable cannot be called without this keyword."""
    try:
        parameter = inspect.signature(maker).parameters.get(name)
    except ValueError:
        return False  # what that means is said where the signature is needed
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _made(maker: Callable[..., object], keywords: dict[str, object]) -> object:
    """What the callable returns, without the keyword that it, or what it calls, says it does not know."""
    try:
        return maker(**keywords)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in keywords or ("width" in keywords and keywords["width"] != 1.0):
            raise
        return _made(maker, {name: value for name, value in keywords.items() if name != unknown[1]})


def _near(name: str, known: Mapping[str, object]) -> str:
    """'close names: ...', or the first twenty where none is close."""
    public = [k for k in known if not k.startswith("_")]
    if close := difflib.get_close_matches(name, public, n=3):
        return f"close names: {', '.join(close)}"
    more = ", ..." if len(public) > 20 else ""
    return f"known names: {', '.join(public[:20]) or 'none'}{more}"


def _a(thing: object) -> str:
    kind = type(thing).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
