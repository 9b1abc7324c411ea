"""Nets with channel maps written by hand, optimizers of all kinds, and all that can be seen of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from autowidth.channels import FRESH, ChannelGroup, ChannelMap, IndexMap, ParamAxis, Place, ResizePlan, Role

# ---------------------------------------------------------------------------------------------- nets, one hazard each

# No bias in front of a norm over the batch: its gradient is rounding noise, which Rprop takes for a direction.


@dataclass
class Net:
    """A model with its channel map written by hand, and one input batch."""

    model: nn.Module
    map: ChannelMap
    x: Tensor


def place(name: str, dim: int, role: Role, width: int, copies: int = 1, start: int = 0) -> Place:
    """Channel c stands at start + c * copies and the `copies - 1` positions behind it."""
    rows = tuple(tuple(range(start + c * copies, start + (c + 1) * copies)) for c in range(width))
    return Place(ParamAxis(name, dim), role, rows)


def carried(prefix: str, names: str, width: int, copies: int = 1, start: int = 0) -> list[Place]:
    return [place(f"{prefix}.{name}", 0, "carry", width, copies, start) for name in names.split()]


BATCH_NORM = "weight bias running_mean running_var"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tuple(t.shape) for name, t in tensors.items()}


def net(model: nn.Module, x: Tensor, **groups: list[Place]) -> Net:
    found = tuple(ChannelGroup(name, tuple(places)) for name, places in groups.items())
    for index, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point() and buffer.dim() == 1:  # running statistics that differ from channel to channel
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)) + index / 10)
    return Net(model.double(), ChannelMap(groups=found, frozen=(), uses=(), shapes=shapes_of(model)), x.double())


class Chain(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 3, 2, padding=1, bias=False), nn.BatchNorm2d(b)
        self.head = nn.Linear(4 * b, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))).flatten(1))


def chain(a: int, b: int) -> Net:
    """conv-bn-relu-conv-bn-relu, flattened into a linear layer: four copies of each channel of b."""
    first = [place("conv1.weight", 0, "write", a), place("conv2.weight", 1, "read", a)]
    second = [place("conv2.weight", 0, "write", b), place("head.weight", 1, "read", b, copies=4)]
    return net(
        Chain(a, b),
        torch.randn(8, 2, 4, 4),
        a=first + carried("bn1", BATCH_NORM, a),
        b=second + carried("bn2", BATCH_NORM, b),
    )


class Residual(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, a, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
        self.head = nn.Linear(a, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


def residual(a: int, b: int) -> Net:
    """Two layers write one stream, two read it."""
    stream = [place("stem.weight", 0, "write", a), place("conv1.weight", 1, "read", a)]
    stream += [place("conv2.weight", 0, "write", a), place("head.weight", 1, "read", a)]
    inner = [place("conv1.weight", 0, "write", b), place("conv2.weight", 1, "read", b)]
    return net(
        Residual(a, b),
        torch.randn(8, 2, 4, 4),
        a=stream + carried("stem", "bias", a) + carried("bn2", BATCH_NORM, a),
        b=inner + carried("bn1", BATCH_NORM, b),
    )


class Concat(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, a, 3, bias=False), nn.Conv2d(2, b, 3, bias=False)
        self.bn, self.tail = nn.BatchNorm2d(a + b), nn.Conv2d(a + b, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], dim=1)
        return self.tail(F.relu(self.bn(x))).mean((2, 3))


def concat(a: int, b: int) -> Net:
    """Two groups share the axes of one norm and one reader."""
    left = [place("left.weight", 0, "write", a), place("tail.weight", 1, "read", a)]
    right = [place("right.weight", 0, "write", b), place("tail.weight", 1, "read", b, start=a)]
    return net(
        Concat(a, b),
        torch.randn(8, 2, 4, 4),
        a=left + carried("bn", BATCH_NORM, a),
        b=right + carried("bn", BATCH_NORM, b, start=a),
    )


class Depthwise(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(2, a, 1), nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.act, self.project = nn.PReLU(a), nn.Conv2d(a, b, 1)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.0, a))
        self.register_buffer("blur", torch.full((b, 1, 3, 3), 1 / 9))
        self.head = nn.Linear(b, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depth(self.expand(x))) * self.gamma.view(-1, 1, 1)
        x = F.relu(self.project(x))
        return self.head(F.conv2d(x, self.blur, groups=x.shape[1]).mean((2, 3)))


def depthwise(a: int, b: int) -> Net:
    """A depthwise conv, slopes, a layer scale and a fixed blur carry channels."""
    first = [place("expand.weight", 0, "write", a), place("project.weight", 1, "read", a)]
    first += [place("act.weight", 0, "carry", a), place("gamma", 0, "carry", a)]
    second = [place("project.weight", 0, "write", b), place("head.weight", 1, "read", b)]
    return net(
        Depthwise(a, b),
        torch.randn(8, 2, 4, 4),
        a=first + carried("expand", "bias", a) + carried("depth", "weight bias", a),
        b=[*second, *carried("project", "bias", b), place("blur", 0, "carry", b)],
    )


class Normed(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1 = weight_norm(nn.Conv2d(2, a, 3))
        self.conv2, self.head = nn.Conv2d(a, b, 1), nn.Linear(b, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


def normed(a: int, b: int) -> Net:
    """The weight is computed: its owner is a parametrization, the attributes belong to the conv."""
    hidden = "conv1.parametrizations.weight.original"
    first = [place(f"{hidden}0", 0, "carry", a), place(f"{hidden}1", 0, "write", a)]
    first += [*carried("conv1", "bias", a), place("conv2.weight", 1, "read", a)]
    second = [place("conv2.weight", 0, "write", b), place("head.weight", 1, "read", b)]
    return net(Normed(a, b), torch.randn(8, 2, 4, 4), a=first, b=second + carried("conv2", "bias", b))


class Grouped(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 2 * a, 3), nn.GroupNorm(a, 2 * a)
        self.conv2 = nn.Conv2d(2 * a, 3 * a, 1, groups=a)
        self.tail, self.head = nn.Conv2d(3 * a, b, 1), nn.Linear(b, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.head(F.relu(self.tail(x)).mean((2, 3)))


def grouped(a: int, b: int) -> Net:
    """Conv groups and norm groups leave as wholes: two channels in, three out."""
    first = [place("conv1.weight", 0, "write", a, copies=2), *carried("conv1", "bias", a, copies=2)]
    first += carried("norm", "weight bias", a, copies=2) + carried("conv2", "weight bias", a, copies=3)
    first += [place("tail.weight", 1, "read", a, copies=3)]
    second = [place("tail.weight", 0, "write", b), place("head.weight", 1, "read", b)]
    return net(Grouped(a, b), torch.randn(8, 2, 4, 4), a=first, b=second + carried("tail", "bias", b))


class Transposed(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, a, 3), nn.ConvTranspose2d(a, b, 2, stride=2, bias=False)
        self.norm, self.head = nn.InstanceNorm2d(b, affine=True, track_running_stats=True), nn.Linear(b, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.up(F.relu(self.conv(x))))).mean((2, 3)))


def transposed(a: int, b: int) -> Net:
    """The weight of a transposed conv has its axes the other way round."""
    first = [place("conv.weight", 0, "write", a), *carried("conv", "bias", a), place("up.weight", 0, "read", a)]
    second = [place("up.weight", 1, "write", b), place("head.weight", 1, "read", b)]
    return net(Transposed(a, b), torch.randn(8, 2, 4, 4), a=first, b=second + carried("norm", BATCH_NORM, b))


class Perceptron(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(4, a), nn.LayerNorm(a)
        self.fc2, self.norm2 = nn.Linear(a, b), nn.RMSNorm(b)
        self.head = nn.Linear(b, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm2(self.fc2(F.relu(self.norm1(self.fc1(x)))))))


def perceptron(a: int, b: int) -> Net:
    """Norms over all channels."""
    first = [place("fc1.weight", 0, "write", a), place("fc2.weight", 1, "read", a)]
    second = [place("fc2.weight", 0, "write", b), place("head.weight", 1, "read", b)]
    return net(
        Perceptron(a, b),
        torch.randn(8, 4),
        a=first + carried("fc1", "bias", a) + carried("norm1", "weight bias", a),
        b=second + carried("fc2", "bias", b) + carried("norm2", "weight", b),
    )


PER_CHANNEL = [chain, residual, concat, depthwise, normed, grouped, transposed]
"""Nets in which a channel is not seen by the others before a reader sees it."""
ALL_NETS = [*PER_CHANNEL, perceptron]
any_net = pytest.mark.parametrize("build", ALL_NETS)
per_channel_net = pytest.mark.parametrize("build", PER_CHANNEL)
Build = Callable[[int, int], Net]


# ------------------------------------------------------------------------------------------------ looking at the whole


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def contents(*things: nn.Module | torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Every number in models and optimizers, copied."""
    found = {}
    for n, thing in enumerate(things):
        if isinstance(thing, nn.Module):
            found |= {f"{n} {name}": t.detach().clone().numpy() for name, t in tensors_of(thing).items()}
            continue
        for i, p in enumerate(p for group in thing.param_groups for p in group["params"]):
            for key, value in thing.state.get(p, {}).items():
                found[f"{n} {i} {key}"] = torch.as_tensor(value).detach().clone().numpy()
    return found


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray], rtol: float | None = None) -> None:
    """Equal names, shapes, dtypes and values: bit for bit, or within rtol."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].shape == right[name].shape, name
        assert left[name].dtype == right[name].dtype, name
        if rtol is None:
            assert left[name].tobytes() == right[name].tobytes(), name
        else:
            np.testing.assert_allclose(left[name], right[name], rtol=rtol, atol=rtol / 100, err_msg=name)


def attributes(model: nn.Module) -> list[tuple[str, str, object]]:
    return [
        (path, key, value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | str | float | tuple)
    ]


def identities(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[tuple[object, ...]]:
    """Which objects, with which strides and gradients."""
    found: list[tuple[object, ...]] = [
        (name, id(t), t.stride(), t.dtype, t.requires_grad, id(t.grad), None if t.grad is None else t.grad.tolist())
        for name, t in tensors_of(model).items()
    ]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            found += [(key, id(value), value.stride()) for key, value in state.items() if isinstance(value, Tensor)]
    return found


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    net.model.train()
    for step in range(steps):
        optimizer.zero_grad()
        x = net.x * (1 + step / 10)
        F.cross_entropy(net.model(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()


def wild_plan(net: Net) -> ResizePlan:
    """Removes, inserts, duplicates and permutes in every group."""
    return {g.name: IndexMap((2, 0, FRESH, 3, 3, FRESH), g.width) for g in net.map.groups}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)


# ----------------------------------------------------------------------------------------------------- optimizers


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, weight_decay=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1, weight_decay=0.01),
}
NOT_ELEMENTWISE = {"Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.01)}
any_optimizer = pytest.mark.parametrize("kind", [*OPTIMIZERS, *NOT_ELEMENTWISE])


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return {**OPTIMIZERS, **NOT_ELEMENTWISE}[kind](list(model.parameters()))
