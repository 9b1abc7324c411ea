"""Tiny nets with one hazard each, with example inputs and what is known about their channels by reading the code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

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
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs] = IMAGES
    groups: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, int] | None = None
    frozen: tuple[str, ...] = ()
    mixes: str = ""
    unseen: str = ""
    unused: int = 0


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
    before={"conv1": 4, "last": 5},
    groups={"last": 5},
    frozen=("aten.bmm has no rule", "removing a channel fails", "nets.py:"),
    unseen="an op without a rule is frozen, whatever it does",
    unused=2 * 64 * 64 * 4,
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
