"""Laws of the probe: equal to one backward per sample, sums add up, the model is left as it was."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import cached

from autowidth.channels import ChannelMap, ParamAxis
from autowidth.review.batches import Batches, Loss, ProbeError, of_pairs
from autowidth.review.profit import Sums
from autowidth.review.reconstruct import Moments, co_channel_positions, readers_without, reconstruction
from autowidth.review.state import quiet, swapped
from autowidth.review.statistics import Statistics, probe, read_gates, read_moments
from autowidth.trace import trace

pytestmark = pytest.mark.filterwarnings("error")

CLASSES = 3
SAMPLES = 6
CE = of_pairs(F.cross_entropy)


def summed(model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss = CE) -> Sums:
    """The sums of one probe."""
    return probe(model, channel_map, batches, loss).sums


# ---------------------------------------------------------------------------------------------- nets, one hazard each


class Chain(nn.Module):
    """A second convolution that strides, and a map of four pixels flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).flatten(1))


class InPlace(nn.Module):
    """What the readers put out is overwritten at once."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), act, nn.Conv2d(4, 5, 3, padding=1), act)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """One stream, two layers that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((2, 4), (4, 5), (5, 4)))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.back(F.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    """A module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.mean((2, 3))))
        return self.head(x + self.body(torch.tanh(self.body(x))))


class Shared(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mean((2, 3)))
        return self.head(torch.tanh(self.one(x)) + torch.sigmoid(self.two(x)))


class Concat(nn.Module):
    """One reader of two channel groups and of the model's input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.join, self.head = nn.Conv2d(9, 5, 3, padding=1), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), x, F.relu(self.right(x))], 1)
        return self.head(F.relu(self.join(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """A channel passes a depthwise convolution, which reads nothing, on its way to its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point, self.head = nn.Conv2d(4, 5, 1), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.point(F.relu(self.deep(self.stem(x))))).mean((2, 3)))


class Transposed(nn.Module):
    """A reader that holds its input channels in dim 0 of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 5, 2, stride=2)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(torch.tanh(self.stem(x)))).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers and a 1-D convolution over sequences: (N, 2, 4, 4) is taken for 16 tokens of 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.along = nn.Linear(2, 4), nn.Linear(4, 5), nn.Conv1d(5, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.hidden(F.gelu(self.stem(x.flatten(2).transpose(1, 2)))))
        return self.head(torch.tanh(self.along(x.transpose(1, 2))).mean(2))


class Functional(nn.Module):
    """No modules, only calls; every argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 2, 3, 3) / 4)
        self.b = nn.Parameter(torch.randn(5, 4, 3, 3) / 6)
        self.c = nn.Parameter(torch.randn(CLASSES, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(weight=self.a, input=x, padding=1))
        x = F.relu(F.conv2d(input=x, weight=self.b, bias=None, padding=1))
        return F.linear(x.mean((2, 3)), weight=self.c)


class FixedReader(nn.Module):
    """A reader that is not trained: its weight is a buffer."""

    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(5, CLASSES)
        self.register_buffer("fixed", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.stem(x.mean((2, 3)))), self.fixed)))


class Mute(nn.Module):
    """A head that only training mode uses, and one whose result is thrown away without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, CLASSES)
        self.extra, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.mean((2, 3))))
        with torch.no_grad():
            self.seen = self.head(x).detach().abs().mean()
        return self.head(x) + self.last(F.relu(self.extra(x))) if self.training else self.head(x)


def normed(kind: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """The chain, its readers behind a parametrization."""

    def build() -> nn.Module:
        model = Chain()
        kind(model.second)
        kind(model.head)
        return model

    return build


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "in place": InPlace,
    "residual": Residual,
    "called twice": Twice,
    "shared weight": Shared,
    "concat": Concat,
    "depthwise": Depthwise,
    "transposed": Transposed,
    "tokens": Tokens,
    "weight norm": normed(weight_norm),
}
CALLS: dict[str, Callable[[], nn.Module]] = {"functional": Functional, "fixed reader": FixedReader}
every_net = pytest.mark.parametrize("build", [pytest.param(make, id=name) for name, make in NETS.items()])
every_kind = pytest.mark.parametrize("build", [pytest.param(make, id=name) for name, make in (NETS | CALLS).items()])


def made(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ChannelMap]:
    """A net in evaluation mode with running statistics that differ, and its channel map."""
    torch.manual_seed(3)
    model = build().to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    return model.eval(), _map(build, dtype)


@functools.cache
def _map(build: Callable[[], nn.Module], dtype: torch.dtype) -> ChannelMap:
    """Traced once per kind of net: the map holds names and numbers only."""
    return trace(build().to(dtype), images(1).to(dtype))


def images(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def batch(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return images(count), labels(count)


# ------------------------------------------------------------------------------------------ references, slow and plain


def _reads(module: nn.Module, axis: ParamAxis, model: nn.Module) -> bool:
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
        return False
    return any(p is dict(model.named_parameters())[axis.name] for p in module.parameters())


def _channel_dim(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def by_hooks(model: nn.Module, channel_map: ChannelMap, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """t (n, width) by group: one forward and backward per sample, activation x gradient at each reader's own input."""
    model = copy.deepcopy(model)
    rows: dict[str, list[Tensor]] = {group.name: [] for group in channel_map.groups}
    axes = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    for i in range(len(x)):
        seen: list[tuple[nn.Module, Tensor]] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], seen: list[tuple[nn.Module, Tensor]] = seen) -> Tensor:
            source = args[0].clone()
            source.retain_grad()
            seen.append((module, source))
            return source

        readers = [m for m in model.modules() if any(_reads(m, axis, model) for axis in axes)]
        handles = [module.register_forward_pre_hook(keep) for module in readers]
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for handle in handles:
            handle.remove()
        for group in channel_map.groups:
            t = torch.zeros(group.width, dtype=torch.float64)
            for place in group.with_role("read"):
                for module, source in seen:
                    if _reads(module, place.axis, model):
                        assert source.grad is not None
                        taken = (source * source.grad).movedim(_channel_dim(module), 0).flatten(1).sum(1)
                        t += torch.stack([taken[list(positions)].sum() for positions in place.index])
            rows[group.name].append(t.detach())
    return {name: torch.stack(ts) for name, ts in rows.items()}


def by_weights(model: nn.Module, channel_map: ChannelMap, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """t (n, width) by group from the weights alone.

    What a reader makes of a channel is linear in its slice of the weight as in the channel itself, so by Euler's
    theorem activation x gradient, summed over positions and calls, equals weight x gradient of the weight.
    """
    rows: dict[str, list[Tensor]] = {group.name: [] for group in channel_map.groups}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for i in range(len(x)):
        with cached():
            weights = {}
            for axis in {place.axis for group in channel_map.groups for place in group.with_role("read")}:
                owner, hidden, _ = axis.name.partition(".parametrizations.")
                weights[axis] = model.get_submodule(owner).weight if hidden else tensors[axis.name]
                weights[axis].requires_grad_()
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            gradients = torch.autograd.grad(loss, list(weights.values()))
        product = {a: w.detach() * g for (a, w), g in zip(weights.items(), gradients, strict=True)}
        for group in channel_map.groups:
            t = torch.zeros(group.width, dtype=torch.float64)
            for place in group.with_role("read"):
                along = product[place.axis].movedim(place.axis.dim, 0).flatten(1).sum(1)
                t += torch.stack([along[list(positions)].sum() for positions in place.index])
            rows[group.name].append(t)
    return {name: torch.stack(ts) for name, ts in rows.items()}


def assert_same_t(sums: Sums, reference: dict[str, Tensor], *, rtol: float = 1e-4) -> None:
    assert sums.first.keys() == sums.second.keys() == reference.keys()
    for name, t in reference.items():
        scale = float(t.abs().max())
        assert scale > 0, f"{name} has no effect on the loss: the test says nothing"
        torch.testing.assert_close(sums.first[name].double(), t.sum(0), rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(sums.second[name].double(), t.square().sum(0), rtol=rtol, atol=rtol * scale**2)


def by_group(sums: Sums) -> list[dict[str, Tensor]]:
    return [sums.first, sums.second, sums.rest_first, sums.rest_second]


def assert_same_sums(one: Sums, other: Sums) -> None:
    assert one.samples == other.samples
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for a, b, whole in zip(by_group(one), by_group(other), by_group(one)[:2] * 2, strict=True):
        assert a.keys() == b.keys()
        for name in a:  # what is left is compared with what there was
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3 * float(whole[name].abs().max()) + 1e-9)


def assert_same_moments(one: dict[ParamAxis, Moments], other: dict[ParamAxis, Moments]) -> None:
    assert one.keys() == other.keys()
    for axis, moments in one.items():
        twin = other[axis]
        assert (moments.inputs, moments.offset) == (twin.inputs, twin.offset)
        for a, b in ((moments.gram, twin.gram), (moments.total, twin.total)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(float(b.abs().max()), 1e-6))


# ------------------------------------------------------------------------------------------------------ what is summed


@every_net
def test_t_equals_one_backward_per_sample(build: Callable[[], nn.Module]) -> None:
    model, channel_map = made(build)
    assert channel_map.groups
    assert_same_t(summed(model, channel_map, [batch()]), by_hooks(model, channel_map, *batch()))


@every_kind
def test_t_equals_weight_times_gradient_of_the_weight(build: Callable[[], nn.Module]) -> None:
    model, channel_map = made(build)
    assert channel_map.groups
    sums = summed(model, channel_map, [batch()])
    assert_same_t(sums, by_weights(model, channel_map, *batch()))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def by_fading(model: nn.Module, channel_map: ChannelMap, found: Statistics, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """t (n, width) by group: minus the slope of each sample's loss on the way to the network without a channel.

    The readers' tensors go straight from what they are to what reconstruction makes of them; central differences.
    """
    now = tensors_of(model)
    rows: dict[str, list[Tensor]] = {group.name: [] for group in channel_map.groups}
    for group in channel_map.groups:
        for channel in range(group.width):
            there = readers_without({group.name: [channel]}, channel_map, found.known, now)
            losses = []
            for step in (1e-6, -1e-6):  # short of every kink
                way = {name: now[name].detach() + step * (goal - now[name].detach()) for name, goal in there.items()}
                with swapped(model, way), torch.no_grad():
                    losses.append(F.cross_entropy(model(x), y, reduction="none"))
            rows[group.name].append((losses[1] - losses[0]) / 2e-6)
    return {name: torch.stack(columns, 1) for name, columns in rows.items()}


class DenseNorm(nn.Module):
    """Norms behind a reader, with nobody between, behind a sum, and behind two readers at once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.one, self.norm = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.two, self.late = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.left, self.right = (nn.Conv2d(5, 3, 1, bias=False) for _ in range(2))
        self.both = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(F.relu(self.stem(x)))))
        x = F.relu(self.late(self.two(x) + x))
        return self.head(torch.tanh(self.both(self.left(x)) * self.both(self.right(x))).mean((2, 3)))


UNTOUCHED = {name: make for name, make in (NETS | CALLS).items() if name != "weight norm"}


@pytest.mark.parametrize("name", [*UNTOUCHED, "dense norm"])
def test_what_co_channels_leave_is_the_slope_towards_the_network_without_the_channel(name: str) -> None:
    """With the bias or the running mean that takes the constant part."""
    build = DenseNorm if name == "dense norm" else UNTOUCHED[name]
    model, channel_map = made(build)
    x, y = batch(24)
    found = probe(model, channel_map, [(x[:10], y[:10]), (x[10:], y[10:])], CE)
    sums = found.sums
    for group, t in by_fading(model, channel_map, found, x, y).items():
        scale = float((sums.second[group].max() / sums.samples).sqrt())  # what others replace is no measure
        torch.testing.assert_close(sums.rest_first[group].double(), t.sum(0), rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(sums.rest_second[group].double(), t.square().sum(0), rtol=1e-3, atol=1e-4 * scale**2)


def test_what_can_take_a_constant() -> None:
    """A bias, or the running mean of the norm behind one weight alone; nothing behind a sum, nothing shared."""
    found = {}
    for build in (DenseNorm, Chain, Shared, Transposed, Functional):
        model, channel_map = made(build)
        moments = read_moments(model, channel_map, [batch()], CE)
        found |= {f"{build.__name__}.{axis.name}": sums.offset for axis, sums in moments.items()}
    assert found == {
        "DenseNorm.one.weight": "norm.running_mean", "DenseNorm.two.weight": None, "DenseNorm.left.weight": None,
        "DenseNorm.right.weight": None, "DenseNorm.head.weight": "head.bias", "Chain.second.weight": "second.bias",
        "Chain.head.weight": "head.bias", "Shared.one.weight": None, "Shared.head.weight": "head.bias",
        "Transposed.up.weight": "up.bias", "Transposed.head.weight": "head.bias", "Functional.b": None,
        "Functional.c": None,
    }  # fmt: skip


def test_behind_a_parametrization_nobody_stands_in() -> None:
    model, channel_map = made(NETS["weight norm"])
    sums = summed(model, channel_map, [batch()])
    assert sums.first.keys() == {"first", "second"}
    for name, first in sums.first.items():
        torch.testing.assert_close(sums.rest_first[name], first)
        torch.testing.assert_close(sums.rest_second[name], sums.second[name])


def test_a_probe_makes_two_passes_and_without_reconstruction_one() -> None:
    model, channel_map = made(Chain)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    whole = probe(model, channel_map, [batch()], CE)
    assert len(calls) == 2
    bare = probe(model, channel_map, [batch()], CE, reconstruct=False)
    handle.remove()
    assert len(calls) == 3
    assert whole.known and not bare.known
    for name, first in bare.sums.first.items():
        assert torch.equal(first, whole.sums.first[name])
        assert torch.equal(first, bare.sums.rest_first[name])
    assert whole.loss == pytest.approx(float(F.cross_entropy(model(batch()[0]), batch()[1]).detach()))


def test_a_single_sample_is_a_probe() -> None:
    model, channel_map = made(Chain)
    sums = summed(model, channel_map, [batch(1)])
    assert sums.samples == 1
    assert_same_t(sums, by_hooks(model, channel_map, *batch(1)))
    for name, first in sums.first.items():
        torch.testing.assert_close(sums.second[name], first.square())


def test_the_loss_is_the_sum_over_samples() -> None:
    model, channel_map = made(Chain)
    x, y = batch()
    sums = summed(model, channel_map, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert sums.samples == SAMPLES
    assert sums.loss == pytest.approx(float(F.cross_entropy(model(x), y, reduction="sum").detach()))


@pytest.mark.parametrize("name", ["second.weight", "head.weight"])
def test_moments_of_what_a_reader_reads(name: str) -> None:
    """Positions are the pixels of all samples; pixels that are flattened into the head count as positions too."""
    model, channel_map = made(Chain)
    x, y = batch()
    module = model.get_submodule(name.removesuffix(".weight"))
    read: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        # (1, 12) is three channels of four pixels: the flatten has the pixels of a channel side by side.
        read.append(args[0].reshape(4 if name == "second.weight" else 3, -1).T.detach())

    handle = module.register_forward_hook(keep)
    for i in range(SAMPLES):
        model(x[i : i + 1])
    handle.remove()
    rows = torch.cat(read)
    reader = read_moments(model, channel_map, [(x, y)], CE)[ParamAxis(name, 1)]
    assert reader.inputs == len(rows)
    torch.testing.assert_close(reader.gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reader.total.double(), rows.sum(0), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_used_twice_sums_the_moments_of_both_calls() -> None:
    model, channel_map = made(Twice)
    reader = read_moments(model, channel_map, [batch()], CE)[ParamAxis("body.weight", 1)]
    assert reader.inputs == 2 * SAMPLES
    stem = F.relu(model.stem(images(SAMPLES).mean((2, 3))))
    rows = torch.cat([stem, torch.tanh(model.body(stem))]).detach()
    torch.testing.assert_close(reader.gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-6)


def test_the_order_of_co_channels_is_that_of_their_positions() -> None:
    model, channel_map = made(Chain)
    reader = read_moments(model, channel_map, [batch()], CE)[ParamAxis("head.weight", 1)]
    source = F.relu(model.second(F.relu(model.norm(model.first(images(SAMPLES)))))).flatten(1)
    for co_channel, positions in enumerate(co_channel_positions(channel_map, ParamAxis("head.weight", 1))):
        assert float(reader.total[co_channel]) == pytest.approx(
            float(source[:, list(positions)].sum().detach()), rel=1e-4
        )


def test_what_evaluation_mode_does_not_use_is_worth_nothing() -> None:
    """A head for training only takes no part in the loss: its channels have t = 0, and nothing is refused."""
    model, channel_map = made(Mute)
    sums = summed(model, channel_map, [batch()])
    assert "extra" in sums.first
    assert not sums.first["extra"].any()
    assert not sums.second["extra"].any()
    assert sums.first["stem"].any()


# ------------------------------------------------------------------------------------------------------ sums add up


@every_kind
def test_one_batch_of_eight_equals_two_of_four(build: Callable[[], nn.Module]) -> None:
    model, channel_map = made(build)
    x, y = batch(8)
    whole = summed(model, channel_map, [(x, y)])
    parts = summed(model, channel_map, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert_same_sums(parts, whole)


@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 7)), order=st.randoms(use_true_random=False))
def test_any_split_and_any_order_add_up(cuts: set[int], order: random.Random) -> None:
    """N ranks equal one: each rank's sums may be added in any order, moments first, then what reconstruction leaves."""
    model, channel_map = made(Chain)
    x, y = batch(8)
    ranks = [[(x[a:b], y[a:b])] for a, b in pairwise([0, *sorted(cuts), 8])]
    order.shuffle(ranks)
    moments: dict[ParamAxis, Moments] = {}
    for batches in ranks:
        for axis, more in read_moments(model, channel_map, batches, CE).items():
            if axis in moments:
                moments[axis].add(more)
            else:
                moments[axis] = more
    assert_same_moments(moments, read_moments(model, channel_map, [(x, y)], CE))
    known = reconstruction(moments, channel_map, dict(model.named_parameters()))
    order.shuffle(ranks)
    total = Sums()
    for batches in ranks:
        total.add(read_gates(model, channel_map, batches, CE, known))
    assert_same_sums(total, summed(model, channel_map, [(x, y)]))


# ------------------------------------------------------------------------------------------ the model stays as it was


class Busy(nn.Module):
    """Everything that could change while one looks: dropout, running statistics, a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.second, self.head = nn.Conv2d(4, 5, 1), spectral_norm(nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.norm(self.first(x))))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def drawing(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that draw from every global random state, as an augmenting loader does."""
    for _ in range(count):
        random.random()
        np.random.rand()
        yield torch.randn(4, 2, 4, 4), torch.randint(CLASSES, (4,))


def test_the_probe_in_quiet_touches_nothing() -> None:
    torch.manual_seed(0)
    model = Busy()
    channel_map = trace(model, torch.randn(2, 2, 4, 4))
    assert channel_map.groups
    model.norm.eval()  # as one freezes a norm in the midst of training
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    content = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    versions = {name: p._version for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    with quiet(model):
        summed(model, channel_map, list(drawing(2)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
        assert parameter._version == versions[name]
        assert parameter.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_quiet_puts_modes_and_random_state_back_after_an_error() -> None:
    model = Busy()
    model.norm.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()

    def fail() -> None:
        with quiet(model):
            torch.rand(1)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def not_a_number(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target) * torch.nan


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_and_no_mode_stays_behind(fails: bool) -> None:
    """After a probe, or one that failed, a training step is that of a twin that was never probed, bit for bit."""
    model, channel_map = made(Chain)
    twin = copy.deepcopy(model)
    if fails:
        with pytest.raises(FloatingPointError):
            probe(model, channel_map, [batch()], of_pairs(not_a_number))
    else:
        summed(model, channel_map, [batch()])
    for module in model.modules():
        assert not [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not torch.overrides._get_current_function_mode_stack()
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.train()
        F.cross_entropy(net(images(4)), labels(4)).backward()
        optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------------------- dtypes


def test_autocast_and_no_grad_around_the_probe_change_nothing() -> None:
    model, channel_map = made(Chain, torch.float32)
    x, y = images(SAMPLES).float(), labels(SAMPLES)
    plain = summed(model, channel_map, [(x, y)])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = summed(model, channel_map, [(x, y)])
    for name, first in plain.first.items():
        assert torch.equal(inside.first[name], first)


def test_a_bfloat16_model_is_summed_in_float32() -> None:
    model, channel_map = made(Chain, torch.float32)
    x, y = images(64).float(), labels(64)
    exact = summed(model, channel_map, [(x, y)])
    coarse = summed(model.bfloat16(), channel_map, [(x.bfloat16(), y)])
    for name, first in exact.first.items():
        assert coarse.first[name].dtype == coarse.rest_second[name].dtype == torch.float32
        # Eight bits of mantissa: half a percent a rounding, a handful of roundings on the way.
        assert float((coarse.first[name] - first).norm() / first.norm()) < 0.05
    moments, rounded = (
        read_moments(net, channel_map, [(images_, y)], CE)
        for net, images_ in ((model.float(), x), (copy.deepcopy(model).bfloat16(), x.bfloat16()))
    )
    for axis, sums in rounded.items():
        assert sums.gram.dtype == sums.total.dtype == torch.float32
        assert float((sums.gram - moments[axis].gram).norm() / moments[axis].gram.norm()) < 0.05


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_loss_that_is_not_finite_raises() -> None:
    model, channel_map = made(Chain)
    with pytest.raises(FloatingPointError, match="probe loss is nan"):
        probe(model, channel_map, [batch()], of_pairs(not_a_number))


def test_an_empty_probe_raises() -> None:
    model, channel_map = made(Chain)
    with pytest.raises(ProbeError, match="no data"):
        summed(model, channel_map, [])


class Product(nn.Module):
    """Reads its hidden channels by a bare product, or through a weight computed on the way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.loose = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x.mean((2, 3))))
        x = x @ self.loose if self.how == "product" else F.linear(x, self.body.weight * 0.5, self.body.bias)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize(("how", "weight"), [("product", "loose"), ("computed", "body.weight")])
def test_a_reader_that_cannot_be_watched_is_refused_not_taken_for_worthless(how: str, weight: str) -> None:
    model, channel_map = made(lambda: Product(how))
    assert weight in {place.axis.name for group in channel_map.groups for place in group.with_role("read")}
    with pytest.raises(ProbeError, match=f"cannot see what is read through {weight}"):
        summed(model, channel_map, [batch()])


# ------------------------------------------------------------------------------------- whatever the user's loader gives


class Dual(nn.Module):
    """Two inputs, one of them integers that index a table, the other bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.stem = nn.Embedding(7, 4), nn.Conv2d(2, 4, 3, padding=1)
        self.body, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, CLASSES)

    def forward(self, pixels: Tensor, kind: Tensor) -> Tensor:
        x = F.relu(self.stem(pixels.to(self.stem.weight.dtype) / 255)) + self.table(kind)[:, :, None, None]
        return self.head(F.relu(self.body(x)).mean((2, 3)))


def dual_batch(count: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(4)
    pixels = torch.randint(256, (count, 2, 4, 4), generator=source, dtype=torch.uint8)
    return {"pixels": pixels, "kind": torch.arange(count) % 7, "label": labels(count)}


def dual_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["pixels"], batch["kind"]), batch["label"])


@pytest.mark.parametrize("frozen", ["nothing", "stem", "everything"])
def test_dicts_of_bytes_and_integers_are_batches_and_frozen_layers_are_read(frozen: str) -> None:
    """t is what one backward per sample says, whatever the batch is and whoever trains."""
    torch.manual_seed(3)
    model = Dual().double().eval()
    example = {key: value for key, value in dual_batch(2).items() if key != "label"}
    channel_map = trace(model, example)
    assert {group.name for group in channel_map.groups} >= {"body"}
    batch_ = dual_batch(8)
    reference = probe(model, channel_map, [batch_], dual_loss).sums
    if frozen != "nothing":
        (model.stem if frozen == "stem" else model).requires_grad_(False)
    parts = [{key: value[a:b] for key, value in batch_.items()} for a, b in ((0, 5), (5, 7), (7, 8))]
    found = probe(model, channel_map, parts, dual_loss)
    assert_same_sums(found.sums, reference)
    rows = []
    for i in range(8):
        source = (
            F.relu(
                model.body(
                    F.relu(model.stem(batch_["pixels"][i : i + 1].double() / 255))
                    + model.table(batch_["kind"][i : i + 1])[:, :, None, None]
                )
            )
            .mean((2, 3))
            .detach()
        )
        source.requires_grad_()
        loss = F.cross_entropy(model.head(source), batch_["label"][i : i + 1])
        rows.append((source * torch.autograd.grad(loss, source)[0]).detach()[0])
    torch.testing.assert_close(found.sums.first["body"].double(), torch.stack(rows).sum(0), rtol=1e-4, atol=1e-6)


def test_a_model_that_writes_into_its_inputs_leaves_the_batch_alone() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten())
    x, y = torch.randn(6, 2, 4, 4), labels(6)
    before = x.clone()
    probe(model.eval(), trace(model, torch.zeros(2, 2, 4, 4)), [(x, y)], CE)
    assert torch.equal(x, before)
