"""Laws of surgery: identity, composition, inverse, equality with masking, all or nothing."""

from __future__ import annotations

import copy
import doctest
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autowidth.channels import FRESH, ChannelGroup, ChannelMap, IndexMap, ParamAxis, Place, ResizePlan, Role
from autowidth.errors import AutoWidthError
from autowidth.surgery import (
    OPTIMIZER_STATE,
    Journal,
    StaleMapError,
    SurgeryError,
    UnsupportedOptimizerError,
    apply_,
    changes,
    check_optimizers,
    checks,
    edits,
    holders,
)
from autowidth.surgery import attributes as attribute_rules
from autowidth.surgery import contents as tensor_contents

pytestmark = pytest.mark.filterwarnings("error")

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


# -------------------------------------------------------------------------------------------------- shapes and laws


@any_net
@pytest.mark.parametrize("widths", [(3, 5), (6, 4), (1, 1), (9, 2)])
def test_a_resized_net_is_the_net_of_those_widths(build: Build, widths: tuple[int, int]) -> None:
    """Same shapes, same attributes, same channel map as the same class built with these widths."""
    net, wanted = build(4, 5), build(*widths)
    plan = {}
    for group, width in zip(net.map.groups, widths, strict=True):
        kept = min(width, group.width)
        plan[group.name] = IndexMap((*range(kept), *[FRESH] * (width - kept)), group.width)
    new_map = apply_(net.model, net.map, plan)
    assert repr(net.model) == repr(wanted.model)
    assert attributes(net.model) == attributes(wanted.model)
    assert shapes_of(net.model) == shapes_of(wanted.model) == new_map.shapes
    assert new_map.groups == wanted.map.groups
    assert net.model.eval()(net.x).shape == (8, 3)


@any_net
def test_plan_without_effect_warns_and_changes_nothing(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 2)
    before, objects = contents(net.model, optimizer), identities(net.model, optimizer)
    for plan in ({}, {"a": IndexMap.identity(4)}, {"a": IndexMap.identity(4), "b": IndexMap.identity(5)}):
        with pytest.warns(UserWarning, match="changes nothing"):
            assert apply_(net.model, net.map, plan, optimizers=[optimizer]) is net.map
    assert_same(before, contents(net.model, optimizer))
    assert objects == identities(net.model, optimizer)


@any_net
def test_identity_map_beside_a_real_one_changes_nothing_of_its_own(build: Build) -> None:
    net = build(4, 5)
    before = contents(net.model)
    apply_(net.model, net.map, {"a": IndexMap.identity(4), "b": IndexMap.removing([1], 5)})
    touched = {f"0 {axis.name}" for axis in net.map.group("b").axes}
    after = contents(net.model)
    assert_same(*({k: v for k, v in c.items() if k not in touched} for c in (before, after)))


@any_net
def test_every_survivor_and_its_state_stand_where_the_new_map_says(build: Build) -> None:
    """Slow reference: follow each channel from the old map to the new one, for every pair of groups on a tensor."""
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 3)
    plan, before = wild_plan(net), contents(net.model, optimizer)
    new_map = apply_(net.model, net.map, plan, optimizers=[optimizer])
    after = contents(net.model, optimizer)
    order = [name for name, _ in net.model.named_parameters()]
    checked = 0
    for name, shape in net.map.shapes.items():
        lookups = [positions(net.map, new_map, plan, ParamAxis(name, d), n) for d, n in enumerate(shape)]
        keys = [f"0 {name}"]
        if name in order:
            keys += [f"1 {order.index(name)} {k}" for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        for key in keys:
            for new in np.ndindex(*after[key].shape):
                old = tuple(lookup[i] for lookup, i in zip(lookups, new, strict=True))
                if FRESH not in old:
                    assert before[key][old] == after[key][new], (key, old, new)
                    checked += 1
    assert checked > 100


def positions(old: ChannelMap, new: ChannelMap, plan: ResizePlan, axis: ParamAxis, length: int) -> list[int]:
    """New position -> old position or FRESH, by walking the channels of both maps."""
    found: dict[int, int] = {}
    for group in old.groups:
        for was, now in zip(group.places, new.group(group.name).places, strict=True):
            if was.axis == axis:
                for slot, source in enumerate(plan[group.name].source):
                    for k, position in enumerate(now.index[slot]):
                        found[position] = FRESH if source == FRESH else was.index[source][k]
    return [found[i] for i in range(len(found))] if found else list(range(length))


rising = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(sorted)


@settings(deadline=None, max_examples=25)
@given(build=st.sampled_from(ALL_NETS), first=rising, second=rising, data=st.data())
def test_maps_compose(build: Build, first: list[int], second: list[int], data: st.DataObject) -> None:
    a = {"a": IndexMap(tuple(first), 4), "b": IndexMap(tuple(second), 4)}
    b = {}
    for name, index_map in a.items():
        sources = st.lists(st.integers(0, index_map.width - 1), min_size=1, max_size=5).map(sorted)
        b[name] = IndexMap(tuple(data.draw(sources)), index_map.width)
    torch.manual_seed(0)
    twice = build(4, 4)
    twice_adam = adam(twice.model)
    train(twice, twice_adam, 1)
    once = copy.deepcopy(twice)
    once_adam = adam(once.model)
    once_adam.load_state_dict(copy.deepcopy(twice_adam.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        middle = apply_(twice.model, twice.map, a, optimizers=[twice_adam])
        end = apply_(twice.model, middle, b, optimizers=[twice_adam])
        at_once = apply_(once.model, once.map, {n: a[n].then(b[n]) for n in a}, optimizers=[once_adam])
    assert end == at_once
    assert_same(contents(twice.model, twice_adam), contents(once.model, once_adam))


@any_net
def test_removal_then_insertion_is_one_surgery(build: Build) -> None:
    """Fresh content depends on the survivors and the generator alone."""
    twice, state = build(4, 5), adam
    optimizer = state(twice.model)
    train(twice, optimizer, 2)
    once = copy.deepcopy(twice)
    other = state(once.model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    removal = {"a": IndexMap.removing([1], 4), "b": IndexMap.removing([0, 4], 5)}
    insertion = {n: IndexMap.identity(3).inserting(2) for n in removal}
    middle = apply_(twice.model, twice.map, removal, optimizers=[optimizer])
    apply_(twice.model, middle, insertion, optimizers=[optimizer], generator=torch.Generator().manual_seed(1))
    whole = {n: removal[n].then(insertion[n]) for n in removal}
    apply_(once.model, once.map, whole, optimizers=[other], generator=torch.Generator().manual_seed(1))
    assert_same(contents(twice.model, optimizer), contents(once.model, other), rtol=1e-12)


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


def test_all_optimizers_of_torch_are_in_the_table_or_refused() -> None:
    """A new optimizer in torch.optim must be looked at by a person."""
    known = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert known - {torch.optim.Optimizer, torch.optim.LBFGS} == set(OPTIMIZER_STATE)
    own_tests = {"SparseAdam", "Muon"}
    assert {c.__name__ for c in OPTIMIZER_STATE} == {k.split()[0] for k in [*OPTIMIZERS, *NOT_ELEMENTWISE]} | own_tests


@any_optimizer
@any_net
def test_insertion_undone_by_removal_is_the_identity(build: Build, kind: str) -> None:
    net = build(4, 5)
    optimizer = make(kind, net.model)
    train(net, optimizer, 3)
    before, looks = contents(net.model, optimizer), attributes(net.model)
    insertion = {"a": IndexMap((0, FRESH, FRESH, 1, 2, 3), 4), "b": IndexMap.identity(5).inserting(2)}
    middle = apply_(net.model, net.map, insertion, optimizers=[optimizer])
    assert all(np.isfinite(v).all() for v in contents(net.model, optimizer).values())
    removal = {name: IndexMap.removing(m.inserted, m.width) for name, m in insertion.items()}
    assert apply_(net.model, middle, removal, optimizers=[optimizer]) == net.map
    assert_same(before, contents(net.model, optimizer))
    assert looks == attributes(net.model)


def mask_(net: Net, removed: dict[str, list[int]]) -> None:
    """Readers of the removed channels see zeros from now on."""
    for name, channels in removed.items():
        for reads in net.map.group(name).with_role("read"):
            seen = torch.ones(net.map.shapes[reads.axis.name][reads.axis.dim], dtype=torch.float64)
            seen[[p for c in channels for p in reads.index[c]]] = 0
            module = net.model.get_submodule(reads.axis.name.rpartition(".")[0])

            def hide(_: nn.Module, inputs: tuple[Tensor, ...], seen: Tensor = seen) -> tuple[Tensor]:
                return (inputs[0] * seen.view(1, -1, *[1] * (inputs[0].dim() - 2)),)

            module.register_forward_pre_hook(hide)


def survivors(net: Net, removed: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """The parameters and buffers of the (masked) model without the removed channels."""
    found = contents(net.model)
    gone: dict[ParamAxis, list[int]] = {}
    for name, channels in removed.items():
        for where in net.map.group(name).places:
            gone.setdefault(where.axis, []).extend(p for c in channels for p in where.index[c])
    for axis, positions in gone.items():
        found[f"0 {axis.name}"] = np.delete(found[f"0 {axis.name}"], positions, axis.dim)
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
@per_channel_net
def test_training_goes_on_as_that_of_the_masked_model(build: Build, kind: str) -> None:
    net = build(4, 5)
    optimizer = make(kind, net.model)
    train(net, optimizer, 3)
    masked = copy.deepcopy(net)
    masked_optimizer = make(kind, masked.model)
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    removed = {"a": [1, 3], "b": [0]}
    mask_(masked, removed)
    plan = {n: IndexMap.removing(channels, net.map.widths[n]) for n, channels in removed.items()}
    apply_(net.model, net.map, plan, optimizers=[optimizer])
    train(net, optimizer, 4)
    train(masked, masked_optimizer, 4)
    assert_same(contents(net.model), survivors(masked, removed), rtol=1e-8)


@per_channel_net
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_insertion_leaves_the_function_unchanged(build: Build, dtype: torch.dtype) -> None:
    net = build(4, 5)
    train(net, adam(net.model), 3)
    net.model.eval().to(dtype)
    before = net.model(net.x.to(dtype))
    apply_(net.model, net.map, {"a": IndexMap((0, FRESH, 1, 2, 3), 4), "b": IndexMap.identity(5).inserting(3)})
    torch.testing.assert_close(net.model(net.x.to(dtype)), before, rtol=1e-6, atol=1e-6)
    train(Net(net.model, net.map, net.x.to(dtype)), torch.optim.SGD(net.model.parameters(), lr=0.1), 2)


# ------------------------------------------------------------------------------------------------------ fresh content


def test_fresh_content_of_a_chain() -> None:
    net = chain(4, 5)
    old = contents(net.model)
    apply_(net.model, net.map, {"a": IndexMap((FRESH, FRESH, 2, 3), 4), "b": IndexMap.identity(5).inserting(1)})
    m = net.model
    assert m.conv1.weight[:2].abs().min() > 0 and m.conv1.weight[0].ne(m.conv1.weight[1]).all()
    assert m.bn1.weight[:2].eq(1).all() and m.bn1.bias[:2].eq(0).all()
    assert m.bn1.running_mean[:2].eq(0).all()
    np.testing.assert_allclose(m.bn1.running_var[:2], old["0 bn1.running_var"][2:].mean())
    assert m.conv2.weight[:, :2].eq(0).all()  # also in the fresh filter of b: zero wins
    assert m.conv2.weight[5, 2:].abs().min() > 0
    assert m.head.weight[:, 20:].eq(0).all()


def test_fresh_content_of_carried_tensors() -> None:
    net = depthwise(4, 5)
    with torch.no_grad():
        net.model.act.weight.copy_(torch.arange(4.0))
    apply_(net.model, net.map, {"a": IndexMap((0, FRESH, 2, 3), 4), "b": IndexMap.identity(5).inserting(1)})
    m = net.model
    np.testing.assert_allclose(m.act.weight.detach(), [0, 5 / 3, 2, 3])
    np.testing.assert_allclose(m.gamma[1].item(), m.gamma[[0, 2, 3]].mean().item())
    assert m.depth.weight[1].abs().min() > 0 and m.depth.bias[1] == m.expand.bias[1] == 0
    np.testing.assert_allclose(m.blur, 1 / 9, rtol=1e-7)


def test_fresh_magnitude_of_a_weight_norm_is_that_of_its_siblings() -> None:
    net = normed(4, 5)
    apply_(net.model, net.map, {"a": IndexMap.identity(4).inserting(2)})
    norms = net.model.conv1.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms[4:], norms[:4].mean().expand(2))
    assert net.model.conv1.weight[4].ne(net.model.conv1.weight[5]).all()


def test_random_weights_have_the_spread_of_the_survivors() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 1)).double()
    with torch.no_grad():
        model[0].weight[:20] *= 100  # these go: their spread must not be handed on
    groups = (ChannelGroup("g", (place("0.weight", 0, "write", 40), place("1.weight", 1, "read", 40))),)
    bias = carried("0", "bias", 40)
    groups = (ChannelGroup("g", (*groups[0].places, *bias)),)
    net = ChannelMap(groups=groups, frozen=(), uses=(), shapes=shapes_of(model))
    apply_(model, net, {"g": IndexMap((*range(20, 40), *[FRESH] * 200), 40)})
    spread, wanted = model[0].weight[20:].std().item(), model[0].weight[:20].std().item()
    assert abs(spread / wanted - 1) < 5 / np.sqrt(2 * 200 * 50)  # five standard errors


def test_large_weights_are_resized_like_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    net = chain(6, 5)
    with torch.no_grad():
        net.model.conv1.weight.mul_(torch.arange(1.0, 7.0).view(6, 1, 1, 1)).add_(3)  # no two blocks are alike
    plan = {"a": IndexMap.removing([2], 6).inserting(3), "b": IndexMap.removing([0], 5).inserting(1)}
    whole, blocks = copy.deepcopy(net.model), copy.deepcopy(net.model)
    apply_(whole, net.map, plan, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("autowidth.surgery.contents._BLOCK", 20)
    apply_(blocks, net.map, plan, generator=torch.Generator().manual_seed(0))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(blocks.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


def test_width_replaced_altogether_keeps_the_scale_of_the_old_one() -> None:
    net = chain(4, 5)
    variance = net.model.bn1.running_var.mean().item()
    apply_(net.model, net.map, {"a": IndexMap((FRESH,) * 3, 4)})
    np.testing.assert_allclose(net.model.bn1.running_var, [variance] * 3)
    assert 0 < net.model.conv1.weight.std() < 1


def test_same_generator_same_content_and_other_generators_untouched() -> None:
    nets = [chain(4, 5), chain(4, 5), chain(4, 5)]
    for net in nets:
        net.model.load_state_dict(nets[0].model.state_dict())
    random_state = torch.get_rng_state()
    for net, seed in zip(nets, (7, 7, 8), strict=True):
        plan = {"a": IndexMap.identity(4).inserting(2)}
        apply_(net.model, net.map, plan, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(random_state, torch.get_rng_state())
    assert_same(contents(nets[0].model), contents(nets[1].model))
    assert not torch.equal(nets[0].model.conv1.weight, nets[2].model.conv1.weight)


def test_integer_buffers_follow() -> None:
    net = chain(4, 5)
    net.model.register_buffer("ages", torch.tensor([7, 7, 7, 7]))
    places = (*net.map.group("a").places, place("ages", 0, "carry", 4))
    whole = ChannelMap(groups=(ChannelGroup("a", places),), frozen=(), uses=(), shapes=shapes_of(net.model))
    ages = net.model.ages
    apply_(net.model, whole, {"a": IndexMap((3, 1, FRESH), 4)})
    assert net.model.ages is ages and ages.dtype == torch.int64 and ages.tolist() == [7, 7, 7]


# ---------------------------------------------------------------------------------------------------- optimizer state


FIRST_MOMENTS = {"momentum_buffer", "exp_avg", "grad_avg", "prev"}
COUNTERS = {"step", "eta", "mu", "mu_product"}


@any_optimizer
def test_fresh_state_rests_or_has_its_siblings_mean(kind: str) -> None:
    net = chain(4, 5)
    optimizer = make(kind, net.model)
    train(net, optimizer, 3)
    weight = net.model.conv1.weight
    old = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[weight].items()}
    apply_(net.model, net.map, {"a": IndexMap((0, FRESH, 1, 3), 4)}, optimizers=[optimizer])
    for key, value in optimizer.state[weight].items():
        if key in COUNTERS:
            assert torch.equal(torch.as_tensor(value), old[key])
            continue
        assert torch.equal(value[[0, 2, 3]], old[key][[0, 1, 3]])
        if key in FIRST_MOMENTS:
            assert value[1].eq(0).all()
        elif key == "ax":
            assert torch.equal(value[1], weight[1])
        else:
            torch.testing.assert_close(value[1], old[key][[0, 1, 3]].mean(0))
    train(net, optimizer, 2)
    assert all(np.isfinite(v).all() for v in contents(net.model, optimizer).values())


def test_first_update_of_a_newborn_does_not_explode() -> None:
    """With zeros as second moments it would be about sqrt(1 / (1 - beta2)) = 30 times that of its siblings."""
    net = chain(4, 5)
    optimizer = torch.optim.Adam(net.model.parameters(), lr=1e-3)
    train(net, optimizer, 200)
    apply_(net.model, net.map, {"a": IndexMap.identity(4).inserting(1)}, optimizers=[optimizer])
    fan_out = net.model.conv2.weight[:, 4]
    train(net, optimizer, 1)
    assert 0 < fan_out.abs().max() < 3e-3


def test_factored_state_of_adafactor_is_not_moved_along_what_it_averages() -> None:
    net = perceptron(4, 5)
    optimizer = torch.optim.Adafactor(net.model.parameters())
    train(net, optimizer, 2)
    state = optimizer.state[net.model.fc2.weight]
    rows, cols = state["row_var"].clone(), state["col_var"].clone()
    apply_(net.model, net.map, {"a": IndexMap((3, 1), 4), "b": IndexMap((4, 0, 2), 5)}, optimizers=[optimizer])
    state = optimizer.state[net.model.fc2.weight]
    assert torch.equal(state["row_var"], rows[[4, 0, 2]]) and torch.equal(state["col_var"], cols[:, [3, 1]])
    train(net, optimizer, 2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is there since torch 2.9")
def test_muon_trains_on() -> None:
    net = perceptron(4, 5)
    matrices = [p for p in net.model.parameters() if p.dim() == 2]
    vectors = [p for p in net.model.parameters() if p.dim() == 1]
    muon, sgd = torch.optim.Muon(matrices, lr=0.01), torch.optim.SGD(vectors, lr=0.01, momentum=0.9)
    train(net, muon, 2)
    momentum = muon.state[net.model.fc2.weight]["momentum_buffer"]
    old = momentum.clone()
    apply_(net.model, net.map, {"a": IndexMap((0, 3, FRESH), 4)}, optimizers=[muon, sgd])
    assert torch.equal(momentum[:, :2], old[:, [0, 3]]) and momentum[:, 2].eq(0).all()
    train(net, muon, 2)


def test_sparse_adam_trains_on() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3)).double()
    places = (place("0.weight", 1, "write", 4), place("1.weight", 1, "read", 4))
    groups = (ChannelGroup("g", places),)
    net = Net(model, ChannelMap(groups=groups, frozen=(), uses=(), shapes=shapes_of(model)), torch.arange(6))
    sparse = torch.optim.SparseAdam(model[0].parameters())

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(net.x), net.x % 3).backward()
        sparse.step()

    step()
    old = sparse.state[model[0].weight]["exp_avg"].clone()
    apply_(model, net.map, {"g": IndexMap((1, 2, FRESH), 4)}, optimizers=[sparse])
    assert torch.equal(sparse.state[model[0].weight]["exp_avg"][:, :2], old[:, [1, 2]])
    step()
    assert sparse.state[model[0].weight]["step"] == 2


# ------------------------------------------------------------------------------------------------------ live objects


@any_net
def test_objects_hooks_and_weak_references_survive(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    objects = {name: id(t) for name, t in tensors_of(net.model).items()}
    refs = [weakref.ref(p) for p in net.model.parameters()]
    seen: list[tuple[torch.Size, torch.Size]] = []
    accumulated: list[torch.Size] = []
    for p in net.model.parameters():
        p.register_hook(lambda grad, p=p: seen.append((grad.shape, p.shape)))
        p.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.shape))
    apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer])
    touched = {axis.name for group in net.map.groups for axis in group.axes}
    assert all((p.grad is None) == (name in touched) for name, p in net.model.named_parameters())
    train(net, optimizer, 1)
    assert objects == {name: id(t) for name, t in tensors_of(net.model).items()}
    assert len(seen) == len(refs) == len(accumulated) and all(grad == p for grad, p in seen)
    assert all(ref() is p for ref, p in zip(refs, net.model.parameters(), strict=True))


@any_net
def test_old_loss_still_held_does_no_harm(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    old_loss = net.model(net.x).sum()
    new_map = apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer])
    train(net, optimizer, 1)  # with the old graph alive
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"size|inplace"):  # its weights are gone: it says so, leaves no gradient
        old_loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.model.parameters())
    train(net, optimizer, 1)
    for name, p in net.model.named_parameters():
        assert tuple(p.grad.shape) == tuple(p.shape) == new_map.shapes[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_accumulator_of_the_old_shape_is_forgotten(dtype: torch.dtype) -> None:
    net = perceptron(4, 5)
    net.model.to(dtype)
    x = net.x.to(dtype)
    old_loss = net.model(x).sum()
    apply_(net.model, net.map, wild_plan(net))
    net.model(x).sum().backward()
    assert old_loss.grad_fn is not None
    assert all(p.grad.shape == p.shape for p in net.model.parameters())


def test_scheduler_and_param_groups_go_on() -> None:
    net = chain(4, 5)
    decayed = [p for p in net.model.parameters() if p.dim() > 1]
    others = [p for p in net.model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(net, optimizer, 1)
    scheduler.step()
    apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer])
    train(net, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], decayed, strict=True))


def test_optimizer_named_twice_is_resized_once() -> None:
    net = chain(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    old = optimizer.state[net.model.conv1.weight]["exp_avg"].clone()
    apply_(net.model, net.map, {"a": IndexMap((3, 2, 1, 0), 4)}, optimizers=[optimizer, optimizer])
    assert torch.equal(optimizer.state[net.model.conv1.weight]["exp_avg"], old.flip(0))


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.again, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.again.weight = self.enter.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.enter(x)) + F.relu(self.again(x)))

    places = [place("enter.weight", 0, "write", 6), place("head.weight", 1, "read", 6)]
    places += carried("enter", "bias", 6) + carried("again", "bias", 6)
    net_ = net(Tied(), torch.randn(5, 4), g=places)
    apply_(net_.model, net_.map, {"g": IndexMap.removing([2], 6)})
    assert net_.model.again.weight is net_.model.enter.weight and net_.model.again.out_features == 5
    assert net_.model(net_.x).shape == (5, 3)


@any_net
def test_followers_share_the_fresh_content_and_keep_their_own(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    ema = AveragedModel(net.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    plain = copy.deepcopy(net.model)
    train(net, optimizer, 2)
    ema.update_parameters(net.model)
    alone = copy.deepcopy(ema.module)
    plan, seed = wild_plan(net), torch.Generator().manual_seed(3)
    apply_(net.model, net.map, plan, optimizers=[optimizer], followers=[ema, plain], generator=seed)
    apply_(alone, net.map, plan)
    fresh = {name: t.clone() for name, t in tensors_of(net.model).items()}
    gathers = net.map.gathers(plan)
    for name, t in tensors_of(ema.module).items():
        mask = torch.zeros(t.shape, dtype=torch.bool)
        for axis, source in gathers.items():
            if axis.name == name:
                mask.index_fill_(axis.dim, torch.tensor(np.flatnonzero(source < 0)), True)
        assert torch.equal(t[mask], fresh[name][mask]), name
        assert torch.equal(t[~mask], tensors_of(alone)[name][~mask]), name
    assert attributes(ema.module) == attributes(net.model) == attributes(plain)
    train(net, optimizer, 1)
    ema.update_parameters(net.model)
    assert ema.eval()(net.x).shape == plain.eval()(net.x).shape == (8, 3)


@pytest.mark.parametrize("build", [chain, depthwise, grouped, transposed])
def test_memory_format_stays(build: Build) -> None:
    net = build(4, 5)
    net.model.to(memory_format=torch.channels_last)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    before = {k: id(v) for k, v in optimizer.state.items()}
    wild = wild_plan(net)
    wanted = build(6, 6).model.to(memory_format=torch.channels_last)
    apply_(net.model, net.map, wild, optimizers=[optimizer])
    for (name, p), q in zip(net.model.named_parameters(), wanted.parameters(), strict=True):
        assert p.stride() == q.stride(), name
        assert optimizer.state[p]["exp_avg"].stride() == q.stride(), name
    assert before == {k: id(v) for k, v in optimizer.state.items()}


@any_net
def test_plain_memory_format_stays(build: Build) -> None:
    net = build(4, 5)
    apply_(net.model, net.map, wild_plan(net))
    assert all(t.stride() == torch.empty(t.shape).stride() for t in tensors_of(net.model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_requires_grad_stay(dtype: torch.dtype) -> None:
    net = chain(4, 5)
    net.model.to(dtype)
    net.model.conv1.weight.requires_grad_(False)
    before = {name: (t.dtype, t.requires_grad) for name, t in tensors_of(net.model).items()}
    apply_(net.model, net.map, wild_plan(net))
    assert before == {name: (t.dtype, t.requires_grad) for name, t in tensors_of(net.model).items()}
    assert all(t.isfinite().all() for t in tensors_of(net.model).values())


@any_net
def test_meta_tensors_can_be_resized(build: Build) -> None:
    net = build(4, 5)
    net.model.to("meta")
    random_state = torch.get_rng_state()
    new_map = apply_(net.model, net.map, wild_plan(net))
    assert torch.equal(random_state, torch.get_rng_state())  # a rehearsal costs the run no random number
    assert shapes_of(net.model) == new_map.shapes == shapes_of(build(6, 6).model)
    assert all(t.is_meta for t in tensors_of(net.model).values())
    assert net.model.eval()(net.x.to("meta")).shape == (8, 3)


def test_looking_at_a_spectral_norm_does_not_change_it() -> None:
    """Its weight is computed by a power iteration, which in training mode writes its buffers at every look."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), spectral_norm(nn.Linear(6, 3))).double().train()
    places = [place("0.weight", 0, "write", 6), *carried("0", "bias", 6)]
    places += [place("2.parametrizations.weight.original", 1, "read", 6)]
    places += [place("2.parametrizations.weight.0._v", 0, "carry", 6)]
    net_ = ChannelMap(groups=(ChannelGroup("g", tuple(places)),), frozen=(), uses=(), shapes=shapes_of(model))
    u, v = (b.clone() for _, b in sorted(model.named_buffers()))
    apply_(model, net_, {"g": IndexMap.removing([4], 6)})
    buffers = dict(model.named_buffers())
    assert torch.equal(buffers["2.parametrizations.weight.0._u"], u)
    assert torch.equal(buffers["2.parametrizations.weight.0._v"], v[[0, 1, 2, 3, 5]])
    assert model[2].in_features == 5 and model[2].parametrizations.weight.training


def test_masks_of_torch_prune_follow() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    places = [place(f"0.{n}", 0, "write", 6) for n in ("weight_orig", "weight_mask", "bias")]
    places += [place("2.weight", 1, "read", 6)]
    net_ = ChannelMap(groups=(ChannelGroup("g", tuple(places)),), frozen=(), uses=(), shapes=shapes_of(model))
    apply_(model, net_, {"g": IndexMap.removing([0], 6)})
    assert model[0].out_features == 5 and model(torch.randn(2, 4).double()).shape == (2, 3)


# -------------------------------------------------------------------------------------------------- all or nothing


class InjectedError(Exception):
    pass


def faults(monkeypatch: pytest.MonkeyPatch, k: int, torn: bool) -> list[int]:
    """Lets the k-th write fail: before it did anything or, if torn, after the tensor was emptied."""
    owner, name = (changes, "set_data") if torn else (Journal, "perform")
    real, calls = getattr(owner, name), [0]

    def faulty(*args: object) -> None:
        calls[0] += 1
        if calls[0] != k:
            return real(*args)
        if torn:
            args[0].data = torch.empty(0, dtype=torch.float16)  # type: ignore[attr-defined]
            args[0].grad = None  # type: ignore[attr-defined]
        raise InjectedError

    monkeypatch.setattr(owner, name, faulty)
    return calls


@any_net
@pytest.mark.parametrize("torn", [False, True])
def test_fault_at_any_write_leaves_everything_as_it_was(
    build: Build, torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = build(4, 5)
    net.model.to(memory_format=torch.channels_last)
    optimizer, generator = adam(net.model), torch.Generator().manual_seed(5)
    train(net, optimizer, 2)
    ema = AveragedModel(net.model)
    whole = (net.model, optimizer, ema)
    before, objects = contents(*whole), identities(net.model, optimizer) + identities(ema)
    looks, random_state = attributes(net.model) + attributes(ema), generator.get_state()
    for k in range(1, 1000):
        with monkeypatch.context() as patched:
            calls = faults(patched, k, torn)
            writes = 0
            try:
                apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer], followers=[ema], generator=generator)
                writes = calls[0]
            except InjectedError:
                pass
        if writes:
            break
        assert_same(before, contents(*whole))
        assert objects == identities(net.model, optimizer) + identities(ema), k
        assert looks == attributes(net.model) + attributes(ema)
        assert torch.equal(random_state, generator.get_state())
    assert k == writes + 1 > len(net.map.shapes)  # and without a fault the surgery succeeded
    assert net.model.eval()(net.x).shape == (8, 3)
    train(net, optimizer, 1)


def test_failing_attribute_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = chain(4, 5)
    before, looks = contents(net.model), attributes(net.model)

    def broken(*_: object) -> dict[str, object]:
        raise InjectedError

    monkeypatch.setitem(attribute_rules.ATTRIBUTES, nn.Linear, broken)
    with pytest.raises(InjectedError):
        apply_(net.model, net.map, wild_plan(net))
    assert_same(before, contents(net.model))
    assert looks == attributes(net.model)


@any_net
def test_the_journal_saves_no_more_than_what_is_removed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(4, 5)
    saved: list[tuple[int, int]] = []
    real = Journal.perform

    def watched(journal: Journal, change: object) -> None:
        if isinstance(change, changes.TensorChange):
            saved.append((sum(t.numel() for t in change.lost), change.target.numel()))
        real(journal, change)

    monkeypatch.setattr(Journal, "perform", watched)
    apply_(net.model, net.map, {"a": IndexMap((2, FRESH, 0, 1), 4), "b": IndexMap((0, 1, 2, 4, 4, 3), 5)})
    assert len(saved) == len({axis.name for group in net.map.groups for axis in group.axes})
    assert all(lost <= old / 4 for lost, old in saved)
    assert sum(lost for lost, _ in saved) > 0


# ------------------------------------------------------------------------------------------------------------ refusals


def refusals() -> Iterator[tuple[str, Callable[[Net], dict[str, list[object]]], type[Exception], str]]:
    class MyAdam(torch.optim.Adam):
        pass

    def stranger(net: Net) -> dict[str, list[object]]:
        optimizer = adam(net.model)
        train(net, optimizer, 1)
        optimizer.state[net.model.conv1.weight]["hessian"] = torch.zeros(4)
        return {"optimizers": [optimizer]}

    def misshapen(net: Net) -> dict[str, list[object]]:
        optimizer = adam(net.model)
        train(net, optimizer, 1)
        optimizer.state[net.model.conv1.weight]["exp_avg"] = torch.zeros(4)
        return {"optimizers": [optimizer]}

    yield "subclass", lambda n: {"optimizers": [MyAdam(n.model.parameters())]}, UnsupportedOptimizerError, "MyAdam"
    yield "LBFGS", lambda n: {"optimizers": [torch.optim.LBFGS(n.model.parameters())]}, TypeError, "LBFGS"
    yield "unknown state", stranger, UnsupportedOptimizerError, "'hessian'"
    yield "state of other shape", misshapen, StaleMapError, r"\(4,\), expected \(4, 2, 3, 3\)"
    yield "foreign optimizer", lambda n: {"optimizers": [adam(nn.Linear(2, 2))]}, SurgeryError, "holds none of the"
    yield "foreign follower", lambda n: {"followers": [nn.Linear(2, 2)]}, StaleMapError, "follower 0 .Linear. has no"
    yield "other widths", lambda n: {"followers": [chain(4, 6).model]}, StaleMapError, "trace the network again"
    yield "no copy", lambda n: {"followers": [n.model]}, SurgeryError, "pass copies only"


@pytest.mark.parametrize(("arguments", "error", "message"), [pytest.param(*r[1:], id=r[0]) for r in refusals()])
def test_refused_before_anything_changed(
    arguments: Callable[[Net], dict[str, list[object]]],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = chain(4, 5)
    given_arguments = arguments(net)
    before = contents(net.model)
    calls = faults(monkeypatch, 1, torn=False)
    with pytest.raises(error, match=message):
        apply_(net.model, net.map, wild_plan(net), **given_arguments)
    assert calls == [0]
    assert_same(before, contents(net.model))


def test_stale_map_is_refused() -> None:
    net = chain(4, 5)
    apply_(net.model, net.map, {"a": IndexMap.removing([0], 4)})
    with pytest.raises(StaleMapError, match=r"'bn1.bias' of the model has shape \(3,\)"):
        apply_(net.model, net.map, {"a": IndexMap.removing([0], 4)})


def test_plan_for_another_width_is_refused() -> None:
    net = chain(4, 5)
    with pytest.raises(ValueError, match="written for width 7"):
        apply_(net.model, net.map, {"a": IndexMap.removing([0], 7)})


def test_parameters_that_share_memory_are_refused() -> None:
    net = residual(4, 5)
    net.model.bn1.bias.data = net.model.bn1.weight.data
    with pytest.raises(SurgeryError, match="share memory"):
        apply_(net.model, net.map, {"b": IndexMap.removing([0], 5)})


@pytest.mark.parametrize("source", [(0, 1, 2, 3, 4), (1, 2, 3, 4), (0, 1, FRESH, 2)])
def test_torn_groups_are_refused(source: tuple[int, ...]) -> None:
    """Channel by channel in a net whose conv has groups of two."""
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1)).double()
    places = (place("1.weight", 0, "carry", 6), place("2.weight", 1, "read", 6))
    groups = (ChannelGroup("g", (*places, *carried("1", "bias", 6))),)
    net_ = ChannelMap(groups=groups, frozen=(), uses=(), shapes=shapes_of(model))
    before = contents(model)
    with pytest.raises(SurgeryError, match="tears a conv group"):
        apply_(model, net_, {"g": IndexMap(source, 6)})
    assert_same(before, contents(model))


def test_grouped_transposed_conv_counts_its_bias_in_blocks_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 9, 1, groups=3), nn.Conv2d(9, 2, 1)).double()
    places = [place("0.weight", 0, "write", 3, copies=2), *carried("0", "bias", 3, copies=2)]
    places += [place("1.weight", 0, "carry", 3, copies=2), *carried("1", "bias", 3, copies=3)]
    places += [place("2.weight", 1, "read", 3, copies=3)]
    net_ = ChannelMap(groups=(ChannelGroup("g", tuple(places)),), frozen=(), uses=(), shapes=shapes_of(model))
    apply_(model, net_, {"g": IndexMap((2, 0), 3)})
    up = model[1]
    assert (up.in_channels, up.out_channels, up.groups) == (4, 6, 2)
    assert model(torch.randn(1, 2, 3, 3).double()).shape == (1, 2, 3, 3)


def test_distributed_wrapper_is_refused(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        net = chain(4, 5)
        wrapped = nn.parallel.DistributedDataParallel(net.model)
        with pytest.raises(SurgeryError, match="wrap it again"):
            apply_(wrapped, net.map, {"a": IndexMap.removing([0], 4)})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(SurgeryError, ValueError), (StaleMapError, ValueError), (UnsupportedOptimizerError, TypeError)],
)
def test_refusals_are_ours_and_builtins(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, AutoWidthError) and issubclass(error, builtin)


# ------------------------------------------------------------------------------------------------- before the surgery


def test_optimizers_are_checked_before_training_starts() -> None:
    net = chain(4, 5)
    check_optimizers([make(kind, net.model) for kind in (*OPTIMIZERS, *NOT_ELEMENTWISE)])
    lbfgs = torch.optim.LBFGS(net.model.parameters())
    with pytest.raises(UnsupportedOptimizerError, match=r"torch\.optim\.lbfgs\.LBFGS cannot be resized, only that of"):
        check_optimizers([adam(net.model), lbfgs])


def test_holders_are_the_optimizers_that_hold_a_named_parameter() -> None:
    net = chain(4, 5)
    first = adam(net.model.conv1)
    others = torch.optim.SGD([{"params": net.model.bn1.parameters()}, {"params": net.model.head.parameters()}], lr=0.1)
    both = [others, first]
    assert holders(both, net.model, ["conv1.weight"]) == (first,)
    assert holders(both, net.model, iter(["head.bias"])) == (others,)
    assert holders(both, net.model, ["conv1.weight", "bn1.weight"]) == (others, first)  # in the order that was given
    assert holders(both, net.model, ["bn1.running_mean", "conv2.weight", "nobody"]) == ()
    plan = {"b": IndexMap.removing([0], 5)}  # with the optimizers that surgery wants
    touched = {axis.name for axis in net.map.gathers(plan)}
    apply_(net.model, net.map, plan, optimizers=holders(both, net.model, touched))
    assert net.model.head.in_features == 16


def test_examples_in_docstrings_hold() -> None:
    found = [doctest.testmod(module) for module in (edits, checks, tensor_contents)]
    assert [result.failed for result in found] == [0, 0, 0]
    assert all(result.attempted for result in found)
