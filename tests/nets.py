"""Tiny nets with one hazard each, with example inputs and what is known about their channels by reading the code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def images(*shape: int) -> Callable[[], Inputs]:
    """A maker of one batch of this shape."""
    return lambda: torch.randn(*shape)


IMAGES = images(2, 3, 8, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A net and what a person reads in its code.

    groups: the channel groups that can be resized, with their widths.
    before: the same before rehearsal, where rehearsal freezes some of them.
    frozen: words that the reasons of the frozen axes hold, besides those of model inputs and outputs.
    mixes: why a resize changes the function even where nobody reads the channel; empty if it does not.
    unseen: why brute force does not see the coupling that the trace must find; empty if it does.
    unused: MACs of one sample that no parameter takes part in.
    elsewhere: why a resize changes MACs that the map does not hold; empty if it does not.
    valued: why a trace with values meets other ops than one without; empty if it does not.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] = IMAGES
    groups: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, int] | None = None
    frozen: tuple[str, ...] = ()
    mixes: str = ""
    unseen: str = ""
    unused: int = 0
    elsewhere: str = ""
    valued: str = ""


class Example(NamedTuple):
    """A net ready for use: its model in evaluation mode, inputs, and what is known about it."""

    model: nn.Module
    inputs: Inputs
    net: Net


NETS: dict[str, Net] = {}


def net(**known: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enters a module class in NETS under its own name."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        NETS[cls.__name__] = Net(make=cls, **known)
        return cls

    return register


def example(name: str, seed: int = 0) -> Example:
    """The net of this name with weights and inputs from the seed; the global random state is left alone.

    Norms get statistics, scales and shifts that differ from channel to channel.
    """
    found = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = found.make()
        settle(model)
        return Example(model.eval(), found.inputs(), found)


def settle(model: nn.Module) -> None:
    """Gives norms the look of a trained network, so that no two channels are alike."""
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if "norm" in type(module).__name__.lower() and tensor.dim() == 1:
                with torch.no_grad():
                    tensor.uniform_(0.5, 1.5) if name in ("weight", "running_var") else tensor.normal_(0, 0.3)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Calls the model with inputs as `trace` takes them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# ---- parts -----------------------------------------------------------------------------------------------------------


class Headed(nn.Module):
    """Ends in global average pooling and a linear layer of three classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 3)

    def head(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A 2-d convolution that keeps the map's extent."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


# ---- straight and branching nets -------------------------------------------------------------------------------------


@net(groups={"conv1": 4, "conv2": 5})
class Plain(Headed):
    """Convolutions with and without bias, norms, pooling, one linear layer."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.norm1 = conv(3, 4, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = conv(4, 5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        return self.head(F.avg_pool2d(F.relu(self.norm2(self.conv2(x))), 2))


@net(groups={"stem": 4, "conv1": 5, "conv2": 6})
class Projection(Headed):
    """A residual block whose shortcut is a convolution: two layers write the same stream."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 5), conv(5, 6)
        self.norm, self.shortcut = nn.BatchNorm2d(6), conv(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.norm(self.conv2(F.relu(self.conv1(x)))) + self.shortcut(x)))


@net(groups={"stem": 4, "conv1": 5})
class Identity(Headed):
    """A residual block with an identity shortcut: the block's last layer writes the stem's channels."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 5), conv(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.conv2(F.relu(self.conv1(x)))))


@net(
    groups={"stem": 4, "conv1": 5},
    frozen=("constant_pad_nd fills this channel",),
    unseen="the channels that the shortcut fills with zeros look free, but nobody can say which side a newcomer is on",
)
class Padding(Headed):
    """A residual block whose shortcut is subsampling and zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 5, stride=2), conv(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + self.conv2(F.relu(self.conv1(x))))


@net(groups={"left": 4, "right": 2, "last": 5})
class Concat(Headed):
    """Two layers share the input axis of a third."""

    def __init__(self) -> None:
        super().__init__(5)
        self.left, self.right, self.norm, self.last = conv(3, 4), conv(3, 2), nn.BatchNorm2d(6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))))


@net(groups={"left": 4, "right": 2})
class ConcatTwice(Headed):
    """The same tensor twice in a concatenation, with another one between."""

    def __init__(self) -> None:
        super().__init__(10)
        self.left, self.right = conv(3, 4), conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.left(x))
        return self.head(torch.cat([left, self.right(x), left], 1))


@net(groups={"conv1": 4, "conv2": 3})
class Dense(Headed):
    """Concatenations that nest: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__(10)
        self.conv1, self.conv2 = conv(3, 4), conv(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.conv1(x))], 1)
        return self.head(torch.cat([x, F.relu(self.conv2(x))], 1))


# ---- convolutions of all kinds ---------------------------------------------------------------------------------------


@net(groups={"conv1": 4, "conv2": 5})
class Depthwise(Headed):
    """One kernel per channel: the layer carries its input's channels."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.depthwise, self.conv2 = conv(3, 4), conv(4, 4, groups=4), conv(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu6(self.depthwise(F.relu(self.conv1(x))))))


@net(groups={"conv1": 4})
class DepthwiseMultiplier(Headed):
    """Three kernels per channel."""

    def __init__(self) -> None:
        super().__init__(12)
        self.conv1, self.depthwise, self.norm = conv(3, 4), conv(4, 12, groups=4), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.depthwise(self.conv1(x))))


@net(groups={"conv1": 3})
class Grouped(Headed):
    """Three conv groups of two inputs and three outputs: only a whole conv group can go."""

    def __init__(self) -> None:
        super().__init__(9)
        self.conv1, self.grouped = conv(3, 6), conv(6, 9, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.conv1(x)))))


@net(groups={"conv1": 4, "up": 5})
class Transposed(Headed):
    """A transposed convolution has its input axis first."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.up = conv(3, 4), nn.ConvTranspose2d(4, 5, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.conv1(x))))


@net(groups={"conv1": 2})
class TransposedGrouped(Headed):
    """Two conv groups of two inputs and three outputs, the input axis first."""

    def __init__(self) -> None:
        super().__init__(6)
        self.conv1, self.up = conv(3, 4), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.conv1(x))))


@net(groups={"conv1": 4}, inputs=images(2, 3, 12))
class OneD(nn.Module):
    """One spatial dim."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.fc = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.adaptive_avg_pool1d(F.relu(self.norm(F.max_pool1d(self.conv1(x), 2))), 1).flatten(1))
        return out


@net(groups={"conv1": 4}, inputs=images(2, 3, 4, 4, 4))
class ThreeD(nn.Module):
    """Three spatial dims."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.fc = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.norm(self.conv1(x))), 2)
        out: Tensor = self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))
        return out


# ---- channels on the move --------------------------------------------------------------------------------------------


@net(groups={"conv1": 4, "fc1": 5})
class Flatten(nn.Module):
    """Each channel becomes 16 neighbouring features of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc1, self.fc2 = conv(3, 4, stride=2), nn.Linear(64, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.fc1(F.relu(self.conv1(x)).flatten(1))))
        return out


@net(groups={"conv1": 4})
class FlattenPermuted(nn.Module):
    """Each channel becomes every fourth feature of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = conv(3, 4, stride=2), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.relu(self.conv1(x)).permute(0, 2, 3, 1).flatten(1))
        return out


@net(groups={"left": 4, "right": 2})
class FlattenConcat(nn.Module):
    """A concatenation, then a flattened map: both groups share the axis in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fc = conv(3, 4, stride=4), conv(3, 2, stride=4), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.cat([self.left(x), self.right(x)], 1).relu().flatten(1))
        return out


@net(
    before={"conv1": 6, "conv2": 4},
    groups={"conv2": 4},
    frozen=("removing a channel fails", "nets.py:"),
)
class Shuffle(Headed):
    """Channel shuffle: any channel can be followed, but an odd number of them cannot be shuffled."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.conv2 = conv(3, 6), conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        n, c, h, w = x.shape
        return self.head(self.conv2(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))


@net(groups={"conv1": 3})
class PixelShuffle(Headed):
    """Four written channels become four pixels of one read channel."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.shuffle = conv(3, 12), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.shuffle(self.conv1(x))))


@net(groups={"conv1": 4})
class Gated(Headed):
    """Halves of one layer that are multiplied: a channel is a pair."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1 = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.conv1(x).chunk(2, dim=1)
        return self.head(values * torch.sigmoid(gates))


@net(
    before={"conv1": 3, "conv1#2": 3, "left": 4, "right": 5},
    groups={"left": 4, "right": 5},
    frozen=("fails",),
)
class Halves(Headed):
    """Halves of one layer that go separate ways: they could be resized alike, which no group says."""

    def __init__(self) -> None:
        super().__init__(9)
        self.conv1, self.left, self.right = conv(3, 6), conv(3, 4), conv(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x).relu().chunk(2, dim=1)
        return self.head(torch.cat([self.left(a), self.right(b)], 1))


@net(before={"conv1": 4}, groups={}, frozen=("removing a channel fails", "nets.py:"))
class Constant(nn.Module):
    """A width baked into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = conv(3, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.adaptive_avg_pool2d(F.relu(self.conv1(x)), 2).view(-1, 4 * 2 * 2))
        return out


@net(
    before={"conv1": 2, "conv1#2": 4, "left": 3},
    groups={"conv1#2": 4, "left": 3},
    frozen=("inserting a channel fails", "nets.py:"),
)
class ConstantSplit(Headed):
    """A constant where two slices meet: what lies behind it can have any width, what lies before it cannot."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.left, self.right = conv(3, 6), conv(2, 3), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head(torch.cat([self.left(x[:, :2]).relu(), self.right(x[:, 2:]).relu()], 2))


# ---- norms and scales ------------------------------------------------------------------------------------------------


@net(groups={"conv1": 2, "conv2": 3})
class GroupNorm(Headed):
    """Two norm groups of three channels: only a whole norm group can go."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.norm, self.conv2 = conv(3, 6), nn.GroupNorm(2, 6), conv(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu(self.norm(self.conv1(x)))))


@net(groups={"conv1": 4}, mixes="the norm averages over all channels")
class GroupNormOne(Headed):
    """One norm group: channels are normalised together, but every one can go."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.norm = conv(3, 4), nn.GroupNorm(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv1(x))))


@net(groups={"conv1": 4})
class InstanceNorm(Headed):
    """Running statistics behind a reshape of the batch into the channels."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.norm = conv(3, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv1(x))))


@net(groups={"stem": 4, "fc1": 6}, mixes="the norm averages over all channels")
class ConvNext(Headed):
    """Depthwise, norm over channels last, two linear layers, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.depthwise, self.norm = conv(3, 4), conv(4, 4, groups=4), nn.LayerNorm(4)
        self.fc1, self.fc2, self.scale = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.head(x + (self.scale * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2))


@net(groups={"conv1": 4})
class Prelu(Headed):
    """A slope per channel."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.act = conv(3, 4), nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv1(x)))


@net(groups={"conv1": 4})
class Scale(Headed):
    """A bare parameter, one number per channel, and one number for all."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.scale, self.shift = conv(3, 4), nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.conv1(x) * self.scale + self.shift))


@net(groups={"conv1": 4, "conv2": 5})
class WeightNorm(Headed):
    """Weights that are computed from a direction and a magnitude per filter."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = weight_norm(conv(3, 4)), weight_norm(conv(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


@net(groups={"conv1": 4, "squeeze": 2, "conv2": 5})
class SqueezeExcite(Headed):
    """Channels that are scaled by what a bottleneck reads from all of them."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.squeeze, self.excite, self.conv2 = conv(3, 4), conv(4, 2, 1), conv(2, 4, 1), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(self.conv2(x * torch.sigmoid(gate)))


@net(
    groups={"conv1": 4, "conv2": 5},
    frozen=("no layer reads these channels",),
    mixes="the gate reads the mean over all channels",
    unseen="the map of the gate reaches every channel and is none of them",
)
class SpatialAttention(Headed):
    """One map that scales all channels: it is no channel of theirs."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.gate, self.conv2 = conv(3, 4), conv(2, 1), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(self.conv2(x * torch.sigmoid(self.gate(seen))))


# ---- ways to write a forward pass ------------------------------------------------------------------------------------


@net(groups={"stem": 4, "conv1": 5})
class SharedWeight(Headed):
    """One weight in two modules: both are one and the same layer."""

    def __init__(self) -> None:
        super().__init__(5)
        self.stem, self.conv1, self.conv2 = conv(3, 4), conv(4, 5), conv(4, 5)
        self.conv2.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.conv1(x)) * torch.tanh(self.conv2(x.flip(3))))


@net(groups={"stem": 4})
class CalledTwice(Headed):
    """A module that reads what it has written."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.body, self.norm = conv(3, 4), conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.norm(self.body(x)))
        return self.head(x)


@net(groups={"conv1": 4, "fc1": 5})
class Dropout(nn.Module):
    """Dropout of elements and of channels, differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.drop, self.fc1, self.fc2 = conv(3, 4), nn.Dropout2d(0.5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(F.adaptive_avg_pool2d(self.drop(self.conv1(x)), 1).flatten(1))
        out: Tensor = self.fc2(F.dropout(F.relu(x), 0.3, self.training))
        return out


@net(groups={"kernel": 4, "matrix": 5})
class Functional(nn.Module):
    """No layer modules at all."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3) / 5), nn.Parameter(torch.randn(4))
        self.matrix, self.last = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.conv2d(x, self.kernel, self.bias, padding=1)).mean((2, 3))
        return F.linear(F.linear(x, self.matrix).relu(), self.last)


@net(groups={"conv1": 4, "conv2": 5})
class Activations(Headed):
    """Elementwise functions that torch does not mark as such, and a gated linear unit in one op."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.logsigmoid(F.hardswish(F.threshold(self.conv1(x), 0.0, -1.0))).double().float()
        return self.head(F.glu(self.conv2(F.hardsigmoid(x)), dim=1))


@net(groups={"conv1": 4, "conv2": 5})
class InPlace(Headed):
    """Everything that can be written in place is."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.side, self.conv2, self.norm = conv(3, 4), conv(3, 4), conv(4, 5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y += self.side(x)
        y.mul_(0.5).relu_()
        return self.head(F.hardswish(self.norm(self.conv2(y)), inplace=True))


@net(
    groups={"last": 5},
    frozen=("writes channels into a view",),
    unseen="brute force sees that the slices are concatenated, the trace does not follow writes into views",
)
class WrittenSlices(Headed):
    """A concatenation by writing into slices of a tensor of constant width."""

    def __init__(self) -> None:
        super().__init__(5)
        self.left, self.right, self.last = conv(3, 2), conv(3, 4), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.size(0), 6, x.size(2), x.size(3))
        out[:, :2] = self.left(x)
        out[:, 2:] = self.right(x)
        return self.head(self.last(F.relu(out)))


@net(groups={"conv1": 4})
class ReturnsDict(Headed):
    """Outputs in a dict of tuples."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.conv2(F.relu(self.conv1(x)))
        return {"logits": self.head(features), "features": (features, None)}


@dataclass
class Outputs:
    """What `ReturnsDataclass` returns."""

    logits: Tensor
    features: Tensor


@net(groups={"conv1": 4})
class ReturnsDataclass(ReturnsDict):
    """Outputs in a dataclass."""

    def forward(self, x: Tensor) -> Outputs:  # type: ignore[override]
        features = self.conv2(F.relu(self.conv1(x)))
        return Outputs(self.head(features), features)


@net(
    groups={"stem": 4, "conv1": 5, "aux": 2},
    unseen="brute force looks at evaluation mode, where the side branch does not run",
)
class Auxiliary(Headed):
    """A side head in training only."""

    def __init__(self) -> None:
        super().__init__(5)
        self.stem, self.conv1, self.aux, self.side = conv(3, 4), conv(4, 5), conv(4, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        out = self.head(F.relu(self.conv1(x)))
        return (out, self.side(F.relu(self.aux(x)).mean((2, 3)))) if self.training else out


@net(groups={"conv1": 4, "conv2": 5})
class Branching(Headed):
    """Which layer runs depends on the values of the input: the example inputs never take the second way."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2, self.other = conv(3, 4), conv(4, 5), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.conv2 if x.abs().mean() < 100 else self.other
        return self.head(F.relu(layer(F.relu(self.conv1(x)))))


@net(
    groups={"conv1": 4, "other": 5, "last": 5},
    inputs=lambda: {"image": torch.randn(2, 3, 8, 8), "other": torch.randn(2, 2, 8, 8)},
)
class Keywords(Headed):
    """Two inputs by keyword."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.other, self.last = conv(3, 4), conv(2, 5), conv(9, 5)

    def forward(self, *, image: Tensor, other: Tensor) -> Tensor:
        return self.head(F.relu(self.last(torch.cat([self.conv1(image), self.other(other)], 1).relu())))


@net(
    groups={"stem": 4, "narrow": 1, "wide": 5},
    unseen="where there is one channel only, brute force cannot tell a channel from a kernel position",
)
class OneChannel(Headed):
    """A layer of one channel: it cannot shrink, but it can grow."""

    def __init__(self) -> None:
        super().__init__(5)
        self.stem, self.narrow, self.wide = conv(3, 4), conv(4, 1), conv(1, 5)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.wide(F.relu(self.norm(self.narrow(F.relu(self.stem(x))))))))


@net(groups={"conv1": 4, "conv2": 5})
class Pooled(Headed):
    """Pooling, upsampling, reflection: channels stay what they are."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.adaptive_max_pool2d(self.conv1(x), 4), scale_factor=2.0, mode="bilinear")
        x = F.avg_pool2d(self.conv2(F.pad(x, (1, 1, 1, 1), "reflect")), 2)
        return self.head(F.interpolate(x, scale_factor=2.0))


@net(groups={"conv1": 4, "conv2": 5})
class Blur(Headed):
    """A fixed blur, a buffer of one kernel that is expanded over all channels."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)
        self.register_buffer("kernel", torch.ones(4, 1, 2, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.relu(self.conv1(x)), self.get_buffer("kernel"), stride=2, groups=self.conv1.out_channels)
        return self.head(F.relu(self.conv2(x)))


# ---- what nobody should guess ----------------------------------------------------------------------------------------


@net(
    groups={"conv1": 4, "last": 5},
    frozen=("aten._fft", "has no rule", "nets.py:"),
    unseen="an op without a rule is frozen, whatever it does",
)
class Unknown(Headed):
    """A transform along the channels."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2, self.last = conv(3, 4), conv(4, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        return self.head(self.last(torch.fft.fft(x, dim=1).real))


@net(
    before={"conv1": 4, "value": 4, "last": 5},
    groups={"last": 5},
    frozen=("aten.bmm sums over channels of two activations", "a channel fails", "nets.py:"),
    unseen="brute force finds queries and keys",
    unused=2 * 64 * 64 * 4,
    elsewhere="products of activations are not in the map",
)
class Attention(Headed):
    """Products of activations: keys' channels are summed, values' are kept, `view_as` wants as many as there were."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.query, self.key, self.value = conv(3, 4), conv(4, 4, 1), conv(4, 4, 1), conv(4, 4, 1)
        self.last = conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, -1)
        return self.head(self.last((value @ weights.transpose(1, 2)).view_as(x)))


# ---- families: the part of each that is a hazard of its own ----------------------------------------------------------


@net(groups={"stem": 4, "conv1": 3})
class ResNext(Headed):
    """A bottleneck around a grouped convolution: between its 1 x 1 layers a channel is a conv group of two."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.conv1, self.norm = conv(3, 4), conv(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.conv3 = conv(6, 6, groups=3), conv(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.head(F.relu(x + self.conv3(y)))


@net(groups={"stem": 4, "flat": 3, "tall": 2, "wide": 3, "pooled": 2})
class Inception(Headed):
    """Branches of kernels that are no squares, and one that is pooled before."""

    def __init__(self) -> None:
        super().__init__(7)
        self.stem, self.flat, self.pooled = conv(3, 4), nn.Conv2d(4, 3, (1, 3), padding=(0, 1)), conv(4, 2, 1)
        self.tall, self.wide = nn.Conv2d(3, 2, (3, 1), padding=(1, 0)), nn.Conv2d(3, 3, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        flat = F.relu(self.flat(x))
        pooled = self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1))
        return self.head(torch.cat([self.tall(flat), self.wide(flat), pooled], 1).relu())


@net(groups={"squeeze": 2, "small": 3, "large": 4})
class Fire(nn.Module):
    """SqueezeNet: the last layer is a convolution, its classes are outputs; max pooling that rounds up."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.small, self.large, self.last = conv(3, 2, 1), conv(2, 3, 1), conv(2, 4), conv(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        x = torch.cat([F.relu(self.small(x), inplace=True), F.relu(self.large(x), inplace=True)], 1)
        x = self.last(F.max_pool2d(x, 3, stride=2, ceil_mode=True))
        return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


@net(groups={"stem": 4, "expand": 6, "squeeze": 2})
class MobileBlock(Headed):
    """Inverted residual with squeeze and excite, hard activations, and a branch that is dropped per sample."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.expand, self.depthwise = conv(3, 4), conv(4, 6, 1), conv(6, 6, groups=6)
        self.squeeze, self.excite, self.project = conv(6, 2, 1), conv(2, 6, 1), conv(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.hardswish(self.depthwise(F.hardswish(self.expand(x), inplace=True)), inplace=True)
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.project(y)
        if self.training:
            y = y * y.new_empty(y.size(0), 1, 1, 1).bernoulli_(0.8).div_(0.8)
        return self.head(x + y)


@net(
    before={"stem": 2, "stem#2": 2, "branch": 2, "last": 3},
    groups={"last": 3},
    frozen=("a channel fails", "nets.py:"),
)
class ShuffleUnit(Headed):
    """ShuffleNetV2: one half passes, one half is computed, both are shuffled: the halves must match for ever."""

    def __init__(self) -> None:
        super().__init__(3)
        self.stem, self.branch, self.last = conv(3, 4), conv(2, 2), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, dim=1)
        x = torch.cat([a, F.relu(self.branch(b))], 1)
        n, c, h, w = x.shape
        return self.head(self.last(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)).relu())


@net(groups={"enc1": 4, "enc2": 5, "up": 3, "dec": 4})
class UNet(nn.Module):
    """A skip around a transposed convolution; classes per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.up = conv(3, 4), conv(4, 5), nn.ConvTranspose2d(5, 3, 2, stride=2)
        self.dec, self.last = conv(7, 4), conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enc1(x))
        x = self.up(F.relu(self.enc2(F.max_pool2d(skip, 2))))
        out: Tensor = self.last(F.relu(self.dec(torch.cat([skip, x], 1))))
        return out


@net(groups={"enc1": 4, "enc2": 5, "dec": 4})
class UNetBilinear(nn.Module):
    """A skip around an upsampling, with the crop that odd extents need."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.dec, self.last = conv(3, 4), conv(4, 5), conv(9, 4), conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enc1(x))
        x = F.interpolate(F.relu(self.enc2(F.max_pool2d(skip, 2))), scale_factor=2, mode="bilinear", align_corners=True)
        rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        out: Tensor = self.last(F.relu(self.dec(torch.cat([x, skip], 1))))
        return out


@net(groups={"stem": 4, "point": 3, "atrous": 2, "pooled": 3, "project": 4})
class Aspp(nn.Module):
    """DeepLab: dilated branches and one of global pooling that is spread out again, classes in the input's extent."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point, self.pooled = conv(3, 4, stride=2), conv(4, 3, 1), conv(4, 3, 1)
        self.atrous = nn.Conv2d(4, 2, 3, padding=2, dilation=2)
        self.project, self.last = conv(8, 4, 1), conv(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        extent = x.shape[-2:]
        x = F.relu(self.stem(x))
        pooled = F.relu(self.pooled(F.adaptive_avg_pool2d(x, 1)))
        spread = F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)
        x = torch.cat([F.relu(self.point(x)), F.relu(self.atrous(x)), spread], 1)
        x = self.last(F.dropout(F.relu(self.project(x)), 0.5, self.training))
        return {"out": F.interpolate(x, size=extent, mode="bilinear", align_corners=False)}


@net(before={"primary": 4, "last": 3}, groups={"last": 3}, frozen=("a channel fails", "nets.py:"))
class Ghost(Headed):
    """GhostNet: half of the channels is made cheaply from the other half, and a constant slice ends them."""

    def __init__(self) -> None:
        super().__init__(3)
        self.primary, self.cheap, self.last = conv(3, 4, 1), conv(4, 4, groups=4), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.primary(x))
        return self.head(self.last(torch.cat([x, F.relu(self.cheap(x))], 1)[:, :8]))


@net(
    before={"first": 3, "first#2": 3, "inner": 5, "last": 4},
    groups={"inner": 5, "last": 4},
    frozen=("a channel",),
)
class C2f(Headed):
    """YOLO: halves of one layer, the second through a residual block, all of them concatenated."""

    def __init__(self) -> None:
        super().__init__(4)
        self.first, self.inner, self.outer, self.last = conv(3, 6, 1), conv(3, 5), conv(5, 3), conv(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.silu(self.first(x)).chunk(2, 1))
        parts.append(parts[-1] + F.silu(self.outer(F.silu(self.inner(parts[-1])))))
        return self.head(F.silu(self.last(torch.cat(parts, 1))))


@net(groups={"first": 3, "last": 4})
class Sppf(Headed):
    """YOLO: one map and its poolings in one concatenation: every channel is read three times."""

    def __init__(self) -> None:
        super().__init__(4)
        self.first, self.last = conv(3, 3, 1), conv(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        y = F.max_pool2d(x, 5, 1, 2)
        return self.head(F.silu(self.last(torch.cat((x, y, F.max_pool2d(y, 5, 1, 2)), 1))))


@net(groups={"conv1": 2}, inputs=images(2, 3, 4, 4, 4))
class UpVolume(nn.Module):
    """A transposed convolution in three dims with conv groups and a bias of another length, and one in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 1)
        self.up = nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2)
        self.flat = nn.ConvTranspose1d(6, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(self.conv1(x))).mean((3, 4))
        out: Tensor = self.flat(x).sum(2)
        return out


# ---- tokens ----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches of an image as a sequence, with a class token and positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.fc = nn.Linear(width, 3)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.places


@net(
    groups={"patch": 4, "fc1": 6},
    frozen=("sums over channels of two activations", "nets.py:"),
    mixes="the norm averages over all channels",
    unseen="attention is frozen, whatever it does",
)
class VitBlock(Tokens):
    """Queries, keys and values of one layer: frozen. The stream around and the layer inside the MLP are free."""

    def __init__(self) -> None:
        super().__init__(4)
        self.norm1, self.qkv, self.out, self.norm2 = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4), nn.LayerNorm(4)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        q, k, v = self.qkv(self.norm1(x)).reshape(x.size(0), x.size(1), 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        out: Tensor = self.fc(x[:, 0])
        return out


@net(
    groups={"patch": 4, "fc1": 6},
    frozen=("sums over channels of two activations", "nets.py:"),
    mixes="the norm averages over all channels",
    unseen="attention is frozen, whatever it does",
    unused=2 * 16 * 4 * 4,
)
class SwinBlock(nn.Module):
    """Shifted windows by roll, view and permute, and a table of biases that is read by an index buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm1, self.norm2 = nn.Conv2d(3, 4, 2, stride=2), nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.out, self.fc1, self.fc2 = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.table, self.fc = nn.Parameter(torch.randn(9, 2)), nn.Linear(4, 3)
        places = torch.arange(4)
        self.register_buffer("index", (places[:, None] - places[None, :]).abs())

    def windows(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        return x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        n, h, w, _ = x.shape
        rows = self.windows(torch.roll(self.norm1(x), (-1, -1), (1, 2)))
        q, k, v = self.qkv(rows).reshape(rows.size(0), 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.get_buffer("index").view(-1)].view(4, 4, 2).permute(2, 0, 1)
        y = (torch.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v).transpose(1, 2).flatten(2)
        y = self.out(y).view(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        x = x + torch.roll(y, (1, 1), (1, 2))
        out: Tensor = self.fc((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean((1, 2)))
        return out


@net(
    groups={"patch": 4, "across": 6, "fc1": 5},
    frozen=("no layer writes these channels",),
    mixes="the norm averages over all channels",
    unseen="the tokens that a layer reads are no channels, but brute force sees that nothing else happens to them",
    elsewhere="the layer over tokens works on every channel",
)
class Mixer(nn.Module):
    """A layer over tokens: the channels lie along its rows and pass, its own hidden width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 4, 4, stride=4), nn.LayerNorm(4)
        self.across, self.back = nn.Linear(4, 6), nn.Linear(6, 4)
        self.fc1, self.fc2, self.fc = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.back(F.gelu(self.across(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        out: Tensor = self.fc((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))
        return out


@net(groups={"patch": 4}, unseen="no layer writes the token, so brute force takes what reads it for channels apart")
class FlattenTokens(Tokens):
    """Tokens and channels in one dim: each position is a channel's, whatever token it comes from."""

    def __init__(self) -> None:
        super().__init__(4)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.tokens(x).flatten(1))
        return out


@net(
    groups={},
    frozen=("folds channels of two kinds into one dim", "nets.py:"),
    unseen="brute force finds neither of the two alone",
)
class FlattenTwoKinds(nn.Module):
    """Channels times hidden tokens in one dim: each position belongs to two channels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.across, self.fc = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 6), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.across(self.patch(x).flatten(2)).flatten(1))
        return out


# ---- weights that are computed ---------------------------------------------------------------------------------------


@net(groups={"conv1": 4, "conv2": 5}, mixes="the norm is that of the whole weight", unseen="it feels every weight")
class SpectralNorm(Headed):
    """Weights over their largest singular value, with one vector per side that follows in training."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = spectral_norm(conv(3, 4)), spectral_norm(conv(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


class StandardizedConv(nn.Conv2d):
    """A convolution whose filters have mean zero and variance one, by way of a batch norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = self.gain.view(-1) * 0.3
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


@net(
    groups={"conv1": 4, "conv2": 5},
    mixes="each filter is standardised over all channels that it reads",
    unseen="each weight feels all others of its filter",
)
class WeightStandardized(Headed):
    """Weights without mean, by two ways of writing it."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = StandardizedConv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = F.relu(self.conv1(x)), self.conv2.weight
        variance, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True)
        return self.head(F.conv2d(x, (weight - mean) / (variance + 1e-5).sqrt(), self.conv2.bias, padding=1).relu())


@net(groups={"conv1": 4}, mixes="features are normalised over all channels", unseen="cosines feel every channel")
class CosineHead(nn.Module):
    """Classes by the cosine between features and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.classes = conv(3, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x)).mean((2, 3))
        return F.linear(F.normalize(x), F.normalize(self.classes)) * 16.0


@net(groups={"conv1": 4, "conv2": 5}, unseen="brute force looks at layers, not at products")
class Einsum(nn.Module):
    """Linear maps over channels, written as sums over indices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 4), nn.Parameter(torch.randn(5, 4))
        self.last = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("nchw,kc->nkhw", F.relu(self.conv1(x)), self.conv2)
        return torch.einsum("nk,kc->nc", F.relu(x).mean((2, 3)), self.last)


@net(groups={"conv1": 4, "matrix": 5}, unseen="brute force looks at layers, not at products")
class MatmulLeft(Headed):
    """A 1 x 1 convolution as the weight times the pixels."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.matrix = conv(3, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.head(torch.matmul(self.matrix, x.flatten(2)).relu().unsqueeze(3))


@net(groups={"conv1": 4, "fc1": 5})
class Unfold(Headed):
    """A convolution as a linear layer over sliding windows: nine features per channel."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.fc1 = conv(3, 4), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.unfold(F.relu(self.conv1(x)), 3, padding=1).transpose(1, 2)
        return self.head(self.fc1(rows).transpose(1, 2).relu().unflatten(2, x.shape[2:]))


@net(groups={"conv1": 4, "kernel": 5}, unseen="brute force looks at layers, not at products")
class WeightTimesWindows(Headed):
    """A convolution's weight, flattened, times sliding windows: kernel positions are no channels."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.kernel = conv(3, 4), nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = F.unfold(F.relu(self.conv1(x)), 3, padding=1)
        return self.head((self.kernel.flatten(1) @ rows).relu().unflatten(2, x.shape[2:]))


@net(groups={"conv1": 4, "fc1": 5})
class Fold(Headed):
    """Sliding windows put back: four features of a linear layer are one channel."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.fc1 = conv(3, 4, stride=2), nn.Linear(4, 20)

    def forward(self, x: Tensor) -> Tensor:
        extent = x.shape[2:]
        rows = self.fc1(F.relu(self.conv1(x)).flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.head(F.fold(rows, extent, 2, stride=2).relu())


@net(
    before={"conv1": 1, "route": 3, "last": 5},
    groups={"route": 3, "last": 5},
    frozen=("changes which channels belong together",),
    unseen="weights that depend on the sample are frozen, whatever they do",
    unused=64 * 4 * 3 * 9,
)
class ConditionalConv(Headed):
    """A kernel per sample, mixed from experts, with the batch as conv groups: the number of experts is free."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.route, self.last = conv(3, 3), nn.Linear(3, 3), conv(4, 5)
        self.experts = nn.Parameter(torch.randn(3, 4 * 3 * 9) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        n, c, h, w = x.shape
        weight = torch.sigmoid(self.route(x.mean((2, 3)))) @ self.experts
        x = F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * 4, c, 3, 3), padding=1, groups=n)
        return self.head(self.last(F.relu(x.view(n, 4, h, w))))


# ---- norms and noise without parameters ------------------------------------------------------------------------------


@net(before={"conv1": 2, "conv2": 3}, groups={"conv2": 3}, frozen=("a channel fails", "nets.py:"))
class GroupNormPlain(Headed):
    """Norm groups without scale and shift: the layer has no tensor by which its group count could follow."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.norm, self.conv2 = conv(3, 6), nn.GroupNorm(2, 6, affine=False), conv(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu(self.norm(self.conv1(x)))))


@net(groups={"conv1": 4, "conv2": 5}, mixes="in the group norm, over all channels")
class PlainNorms(Headed):
    """Norms without scale, shift and statistics: nothing to resize, nothing that minds."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.norm1 = conv(3, 4), nn.BatchNorm2d(4, affine=False)
        self.conv2, self.norm2 = conv(4, 5), nn.GroupNorm(1, 5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.instance_norm(F.relu(self.norm1(self.conv1(x))))
        return self.head(F.relu(self.norm2(self.conv2(x))))


@net(
    groups={"conv1": 4, "conv2": 5},
    mixes="the norm averages over all channels",
    unseen="every channel feels all others",
)
class RmsNorm(Headed):
    """A root mean square over channels, and one that a person wrote."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.norm, self.conv2 = conv(3, 4), nn.RMSNorm(4), conv(4, 5)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.conv2(F.relu(x))
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.scale[:, None, None]
        return self.head(F.relu(x))


@net(
    groups={"stem": 4, "fc1": 6},
    mixes="the response of each channel is compared with the mean of all",
    unseen="every channel feels all others",
)
class GlobalResponseNorm(Headed):
    """ConvNeXt-v2: between two linear layers, channels last."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.fc1, self.fc2 = conv(3, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.gamma, self.beta = nn.Parameter(torch.rand(1, 1, 1, 6)), nn.Parameter(torch.rand(1, 1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.fc1(x.permute(0, 2, 3, 1)))
        norm = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = self.gamma * (y * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + y
        return self.head(x + self.fc2(y).permute(0, 3, 1, 2))


@net(
    groups={"last": 5},
    frozen=("channels lie along a spatial dim", "nets.py:"),
)
class LocalResponseNorm(Headed):
    """A norm over neighbouring channels: which ones are neighbours is a matter of the width."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.last = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.local_response_norm(F.relu(self.conv1(x)), 3)))


@net(groups={"conv1": 4, "conv2": 5, "fc1": 4})
class DropoutKinds(nn.Module):
    """Every way to drop elements and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = conv(3, 4), conv(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.feature_alpha_dropout(F.selu(self.conv1(x)), 0.2, self.training)
        x = F.rrelu(self.conv2(F.alpha_dropout(x, 0.2, self.training)), 0.1, 0.3, self.training)
        x = F.dropout1d(F.dropout2d(x, 0.2, self.training).flatten(2), 0.2, self.training).mean(2)
        out: Tensor = self.fc2(F.dropout(self.fc1(x).tanh(), 0.2, self.training))
        return out


# ---- attention over channels, pixels, samples ------------------------------------------------------------------------


@net(
    groups={"last": 5},
    frozen=("slides along channels", "nets.py:"),
    unseen="neighbours among the channels are frozen, although each can be felt alone",
)
class Eca(Headed):
    """A 1-d convolution over the channels: each gate depends on who the neighbours are."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.gate, self.last = conv(3, 4), nn.Conv1d(1, 1, 3, padding=1, bias=False), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = self.gate(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(3)
        return self.head(self.last(x * torch.sigmoid(gate)))


@net(
    groups={"conv1": 4, "fc1": 2, "last": 5},
    frozen=("no layer reads these channels",),
    mixes="the gate reads mean and maximum over all channels",
    unseen="the map of the gate reaches every channel and is none of them",
)
class Cbam(Headed):
    """One MLP for two poolings of the channels, then one map for all of them."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.fc1, self.fc2 = conv(3, 4), nn.Linear(4, 2), nn.Linear(2, 4)
        self.gate, self.last = conv(2, 1, 7), conv(4, 5)

    def squeezed(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.fc1(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = x * torch.sigmoid(self.squeezed(x.mean((2, 3))) + self.squeezed(x.amax((2, 3))))[..., None, None]
        seen = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], 1)
        return self.head(self.last(x * torch.sigmoid(self.gate(seen))))


@net(
    groups={"stem": 4, "squeeze": 2},
    frozen=("no layer reads these channels",),
    unseen="the weights of the pixels reach every channel and are none of them",
    unused=64 * 4,
    elsewhere="a product of activations has one row per channel",
)
class GlobalContext(Headed):
    """GCNet: channels averaged over pixels by a product of activations, which keeps them apart."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.mask, self.squeeze, self.excite = conv(3, 4), conv(4, 1, 1), conv(4, 2, 1), conv(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        weights = torch.softmax(self.mask(x).flatten(2), -1).transpose(1, 2)
        context = torch.matmul(x.flatten(2), weights).unsqueeze(3)
        return self.head(x + self.excite(F.relu(self.squeeze(context))))


@net(
    groups={"conv1": 4},
    frozen=("sums over channels of two activations", "nets.py:"),
    unseen="brute force finds that either factor alone can go",
    unused=64 * 4,
)
class Bilinear(Headed):
    """An inner product of pixels with a vector of the same sample."""

    def __init__(self) -> None:
        super().__init__(1)
        self.conv1, self.key, self.query = conv(3, 4), conv(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        query = self.query(x.mean((2, 3))).unsqueeze(1)
        return self.head(torch.bmm(query, self.key(x).flatten(2)).unsqueeze(3))


# ---- more channels on the move ---------------------------------------------------------------------------------------


@net(groups={"conv1": 4, "conv2": 5}, unused=16 * 4 * 4, elsewhere="one kernel works on every channel")
class BlurExpanded(Headed):
    """One blur kernel, a buffer of one, expanded over however many channels there are."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)
        self.register_buffer("kernel", torch.ones(1, 1, 2, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        count = x.size(1)
        x = F.conv2d(x, self.get_buffer("kernel").expand(count, 1, 2, 2), stride=2, groups=count)
        return self.head(F.relu(self.conv2(x)))


@net(
    groups={"conv1": 4, "conv2": 5},
    frozen=("one axis both reads and writes channels",),
    unseen="a layer of one channel",
    elsewhere="one kernel works on every channel",
)
class BlurFolded(Headed):
    """One blur kernel for maps of one channel: the channels hide in the batch."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.blur, self.conv2 = conv(3, 4), conv(1, 1, bias=False), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        n, c, h, w = x.shape
        return self.head(self.conv2(self.blur(x.reshape(n * c, 1, h, w)).reshape(n, c, h, w)).relu())


@net(groups={"conv1": 4, "conv2": 5}, frozen=("no layer writes these channels",))
class CoordConv(Headed):
    """Two maps of coordinates beside the channels: the layer reads them, nobody writes them."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        n, _, h, w = x.shape
        rows, columns = torch.meshgrid(
            torch.linspace(-1, 1, h, device=x.device), torch.linspace(-1, 1, w, device=x.device), indexing="ij"
        )
        places = torch.stack([rows, columns]).unsqueeze(0).expand(n, -1, -1, -1)
        return self.head(self.conv2(torch.cat([x, places.to(x.dtype)], 1)).relu())


@net(groups={"conv1": 2, "conv2": 3})
class SpaceToDepth(Headed):
    """Four pixels become four channels, side by side or apart."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = conv(3, 2), conv(8, 3)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        return self.head(F.pixel_unshuffle(F.relu(self.conv2(x)), 2))


@net(groups={"conv1": 2, "conv2": 3})
class Focus(Headed):
    """Four subsampled copies of a map in one concatenation."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = conv(3, 2), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.head(F.relu(self.conv2(torch.cat(parts, 1))))


@net(groups={"conv1": 3, "conv2": 2})
class Maxout(Headed):
    """The larger of two channels: they come and go in pairs, neighbours or halves apart."""

    def __init__(self) -> None:
        super().__init__(2)
        self.conv1, self.conv2 = conv(3, 6), conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.view(x.size(0), x.size(1) // 2, 2, x.size(2), x.size(3)).max(2)[0]
        x = self.conv2(x)
        return self.head(torch.maximum(*x.chunk(2, 1)))


@net(groups={"left": 4})
class StackSum(Headed):
    """Branches that are stacked in a dim of their own and added."""

    def __init__(self) -> None:
        super().__init__(4)
        self.left, self.right, self.third = conv(3, 4), conv(3, 4, 1), conv(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.left(x), self.right(x), self.third(x)]
        return self.head(torch.stack(branches, dim=0).sum(dim=0).relu() + sum(b.tanh() for b in branches))


@net(groups={"stem": 4, "gate": 2})
class SelectiveKernel(Headed):
    """SKNet: a softmax over branches decides for each channel."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.right, self.gate, self.pick = conv(3, 4), conv(3, 4, 5), nn.Linear(4, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.stem(x), self.right(x)], 1)
        picks = self.pick(F.relu(self.gate(both.sum(1).mean((2, 3)))))
        weights = torch.softmax(picks.view(picks.size(0), 2, -1, 1, 1), 1)
        return self.head((both * weights).sum(1))


@net(groups={"conv1": 4, "left": 3, "right": 5})
class ManyOutputs(nn.Module):
    """Several heads, returned in dicts that hold lists and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.left, self.right = conv(3, 4), conv(4, 3), conv(4, 5)
        self.boxes, self.classes = conv(3, 4, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.conv1(x))
        boxes, classes = self.boxes(F.relu(self.left(x))), self.classes(F.relu(self.right(x)).mean((2, 3)))
        return {"boxes": [boxes, {"again": (boxes.sigmoid(), 3)}], "classes": {"logits": classes, "none": None}}


@net(groups={"conv1": 4, "conv2": 5})
class Selections(Headed):
    """Elementwise choices between two layers, and a mask of ones and zeros."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.side, self.conv2 = conv(3, 4), conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv1(x), self.side(x)
        x = torch.where(a > b, a, 0.1 * b) + torch.maximum(a, b) - torch.minimum(a, b)
        x = torch.lerp(x, torch.addcmul(a, b, b), 0.5).clamp(min=-1).masked_fill(a > 5, 0.0)
        return self.head(F.softplus(self.conv2(x)).nan_to_num())


@net(groups={"conv1": 4, "conv2": 5}, mixes="the softmax is over channels", unseen="every channel feels all others")
class SoftmaxChannels(Headed):
    """Channels that compete, once softly."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(torch.softmax(self.conv1(x), 1) + F.softmin(x.sum((1, 2, 3)), 0).sum())))


@net(groups={"conv1": 4, "conv2": 5})
class MorePooling(Headed):
    """Pooling by powers, by chance, and back again; pixels that are chosen, cumulated, sampled by a grid."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.conv2 = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.lp_pool2d(F.relu(self.conv1(x)) + 0.1, 2.0, 2)
        small, places = F.max_pool2d(x, 2, return_indices=True)
        x = F.max_unpool2d(small, places, 2) + F.interpolate(small, scale_factor=2.0, mode="bicubic") + x.cumsum(3)
        turn = torch.eye(2, 3, device=x.device, dtype=x.dtype).repeat(x.size(0), 1, 1)
        x = F.grid_sample(self.conv2(x), F.affine_grid(turn, list(x.shape), False), align_corners=False)
        return self.head(x[:, :, torch.tensor([2, 0, 1])].relu())


@net(groups={"conv1": 4}, frozen=("these are coordinates", "nets.py:"), unseen="brute force finds no coordinates")
class SpatialTransformer(Headed):
    """Where to look comes from a layer: its outputs are coordinates, not channels."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1, self.offset = conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        grid = torch.tanh(self.offset(x)).permute(0, 2, 3, 1)
        return self.head(F.grid_sample(x, grid, align_corners=False))


@net(
    before={"conv1": 4, "last": 5},
    groups={"last": 5},
    frozen=("a channel fails", "nets.py:"),
)
class ConstantPermutation(Headed):
    """Channels in an order that the code spells out: exact as long as there are four of them."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.last = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.conv1(x))[:, torch.tensor([2, 0, 3, 1])]))


@net(
    groups={"last": 5},
    frozen=("which channels are chosen is not known", "nets.py:"),
    unseen="an index in a buffer is frozen, whatever it says",
)
class IndexBuffer(Headed):
    """Channels in an order that a buffer holds: on tensors without values nobody can know it."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.last = conv(3, 4), conv(4, 5)
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.index_select(F.relu(self.conv1(x)), 1, self.get_buffer("order"))))


@net(
    groups={"last": 5},
    frozen=("aten.cumsum runs along channels", "nets.py:"),
)
class Cumulative(Headed):
    """Running sums over channels."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.last = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.conv1(x)).cumsum(1)))


@net(
    groups={"last": 5},
    frozen=("aten.gather has no rule", "nets.py:"),
)
class Gathered(Headed):
    """Channels in an order that depends on the sample, and a one-hot mask."""

    def __init__(self) -> None:
        super().__init__(5)
        self.conv1, self.last = conv(3, 4), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        strength = x.mean((2, 3))
        order = strength.argsort(1)[..., None, None].expand_as(x)
        best = F.one_hot(strength.argmax(1), num_classes=x.size(1))[..., None, None]
        return self.head(self.last(x.gather(1, order) * (1 + best)))


@net(
    before={"conv1": 4, "lstm.weight_hh_l0": 5, "gru.weight_ih_l0": 5},
    groups={},
    frozen=("a channel fails", "nets.py:"),
    unseen="brute force does not know recurrent layers",
    unused=-8 * 4 * 5 * (4 + 5),  # torch does not count the long short-term memory
    valued="recurrent layers are one op there, and many without values",
)
class Recurrent(nn.Module):
    """Recurrent layers over a map's columns: they hold the number of features that they expect."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.lstm, self.gru = conv(3, 4), nn.LSTM(4, 5, batch_first=True), nn.GRU(5, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.relu(self.conv1(x)).mean(2).transpose(1, 2)
        rows = self.lstm(rows)[0].transpose(0, 1)
        out: Tensor = self.fc(self.gru(rows)[1][-1])
        return out
