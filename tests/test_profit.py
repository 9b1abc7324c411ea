"""Laws of worth: exact where theory says so, equal to slow references, finite where covariances are singular."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autowidth.channels import ChannelGroup, ChannelMap, ParamAxis, Place
from autowidth.review.batches import Batches, Loss, of_pairs
from autowidth.review.profit import Sums, combined, loss_change, profits, trust
from autowidth.review.reconstruct import (
    RIDGE,
    Reconstruction,
    co_channel_positions,
    covariance,
    leftover,
    precision,
    readers_without,
    substitutes,
)
from autowidth.review.state import swapped
from autowidth.review.statistics import Statistics, probe
from autowidth.review.trial import Subject
from autowidth.trace import trace

pytestmark = pytest.mark.filterwarnings("error")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mixed(count: int, channels: int, seed: int = 0) -> Tensor:
    """Correlated channels with means, (count, channels), float64: what a reader may read."""
    source = rng(seed)
    return torch.tensor(source.normal(size=(count, channels)) @ source.normal(size=(channels, channels)) + 0.5)


def cov_of(x: Tensor) -> Tensor:
    """The plain covariance (c, c), without a ridge."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


CE = of_pairs(F.cross_entropy)


def summed(model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss = CE) -> Sums:
    """The sums of one probe."""
    return probe(model, channel_map, batches, loss).sums


def ablated(
    model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss = CE, known: Reconstruction | None = None
) -> dict[tuple[str, int], float]:
    """The true loss change, nats per sample, by group and channel, of taking each filter away by itself."""
    subject = Subject(
        model=model, channel_map=channel_map, loss=loss, scoring=batches, held_out=batches, trained=frozenset(),
        known=known or {},
    )  # fmt: skip
    whole = subject.loss_without({})
    picks = [(group.name, channel) for group in channel_map.groups for channel in range(group.width)]
    return {(name, channel): subject.loss_without({name: [channel]}) - whole for name, channel in picks}


# --------------------------------------------------------------------------------------------------- next-layer profit


class Line(nn.Module):
    """Two hidden layers without activations and one output: the loss is exactly quadratic in every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))[:, 0]


def half_square(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean() / 2


def test_next_layer_is_exact_where_the_fisher_information_is_the_curvature() -> None:
    """Squared loss, one linear output, every error +1 or -1: then predicted and true ablation are the same number.

    Taking channel f away changes the output by -a, a = t / e with e the sample's error, for the gradient at the output
    is e. So the loss changes by ((e - a)^2 - e^2) / 2 = -e a + a^2 / 2 = -t + t^2 / (2 e^2), and e^2 is 1.
    """
    torch.manual_seed(0)
    model = Line().double()
    x = torch.randn(40, 3, dtype=torch.float64)
    error = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(20)
    batches = [(x, (model(x) - error).detach())]
    channel_map = trace(model, x)
    sums = summed(model, channel_map, batches, of_pairs(half_square))
    true = ablated(model, channel_map, batches, of_pairs(half_square))
    assert {group for group, _ in true} == {"first", "second"}
    for name, first in sums.first.items():
        predicted = loss_change(first, sums.second[name], sums.samples)
        for channel, worth in enumerate(predicted.tolist()):
            assert worth == pytest.approx(true[name, channel], rel=1e-4, abs=1e-6)


def test_next_layer_is_the_loss_change_to_first_order_for_a_faint_channel() -> None:
    """The fainter a channel, the closer the prediction: the error falls with the square of its strength."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3
    channel_map = trace(model, x)
    gaps = []
    for strength in (1e-1, 1e-2):
        faint = copy.deepcopy(model)
        with torch.no_grad():
            faint[2].weight[:, 0] *= strength
        sums = summed(faint, channel_map, [(x, y)])
        predicted = float(loss_change(sums.first["0"], sums.second["0"], sums.samples)[0])
        true = ablated(faint, channel_map, [(x, y)])["0", 0]
        gaps.append(abs(predicted - true) / abs(true))
    assert gaps[1] < gaps[0] / 5
    assert gaps[1] < 0.02


def test_a_dead_channel_is_worth_nothing_to_the_next_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].bias[2] = -1e3
    x, y = torch.randn(8, 1, 7, 7), torch.arange(8) % 3
    channel_map = trace(model, x)
    worth = profits(summed(model, channel_map, [(x, y)]), channel_map)["0"]
    assert (worth[2] == 0).all()
    assert (worth[[0, 1, 3], 0] != 0).all()
    assert torch.isfinite(worth).all()


# ---------------------------------------------------------------------------------------------- covariance and leftover


def sums_of(x: Tensor) -> tuple[Tensor, Tensor, int]:
    return x.T @ x, x.sum(0), len(x)


def test_covariance_is_numpys_with_a_ridge() -> None:
    x = mixed(50, 6)
    expected = np.cov(x.numpy(), rowvar=False, bias=True)
    expected += RIDGE * np.trace(expected) / 6 * np.eye(6)
    np.testing.assert_allclose(covariance(*sums_of(x)).numpy(), expected, rtol=1e-10)


def left_of(x: Tensor, cov: Tensor) -> Tensor:
    """What co-channels leave of every channel, (n, c)."""
    return (x - x.mean(0)).double() @ leftover(precision(cov)).T


def unexplained(x: np.ndarray, channel: int) -> np.ndarray:
    """The residual of one channel after least squares, with intercept, on all others."""
    others = np.column_stack([np.delete(x, channel, axis=1), np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(others, x[:, channel], rcond=None)
    return np.asarray(x[:, channel] - others @ solution)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 8))
def test_leftover_is_what_least_squares_on_the_co_channels_leaves(seed: int, channels: int) -> None:
    x = mixed(40, channels, seed)
    expected = np.column_stack([unexplained(x.numpy(), c) for c in range(channels)])
    np.testing.assert_allclose(left_of(x, cov_of(x)).numpy(), expected, atol=1e-7)


def test_channels_without_co_channels_or_correlation_are_left_whole() -> None:
    variances = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(leftover(precision(torch.diag(variances))), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(leftover(torch.tensor([[3.0]])), torch.ones(1, 1))


def test_a_channel_without_a_positive_precision_keeps_all_that_it_carries() -> None:
    assert torch.equal(leftover(torch.tensor([[-1.0, 0.5], [0.5, 2.0]])), torch.tensor([[1.0, 0.0], [0.25, 1.0]]))


def duplicated(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], 1)


def dead(x: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros(len(x), 1, dtype=x.dtype)], 1)


SINGULAR = {
    "a channel twice": duplicated(mixed(50, 4)),
    "a dead channel": dead(mixed(50, 4)),
    "all dead": torch.zeros(50, 4),
    "all constant": torch.full((50, 4), 3.0),
    "fewer positions than channels": mixed(3, 8),
    "one position": mixed(1, 4),
    "a sum of two others": torch.cat([mixed(50, 3), mixed(50, 3)[:, :2].sum(1, keepdim=True)], 1),
    "means that drown the variance": mixed(50, 4) * 1e-2 + 1e3,
    "very small": mixed(50, 4) * 1e-18,
    "very large": mixed(50, 4) * 1e9,
}


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in SINGULAR.items()])
def test_singular_covariances_leave_finite_weights(x: Tensor) -> None:
    mix = leftover(precision(covariance(*sums_of(x.float()))))
    assert torch.isfinite(mix).all()
    assert (mix.diagonal() == 1).all()
    spread = (x - x.mean(0)).double()
    assert ((spread @ mix.T).square().mean(0) <= 1.1 * spread.square().mean(0).max()).all()


def test_a_channel_that_is_there_twice_can_be_replaced_and_its_co_channels_cannot() -> None:
    x = duplicated(mixed(200, 4))
    share = left_of(x, covariance(*sums_of(x))).var(0) / x.var(0)
    alone = left_of(x[:, :4], covariance(*sums_of(x[:, :4]))).var(0) / x[:, :4].var(0)
    assert (share[[0, 4]] < 0.05 * alone[0]).all()
    torch.testing.assert_close(share[1:4], alone[1:4], rtol=0.05, atol=0)


# ------------------------------------------------------------------------------------------------ trust in first orders


def gate_sums(t: Tensor) -> tuple[Tensor, Tensor, int]:
    return t.sum(0), t.square().sum(0), len(t)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), samples=st.integers(1, 40), unit=st.sampled_from([1e-9, 1.0, 1e9]))
def test_trust_is_a_share_and_does_not_depend_on_units(seed: int, samples: int, unit: float) -> None:
    t = torch.tensor(rng(seed).normal(0.3, size=(samples, 7)))
    found = trust(*gate_sums(t))
    assert 0 <= found < 1
    scales = torch.tensor(rng(seed).lognormal(size=7)) * unit
    assert trust(*gate_sums(t * scales)) == pytest.approx(found, abs=1e-9)


def test_noise_is_not_trusted_and_a_clear_mean_is() -> None:
    noise = torch.tensor(rng(1).normal(size=(400, 300)))
    assert trust(*gate_sums(noise)) < 0.2
    assert trust(*gate_sums(noise + 1)) > 0.95
    assert trust(*gate_sums(torch.zeros(5, 3))) == 0
    assert trust(*gate_sums(torch.ones(1, 3))) == 0  # one sample says nothing of its own error


def test_trusted_means_are_nearer_to_the_truth_than_plain_ones() -> None:
    """The theorem of James and Stein, on means whose true spread is as large as their error."""
    source = rng(5)
    true = source.normal(scale=0.1, size=300)
    t = torch.tensor(source.normal(true, 1.0, size=(100, 300)))
    first, second, samples = gate_sums(t)
    none = torch.zeros_like(second)
    plain = -loss_change(first, none, samples).numpy()
    shrunk = -loss_change(first, none, samples, trust(first, second, samples)).numpy()
    assert np.square(shrunk - true).mean() < 0.7 * np.square(plain - true).mean()


# ----------------------------------------------------------------------------------------------------- own-layer profit


def test_own_layer_is_exact_where_the_fisher_information_is_the_curvature() -> None:
    """Squared loss, one linear output, every error +1 or -1: as above, with co-channels that stand in."""
    torch.manual_seed(0)
    model = Line().double()
    x = torch.randn(40, 3, dtype=torch.float64) + 1
    error = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(20)
    batches = [(x, (model(x) - error).detach())]
    channel_map, loss = trace(model, x), of_pairs(half_square)
    found = probe(model, channel_map, batches, loss)
    sums = found.sums
    plain = ablated(model, channel_map, batches, loss)
    for (group, channel), change in ablated(model, channel_map, batches, loss, found.known).items():
        predicted = loss_change(sums.rest_first[group], sums.rest_second[group], sums.samples)[channel]
        assert float(predicted) == pytest.approx(change, rel=1e-3, abs=1e-5 * abs(plain[group, channel]))


def test_a_channel_that_is_there_twice_is_worth_nothing_to_its_own_layer() -> None:
    model, channel_map, x, y = forked()
    with torch.no_grad():
        model.stem.weight[1], model.stem.bias[1] = model.stem.weight[0], model.stem.bias[0]
    found = worths(model, channel_map, [(x, y)])["stem"]
    assert (found[:2, 1].abs() < 0.05 * found[:2, 0].abs()).all()
    assert (found[2:, 1].abs() > 0.05 * found[2:, 0].abs()).any()


# --------------------------------------------------------------------------------------------------------------- parts


class Forked(nn.Module):
    """One stream with two readers, and a map of four pixels flattened into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((F.relu(self.one(x)) + torch.tanh(self.two(x))).flatten(1))


def forked() -> tuple[nn.Module, ChannelMap, Tensor, Tensor]:
    torch.manual_seed(2)
    model = Forked()
    x, y = torch.randn(12, 1, 2, 2), torch.arange(12) % 3
    return model, trace(model, x), x, y


def worths(model: nn.Module, channel_map: ChannelMap, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return profits(summed(model, channel_map, batches), channel_map)


def test_worth_does_not_depend_on_the_batch_size() -> None:
    model, channel_map, x, y = forked()
    expected = worths(model, channel_map, [(x, y)])
    ways = {
        "ones": [(x[i : i + 1], y[i : i + 1]) for i in range(12)],
        "uneven": [(x[:5], y[:5]), (x[5:], y[5:])],
    }
    for batches in ways.values():
        for name, found in worths(model, channel_map, batches).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-6)


def test_parts_have_one_row_per_filter_and_are_finite() -> None:
    model, channel_map, x, y = forked()
    found = worths(model, channel_map, [(x, y)])
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        group.name: (group.width, 2) for group in channel_map.groups
    }
    for part in found.values():
        assert torch.isfinite(part).all()


def test_where_nobody_can_stand_in_both_profits_are_the_same() -> None:
    model, channel_map, x, y = forked()
    sums = probe(model, channel_map, [(x, y)], CE, reconstruct=False).sums
    for part in profits(sums, channel_map).values():
        torch.testing.assert_close(part[:, 1], part[:, 0])


# ----------------------------------------------------------------------------------------------------------- bad input


class Small(nn.Module):
    """Norm, maps and a head; `outputs` of it, or a map of them."""

    def __init__(self, outputs: int = 3, *, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.one, self.norm = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.two = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Conv2d(4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(F.relu(self.two(F.relu(self.norm(self.one(x))))))
        return x if self.dense else x.mean((2, 3))


def bounded(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(torch.nan_to_num(prediction)), target)


def steep(prediction: Tensor, target: Tensor) -> Tensor:
    """A root with an infinite slope at the first sample."""
    return (prediction - prediction[:1].detach()).abs().sum(1).sqrt().mean() + 0 * target.sum()


@dataclass
class Case:
    """A model in evaluation mode with images, targets and a loss; each of `BAD` spoils something of it."""

    model: Small = field(default_factory=lambda: Small().eval())
    x: Tensor = field(default_factory=lambda: torch.randn(6, 2, 4, 4))
    y: Tensor = field(default_factory=lambda: torch.arange(6) % 3)
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def twice(case: Case) -> None:
    case.model.two.weight[1], case.model.two.bias[1] = case.model.two.weight[0], case.model.two.bias[0]


def frozen(case: Case) -> None:
    case.model.two.requires_grad_(False)
    case.model.one.requires_grad_(False)


def huge(case: Case) -> None:
    case.model.one.weight.mul_(1e30)
    case.loss = bounded


def overflowing(case: Case) -> None:
    """The loss and its slopes are finite, their squares are not."""
    case.model.one.weight.mul_(1e25)
    case.loss = lambda prediction, target: (prediction.sum(1) + 0 * target).mean()


def infinite(case: Case) -> None:
    case.model.norm.bias[2] = torch.inf
    case.loss = bounded


BAD: dict[str, Callable[[Case], object]] = {
    "a dead channel": lambda case: case.model.two.bias[1].fill_(-1e4),
    "all channels dead": lambda case: case.model.two.bias.fill_(-1e4),
    "a channel twice": twice,
    "a class that is absent": lambda case: case.y.zero_(),
    "a single sample": lambda case: vars(case).update(x=case.x[:1], y=case.y[:1]),
    "frozen layers": frozen,
    "everything frozen": lambda case: case.model.requires_grad_(False),
    "regression": lambda case: vars(case).update(model=Small(1).eval(), y=torch.randn(6, 1), loss=F.mse_loss),
    "many labels": lambda case: vars(case).update(
        y=torch.randint(0, 2, (6, 3)).float(), loss=F.binary_cross_entropy_with_logits
    ),
    "dense prediction": lambda case: vars(case).update(
        model=Small(dense=True).eval(), y=torch.randint(0, 3, (6, 4, 4))
    ),
    "huge activations": huge,
    "squares that overflow": overflowing,
    "activations that are not finite": infinite,
    "a gradient that is not finite": lambda case: vars(case).update(loss=steep),
}


def bad(name: str) -> Case:
    torch.manual_seed(0)
    case = Case()
    with torch.no_grad():
        BAD[name](case)
    return case


@pytest.mark.parametrize("name", BAD)
def test_no_worth_is_nan_and_nothing_written_is(name: str) -> None:
    case = bad(name)
    model, x, y, loss = case.model, case.x, case.y, case.loss
    channel_map = trace(Small(dense=model.dense), x)
    weights = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    batches = [(x[:2], y[:2]), (x[2:], y[2:])] if len(x) > 2 else [(x, y)]
    statistics = probe(model, channel_map, batches, of_pairs(loss))
    found = profits(statistics.sums, channel_map)
    assert {key: tuple(part.shape) for key, part in found.items()} == {"one": (5, 2), "two": (4, 2)}
    for part in found.values():
        assert torch.isfinite(part).all()
    if name not in ("all channels dead", "huge activations", "activations that are not finite"):
        assert any(part.any() for part in found.values())
    for key, tensor in readers_without({"one": [0, 3], "two": [1]}, channel_map, statistics.known, weights).items():
        assert torch.isfinite(tensor).all() or not torch.isfinite(weights[key]).all(), key


@pytest.mark.parametrize("name", ["regression", "many labels", "dense prediction"])
def test_worth_is_in_the_unit_of_the_loss(name: str) -> None:
    case = bad(name)
    model, x, y, loss = case.model, case.x, case.y, case.loss
    channel_map = trace(model, x)

    def tenfold(prediction: Tensor, target: Tensor) -> Tensor:
        return 10 * loss(prediction, target)

    one, ten = (summed(model, channel_map, [(x, y)], of_pairs(how)) for how in (loss, tenfold))
    for group, first in one.first.items():
        torch.testing.assert_close(ten.first[group], 10 * first, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(ten.rest_second[group], 100 * one.rest_second[group], rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- fold


def mapped(length: int, *rows: tuple[tuple[int, ...], ...]) -> ChannelMap:
    """A map in which each argument is one group's positions on the same reading axis."""
    axis = ParamAxis("w", 1)
    groups = tuple(ChannelGroup(f"g{i}", (Place(axis, "read", index),)) for i, index in enumerate(rows))
    return ChannelMap(groups=groups, frozen=(), uses=(), shapes={"w": (2, length)})


@settings(max_examples=25)
@given(widths=st.lists(st.integers(1, 4), min_size=1, max_size=3), copies=st.integers(1, 4))
def test_co_channels_take_every_position_of_every_channel_once(widths: list[int], copies: int) -> None:
    start, groups = 0, []
    for width in widths:
        groups.append(tuple(tuple(range(start + c * copies, start + (c + 1) * copies)) for c in range(width)))
        start += width * copies
    found = co_channel_positions(mapped(start, *groups), ParamAxis("w", 1))
    assert len({len(row) for row in found}) == 1
    assert sorted(p for row in found for p in row) == list(range(start))
    assert len(found) == (sum(widths) if copies > 1 else start)


def test_co_channels_keep_positions_apart_where_groups_differ_in_copies() -> None:
    channel_map = mapped(6, ((0, 1), (2, 3)), ((4,), (5,)))
    assert co_channel_positions(channel_map, ParamAxis("w", 1)) == tuple((p,) for p in range(6))


# ------------------------------------------------------------------------------------------------------------ combined


def test_combined_weighs_the_two_profits() -> None:
    table = torch.tensor([[1.0, 10.0], [-2.0, 5.0]])
    assert torch.equal(combined(table, torch.tensor([1.0, 0.0])), table[:, 0])
    assert torch.equal(combined(table, torch.tensor([0.0, 2.0])), 2 * table[:, 1])
    both = combined(table, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(both, 0.5 * table[:, 0] + 2 * table[:, 1])
    assert math.isclose(float(both[1]), 9.0)


# ------------------------------------------------------------------------------------------------------ reconstruction


class Pair(nn.Module):
    """A linear layer whose hidden channels are linear in each other, and its reader with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(x))


def looked_at(model: nn.Module, x: Tensor) -> tuple[ChannelMap, Statistics, dict[str, Tensor]]:
    y = torch.randint(0, 4, (len(x),))
    channel_map = trace(model, x[:2])
    return channel_map, probe(model, channel_map, [(x, y)], CE), dict(model.named_parameters())


@pytest.mark.parametrize("gone", [[0], [4, 1], [0, 1, 2]])
def test_channels_that_co_channels_predict_exactly_leave_without_a_trace(gone: list[int]) -> None:
    """Six channels of three inputs: any three of them carry everything, means included."""
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(400, 3) + 1
    channel_map, found, weights = looked_at(model, x)
    before = model(x).detach()
    tensors = readers_without({"write": gone}, channel_map, found.known, weights)
    assert not tensors["read.weight"][:, gone].any()
    with swapped(model, tensors):
        error = (model(x).detach() - before).square().mean().sqrt()
    with torch.no_grad():
        model.read.weight[:, gone] = 0
    plain = (model(x).detach() - before).square().mean().sqrt()
    assert error < 0.02 * plain  # the ridge keeps it from being exact


def test_substitutes_are_the_least_squares_regression() -> None:
    x = mixed(500, 6).numpy()
    centred = x - x.mean(0)
    gone, kept = [1, 4], [0, 2, 3, 5]
    expected = np.linalg.lstsq(centred[:, kept], centred[:, gone], rcond=None)[0].T
    inverse = precision(cov_of(torch.tensor(x)))
    np.testing.assert_allclose(substitutes(inverse, torch.tensor(gone), torch.tensor(kept)), expected, rtol=1e-8)


class Maps(nn.Module):
    """A convolution read by a convolution and, flattened, by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read, self.flat = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 3), nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.write(x))
        return self.read(hidden).mean((2, 3)) + self.flat(hidden.flatten(1))


def test_reconstruction_does_no_worse_than_plain_removal_in_maps() -> None:
    """Squared error at the outputs, over the very data that the regression was made on."""
    torch.manual_seed(1)
    model, x = Maps(), torch.randn(300, 2, 6, 6)
    channel_map = trace(model, x[:2])
    found = probe(model, channel_map, [(x, torch.randint(0, 3, (300,)))], of_pairs(F.cross_entropy))
    weights = dict(model.named_parameters())
    known, before = found.known, model(x).detach()

    def error(tensors: dict[str, Tensor]) -> float:
        with swapped(model, tensors):
            return float((model(x).detach() - before).square().mean())

    for channel in range(5):
        assert error(readers_without({"write": [channel]}, channel_map, known, weights)) < error(
            readers_without({"write": [channel]}, channel_map, {}, weights)
        )


class Between(nn.Module):
    """A convolution between norms, no biases: only a running mean can take over a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.before = nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5)
        self.read, self.behind = nn.Conv2d(5, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.read(F.relu(self.before(self.write(x))))).mean((2, 3))


def test_the_norm_behind_a_reader_takes_what_is_constant() -> None:
    """The mean of what the norm puts out does not move, whoever leaves."""
    torch.manual_seed(0)
    model, x = Between().eval(), torch.randn(200, 2, 3, 3)
    channel_map = trace(model, x[:2])
    found = probe(model, channel_map, [(x, torch.randint(0, 3, (200,)))], of_pairs(F.cross_entropy))
    weights = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    before = model(x).mean(0)
    for gone in ([0], [1, 4], [0, 1, 2, 3]):
        tensors = readers_without({"write": gone}, channel_map, found.known, weights)
        assert set(tensors) == {"read.weight", "behind.running_mean"}
        with swapped(model, tensors):
            torch.testing.assert_close(model(x).mean(0), before, rtol=1e-3, atol=1e-4)


def test_behind_a_transposed_convolution_others_mend_what_they_can_without_a_constant() -> None:
    """Overlapping windows spread a constant unevenly over the output, so no bias can take it over."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 3, 3, stride=2)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sigmoid(), up, nn.Flatten()).eval()
    x = torch.randn(100, 2, 3, 3)
    channel_map, weights = trace(model, x[:2]), dict(model.named_parameters())
    found = probe(model, channel_map, [(x, torch.randn(100, 147))], of_pairs(F.mse_loss))
    before = model(x).detach()
    for channel in range(4):
        tensors = readers_without({"0": [channel]}, channel_map, found.known, weights)
        assert set(tensors) == {"2.weight"}
        errors = []
        for content in (tensors, readers_without({"0": [channel]}, channel_map, {}, weights)):
            with swapped(model, content):
                errors.append(float((model(x).detach() - before).square().mean()))
        assert errors[0] < 0.2 * errors[1]


def test_nothing_stands_in_where_nobody_is_left_or_a_parametrization_makes_the_weight() -> None:
    torch.manual_seed(0)
    model = Pair()
    torch.nn.utils.parametrizations.weight_norm(model.read)
    channel_map = trace(model, torch.randn(4, 3))
    weights = dict(model.named_parameters())
    name = "read.parametrizations.weight.original1"
    tensors = readers_without({"write": [2]}, channel_map, {}, weights)
    expected = weights[name].detach().clone()
    expected[:, 2] = 0
    assert set(tensors) == {name}
    assert torch.equal(tensors[name], expected)
    plain = Pair()
    x = torch.randn(50, 3)
    plain_map, found, weights = looked_at(plain, x)
    everything = readers_without({"write": range(6)}, plain_map, found.known, weights)
    assert not everything["read.weight"].any()
    mean = plain.read(plain.write(x)).mean(0)  # the bias takes over what is constant
    torch.testing.assert_close(everything["read.bias"], mean.detach(), rtol=1e-4, atol=1e-5)
