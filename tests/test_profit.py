"""Laws of worth: exact where theory says so, equal to slow references, finite where covariances are singular."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autowidth.audit import ablate, standing_in
from autowidth.channels import ChannelGroup, ChannelMap, ParamAxis, Place
from autowidth.probe import probe
from autowidth.profit import (
    RIDGE,
    Sums,
    combined,
    covariance,
    fold,
    folded,
    next_layer,
    own_layer,
    parts,
    peers,
    precision,
    pull,
    residual,
    substitutes,
)
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


def residual_of(cov: Tensor) -> Tensor:
    return residual(cov, precision(cov))


def parts_of(sums: Sums, channel_map: ChannelMap, model: nn.Module) -> dict[str, Tensor]:
    return parts(sums, channel_map, peers(sums, channel_map, dict(model.named_parameters())))


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
    sums = probe(model, channel_map, batches, half_square)
    picks = [(group.name, channel) for group in channel_map.groups for channel in range(group.width)]
    true = {(a.group, a.channel): a.change for a in ablate(model, channel_map, picks, batches, half_square)}
    assert {group for group, _ in true} == {"first", "second"}
    for name, first in sums.first.items():
        predicted = next_layer(first, sums.second[name], sums.samples)
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
        sums = probe(faint, channel_map, [(x, y)], F.cross_entropy)
        predicted = float(next_layer(sums.first["0"], sums.second["0"], sums.samples)[0])
        true = ablate(faint, channel_map, [("0", 0)], [(x, y)], F.cross_entropy)[0].change
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
    worth = parts_of(probe(model, channel_map, [(x, y)], F.cross_entropy), channel_map, model)["0"]
    assert worth[2, 0] == 0
    assert (worth[[0, 1, 3], 0] != 0).all()
    assert torch.isfinite(worth).all()


# ---------------------------------------------------------------------------------------------- covariance and residual


def sums_of(x: Tensor) -> tuple[Tensor, Tensor, int]:
    return x.T @ x, x.sum(0), len(x)


def test_covariance_is_numpys_with_a_ridge() -> None:
    x = mixed(50, 6)
    expected = np.cov(x.numpy(), rowvar=False, bias=True)
    expected += RIDGE * np.trace(expected) / 6 * np.eye(6)
    np.testing.assert_allclose(covariance(*sums_of(x)).numpy(), expected, rtol=1e-10)


def unexplained(x: np.ndarray, channel: int) -> float:
    """The mean squared residual of one channel after least squares, with intercept, on all others."""
    peers = np.column_stack([np.delete(x, channel, axis=1), np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(peers, x[:, channel], rcond=None)
    return float(np.mean((x[:, channel] - peers @ solution) ** 2))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 8))
def test_residual_is_what_least_squares_on_the_peers_leaves(seed: int, channels: int) -> None:
    x = mixed(40, channels, seed)
    expected = [unexplained(x.numpy(), c) for c in range(channels)]
    np.testing.assert_allclose(residual_of(cov_of(x)).numpy(), expected, rtol=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 8))
def test_residual_lies_between_nothing_and_the_variance(seed: int, channels: int) -> None:
    cov = covariance(*sums_of(mixed(12, channels, seed)))
    left = residual_of(cov)
    assert (left > 0).all()
    assert (left <= cov.diagonal() * (1 + 1e-12)).all()


def test_channels_without_peers_or_correlation_keep_their_variance() -> None:
    variances = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(residual_of(torch.diag(variances)), variances)
    torch.testing.assert_close(residual_of(torch.tensor([[3.0]])), torch.tensor([3.0]))


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
def test_singular_covariances_give_finite_profits_that_are_no_less_than_nothing(x: Tensor) -> None:
    x = x.float()
    cov = covariance(*sums_of(x))
    left = residual_of(cov)
    assert left.dtype == torch.float32
    assert torch.isfinite(left).all()
    assert (left >= 0).all()
    assert (left <= cov.diagonal().clamp_min(0)).all()
    assert torch.isfinite(own_layer(residual_of(cov), torch.ones(x.size(1)))).all()


def test_a_channel_that_is_there_twice_can_be_replaced_and_its_peers_cannot() -> None:
    x = duplicated(mixed(200, 4))
    share = residual_of(covariance(*sums_of(x))) / cov_of(x).diagonal()
    alone = residual_of(covariance(*sums_of(x[:, :4]))) / cov_of(x[:, :4]).diagonal()
    assert (share[[0, 4]] < 0.05 * alone[0]).all()
    torch.testing.assert_close(share[1:4], alone[1:4], rtol=0.05, atol=0)


# ----------------------------------------------------------------------------------------------------- own-layer profit


def test_own_layer_is_the_loss_after_the_best_compensation_in_a_linear_layer() -> None:
    """Squared loss in a metric H, weights at their least-squares optimum: brute force refits all peers and the bias.

    At the optimum the first order vanishes, and by Frisch and Waugh dropping channel c costs exactly
    1/2 w_c' H w_c times the variance of c that its peers leave unexplained. With the curvature known, g g' sums to
    n H, and `pull` is w_c' H w_c.
    """
    source = rng(4)
    n, c, o = 60, 5, 3
    x = mixed(n, c, 4).numpy()
    y = x @ source.normal(size=(c, o)) + source.normal(size=(n, o))
    root = source.normal(size=(o, o))
    metric = root @ root.T

    def best(channels: list[int]) -> tuple[float, np.ndarray]:
        design = np.column_stack([x[:, channels], np.ones(n)])
        solution, *_ = np.linalg.lstsq(design, y, rcond=None)
        error = y - design @ solution
        return float(np.einsum("no,op,np->", error, metric, error)) / (2 * n), solution

    full, solution = best(list(range(c)))
    weight = torch.tensor(solution[:c].T)[:, :, None]
    strength = pull(weight, torch.tensor(n * metric), n, n)
    predicted = own_layer(residual_of(cov_of(torch.tensor(x))), strength)
    true = [best([k for k in range(c) if k != removed])[0] - full for removed in range(c)]
    np.testing.assert_allclose(predicted.numpy(), true, rtol=1e-6)


def test_pull_sums_over_positions_and_kernel_windows() -> None:
    """Slow reference: for every output pixel and tap, the squared product of gradient and weight."""
    source = rng(2)
    samples, pixels, o, c, k = 4, 5, 3, 4, 2
    weight = torch.tensor(source.normal(size=(o, c, k)))
    gradients = torch.tensor(source.normal(size=(samples * pixels, o)))
    expected = torch.zeros(c, dtype=torch.float64)
    for g in gradients:
        for channel in range(c):
            for tap in range(k):
                expected[channel] += (g @ weight[:, channel, tap]) ** 2 / samples
    force = gradients.T @ gradients
    torch.testing.assert_close(pull(weight, force, samples * pixels, samples), expected)


def test_pull_of_a_reader_that_saw_no_gradient_is_nothing() -> None:
    strength = pull(torch.randn(2, 3, 1), torch.zeros(2, 2), 0, 5)
    assert torch.equal(strength, torch.zeros(3))


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
    return parts_of(probe(model, channel_map, batches, F.cross_entropy), channel_map, model)


def test_worth_does_not_depend_on_the_batch_size_nor_on_how_often_the_data_are_shown() -> None:
    model, channel_map, x, y = forked()
    expected = worths(model, channel_map, [(x, y)])
    ways = {
        "ones": [(x[i : i + 1], y[i : i + 1]) for i in range(12)],
        "uneven": [(x[:5], y[:5]), (x[5:], y[5:])],
        "three times": [(x, y)] * 3,
        "doubled": [(torch.cat([x, x]), torch.cat([y, y]))],
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
        assert (part[:, 1] >= 0).all()


def test_own_layer_parts_add_up_over_the_readers_of_a_group() -> None:
    """Slow reference from the layers' own inputs and output gradients; flattened pixels are folded into one peer."""
    model, channel_map, x, y = forked()
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            out.retain_grad()
            kept[name] = (args[0].detach(), out)

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [keep(name) for name in ("one", "two", "head")]
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for handle in handles:
        handle.remove()

    def profit(name: str, read: Tensor, weight: Tensor) -> Tensor:
        gradient = kept[name][1].grad
        assert gradient is not None
        g = gradient.movedim(1, -1).reshape(-1, gradient.size(1))
        cov = covariance(*sums_of(read))
        left = torch.tensor([1 / float(torch.linalg.inv(cov.double())[c, c]) for c in range(len(cov))])
        return left * torch.einsum("no,ock->nck", g, weight).square().sum((0, 2)) / len(x) / 2

    stream = kept["one"][0].movedim(1, -1).reshape(-1, 4)
    pixels = kept["head"][0].view(12, 3, 4).transpose(1, 2).reshape(-1, 3)
    expected = {
        "stem": profit("one", stream, model.one.weight.flatten(2)) + profit("two", stream, model.two.weight.flatten(2)),
        "one": profit("head", pixels, model.head.weight.view(3, 3, 4)),
    }
    model.zero_grad()
    found = worths(model, channel_map, [(x, y)])
    assert found.keys() == expected.keys()
    for name, part in found.items():
        torch.testing.assert_close(part[:, 1], expected[name].detach().float(), rtol=1e-3, atol=1e-8)


def test_a_reader_that_was_not_seen_adds_nothing() -> None:
    model, channel_map, x, y = forked()
    sums = probe(model, channel_map, [(x, y)], F.cross_entropy)
    without = Sums(
        samples=sums.samples,
        loss=sums.loss,
        first=sums.first,
        second=sums.second,
        readers={axis: reader for axis, reader in sums.readers.items() if axis.name != "two.weight"},
    )
    found = parts_of(without, channel_map, model)
    whole = parts_of(sums, channel_map, model)
    assert (found["stem"][:, 1] < whole["stem"][:, 1]).all()
    assert torch.equal(found["one"], whole["one"])


# ---------------------------------------------------------------------------------------------------------------- fold


def mapped(length: int, *rows: tuple[tuple[int, ...], ...]) -> ChannelMap:
    """A map in which each argument is one group's positions on the same reading axis."""
    axis = ParamAxis("w", 1)
    groups = tuple(ChannelGroup(f"g{i}", (Place(axis, "read", index),)) for i, index in enumerate(rows))
    return ChannelMap(groups=groups, frozen=(), uses=(), shapes={"w": (2, length)})


@settings(max_examples=25)
@given(widths=st.lists(st.integers(1, 4), min_size=1, max_size=3), copies=st.integers(1, 4))
def test_fold_takes_every_position_of_every_channel_once(widths: list[int], copies: int) -> None:
    start, groups = 0, []
    for width in widths:
        groups.append(tuple(tuple(range(start + c * copies, start + (c + 1) * copies)) for c in range(width)))
        start += width * copies
    peers = fold(mapped(start, *groups), ParamAxis("w", 1))
    assert len({len(row) for row in peers}) == 1
    assert sorted(p for row in peers for p in row) == list(range(start))
    assert len(peers) == (sum(widths) if copies > 1 else start)


def test_fold_keeps_positions_apart_where_groups_differ_in_copies() -> None:
    channel_map = mapped(6, ((0, 1), (2, 3)), ((4,), (5,)))
    assert fold(channel_map, ParamAxis("w", 1)) == tuple((p,) for p in range(6))


# ------------------------------------------------------------------------------------------------------------ combined


def test_combined_weighs_the_two_profits() -> None:
    table = torch.tensor([[1.0, 10.0], [-2.0, 5.0]])
    assert torch.equal(combined(table, torch.tensor([1.0, 0.0])), table[:, 0])
    assert torch.equal(combined(table, torch.tensor([0.0, 2.0])), 2 * table[:, 1])
    both = combined(table, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(both, 0.5 * table[:, 0] + 2 * table[:, 1])
    assert math.isclose(float(both[1]), 9.0)


# --------------------------------------------------------------------------------------------------------- compensation


class Pair(nn.Module):
    """A linear layer whose hidden channels are linear in each other, and its reader with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(x))


def looked_at(model: nn.Module, x: Tensor) -> tuple[ChannelMap, Sums, dict[str, Tensor]]:
    y = torch.randint(0, 4, (len(x),))
    channel_map = trace(model, x[:2])
    return channel_map, probe(model, channel_map, [(x, y)], F.cross_entropy), dict(model.named_parameters())


@pytest.mark.parametrize("gone", [[0], [4, 1], [0, 1, 2]])
def test_channels_that_peers_predict_exactly_leave_without_a_trace(gone: list[int]) -> None:
    """Six channels of three inputs: any three of them carry everything, means included."""
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(400, 3) + 1
    channel_map, sums, weights = looked_at(model, x)
    before = model(x).detach()
    tensors = folded({"write": gone}, channel_map, peers(sums, channel_map, weights), weights)
    assert not tensors["read.weight"][:, gone].any()
    with standing_in(model, tensors):
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


def test_compensation_does_no_worse_than_plain_removal_in_maps() -> None:
    """Squared error at the outputs, over the very data that the regression was made on."""
    torch.manual_seed(1)
    model, x = Maps(), torch.randn(300, 2, 6, 6)
    channel_map = trace(model, x[:2])
    sums = probe(model, channel_map, [(x, torch.randint(0, 3, (300,)))], F.cross_entropy)
    weights = dict(model.named_parameters())
    known, before = peers(sums, channel_map, weights), model(x).detach()

    def error(tensors: dict[str, Tensor]) -> float:
        with standing_in(model, tensors):
            return float((model(x).detach() - before).square().mean())

    for channel in range(5):
        assert error(folded({"write": [channel]}, channel_map, known, weights)) < error(
            folded({"write": [channel]}, channel_map, {}, weights)
        )


def test_nothing_stands_in_where_nobody_is_left_or_a_parametrization_makes_the_weight() -> None:
    torch.manual_seed(0)
    model = Pair()
    torch.nn.utils.parametrizations.weight_norm(model.read)
    channel_map = trace(model, torch.randn(4, 3))
    weights = dict(model.named_parameters())
    name = "read.parametrizations.weight.original1"
    tensors = folded({"write": [2]}, channel_map, {}, weights)
    expected = weights[name].detach().clone()
    expected[:, 2] = 0
    assert set(tensors) == {name}
    assert torch.equal(tensors[name], expected)
    plain = Pair()
    found, sums, weights = looked_at(plain, torch.randn(50, 3))
    everything = folded({"write": range(6)}, found, peers(sums, found, weights), weights)
    assert not everything["read.weight"].any()
    assert set(everything) == {"read.weight"}
