"""Laws of the audit: ablation is removal, weights come back, the refit learns, forgets and stays non-negative."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from autowidth.channels import ChannelMap, IndexMap
from autowidth.engine import resize_
from autowidth.review.batches import Loss, mean_loss, of_pairs
from autowidth.review.calibrate import Calibration, agreement, refit, sample
from autowidth.review.reconstruct import Removed
from autowidth.review.state import swapped
from autowidth.review.trial import Norms, Subject
from autowidth.trace import trace

pytestmark = pytest.mark.filterwarnings("error")

Batches = list[tuple[Tensor, Tensor]]
CE = of_pairs(F.cross_entropy)

# ---------------------------------------------------------------------------------------------- nets, one hazard each


class Flat(nn.Module):
    """Norms over the batch, and pixels flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 3, 3, stride=2, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).flatten(1))


class Residual(nn.Module):
    """One stream, two layers that write it, two that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((2, 4), (4, 5), (5, 4)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((x + self.back(F.relu(self.inner(x)))).mean((2, 3)))


class Concat(nn.Module):
    """One reader of two groups, which reads one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.join, self.head = nn.Conv2d(10, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.left(x))
        x = torch.cat([left, torch.tanh(self.right(x)), left], 1)
        return self.head(F.relu(self.join(x)).mean((2, 3)))


class Shared(nn.Module):
    """A module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.mean((2, 3))))
        return self.head(x + self.body(torch.tanh(self.body(x))))


class Normed(nn.Module):
    """Readers behind a weight norm: removing an input channel changes the norm of every filter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.body, self.head = weight_norm(nn.Conv2d(4, 5, 3)), weight_norm(nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3)))


class FixedReader(nn.Module):
    """A reader that is not trained: its weight is a buffer."""

    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(5, 3)
        self.register_buffer("fixed", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.stem(x.mean((2, 3)))), self.fixed)))


NETS: list[Callable[[], nn.Module]] = [Flat, Residual, Concat, Shared, Normed, FixedReader]
every_net = pytest.mark.parametrize("build", NETS)


def made(build: Callable[[], nn.Module]) -> tuple[nn.Module, ChannelMap, Batches]:
    """A net in evaluation mode, its map, and two batches of unequal length."""
    torch.manual_seed(6)
    model = build().double()
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    x, y = torch.randn(7, 2, 4, 4, dtype=torch.float64), torch.arange(7) % 3
    return model.eval(), trace(model, x[:1]), [(x[:5], y[:5]), (x[5:], y[5:])]


def everyone(channel_map: ChannelMap) -> list[tuple[str, int]]:
    return [(group.name, channel) for group in channel_map.groups for channel in range(group.width)]


def on_trial(model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss = CE) -> Subject:
    """The model on trial, nobody standing in for anybody, all its modules in training."""
    return Subject(
        model=model, channel_map=channel_map, loss=loss, scoring=batches, held_out=batches,
        trained=frozenset(model.modules()), known={},
    )  # fmt: skip


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ ablation


@every_net
def test_a_trial_is_physical_removal(build: Callable[[], nn.Module]) -> None:
    model, channel_map, batches = made(build)
    whole = mean_loss(model, batches, CE)
    subject = on_trial(model, channel_map, batches)
    assert subject.loss_without({}) == whole
    changes = []
    for name, channel in everyone(channel_map):
        smaller = copy.deepcopy(model)
        plan = {name: IndexMap.removing([channel], channel_map.group(name).width)}
        resize_(smaller, plan, example_inputs=batches[0][0])
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
        found = subject.loss_without({name: [channel]})
        assert found == pytest.approx(mean_loss(smaller, batches, CE), abs=1e-12)
        changes.append(abs(found - whole))
    assert max(changes) > 1e-3


@every_net
@pytest.mark.parametrize("norms", ["kept", "batch", "precise"])
def test_a_trial_puts_every_bit_back(build: Callable[[], nn.Module], norms: Norms) -> None:
    model, channel_map, batches = made(build)
    with torch.no_grad():  # a sum and a difference would lose the sign of a zero
        next(model.parameters()).view(-1)[0] = -0.0
        for group in channel_map.groups:
            for place in group.with_role("read"):
                model.state_dict()[place.axis.name].view(-1)[0] = -0.0
    before = bits(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    for name, channel in everyone(channel_map):
        on_trial(model, channel_map, batches).loss_without({name: [channel]}, norms=norms)
    assert bits(model) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("norms", ["kept", "batch", "precise"])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_trial_puts_every_bit_back_when_the_loss_raises(calls: int, norms: Norms) -> None:
    model, channel_map, batches = made(Flat)
    before, left = bits(model), calls
    modes = [module.training for module in model.modules()]

    def failing(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal left
        if not left:
            raise ArithmeticError("no loss today")
        left -= 1
        return F.cross_entropy(prediction, target)

    subject = on_trial(model, channel_map, batches, of_pairs(failing))

    def several() -> None:
        for _ in range(calls + 1):
            subject.loss_without({"first": [0]}, norms=norms)

    with pytest.raises(ArithmeticError, match="no loss today"):
        several()
    assert bits(model) == before
    assert [module.training for module in model.modules()] == modes


def by_hand(model: nn.Module, removed: Removed, batches: Batches, norms: Norms) -> float:
    """The loss of the net `Flat` without these channels of its first layer, norms done by hand."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.second.weight[:, list(removed["first"])] = 0
        scores = []
        read = [twin.first(x) for x, _ in batches]
        for r in read:
            if norms == "batch":
                mean, var = r.mean((0, 2, 3)), r.var((0, 2, 3), correction=0)
            else:
                mean = torch.stack([o.mean((0, 2, 3)) for o in read]).mean(0)
                var = torch.stack([o.var((0, 2, 3)) for o in read]).mean(0)
            normed = (r - mean[:, None, None]) / (var[:, None, None] + twin.norm.eps).sqrt()
            normed = normed * twin.norm.weight[:, None, None] + twin.norm.bias[:, None, None]
            scores.append(twin.head(F.relu(twin.second(F.relu(normed))).flatten(1)))
        losses = [F.cross_entropy(s, y, reduction="sum") for s, (_, y) in zip(scores, batches, strict=True)]
    return float(sum(losses)) / sum(len(y) for _, y in batches)


@pytest.mark.parametrize("norms", ["batch", "precise"])
def test_norms_of_a_trial_are_those_of_the_batch_or_plain_averages(norms: Norms) -> None:
    model, channel_map, batches = made(Flat)
    removed = {"first": [0, 2]}
    found = on_trial(model, channel_map, batches).loss_without(removed, norms=norms)
    assert found == pytest.approx(by_hand(model, removed, batches, norms), rel=1e-9)
    assert found != pytest.approx(on_trial(model, channel_map, batches).loss_without(removed), rel=1e-3)


@pytest.mark.parametrize("lengths", [[6, 1], [1, 1, 1]])
def test_a_held_out_rest_of_one_sample_is_survived_by_norms_over_the_batch(lengths: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(sum(lengths), 2, 2, 2), torch.arange(sum(lengths)) % 3
    channel_map = trace(model, torch.zeros(2, 2, 2, 2))
    batches = list(zip(x.split(lengths), y.split(lengths), strict=True))
    found = on_trial(model, channel_map, batches).loss_without({"1": [0]}, norms="batch")
    assert math.isfinite(found)
    usable = [pair for pair in batches if len(pair[1]) > 1]
    if usable:
        assert found == on_trial(model, channel_map, usable).loss_without({"1": [0]}, norms="batch")


def test_mean_loss_is_over_samples_whatever_the_batches() -> None:
    model, _, batches = made(Flat)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    expected = float(F.cross_entropy(model(x), y).detach())
    assert mean_loss(model, batches, CE) == pytest.approx(expected, rel=1e-12)
    singles = [(x[i : i + 1], y[i : i + 1]) for i in range(7)]
    assert mean_loss(model, singles, CE) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------------- sample


def worths_of(widths: list[int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"g{i}": rng.lognormal(size=width) for i, width in enumerate(widths)}


@settings(max_examples=60)
@given(widths=st.lists(st.integers(1, 9), min_size=1, max_size=5), count=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_sample_holds_no_filter_twice_and_the_count(widths: list[int], count: int, seed: int) -> None:
    worths = worths_of(widths, seed)
    picks = sample(worths, count, np.random.default_rng(seed))
    assert len(picks) == len(set(picks)) == min(count, sum(widths))
    assert all(0 <= channel < len(worths[name]) for name, channel in picks)


@settings(max_examples=40)
@given(widths=st.lists(st.integers(2, 9), min_size=2, max_size=5), parts=st.integers(1, 10), seed=st.integers(0, 99))
def test_a_sample_takes_one_filter_of_every_stretch_of_the_ranking(widths: list[int], parts: int, seed: int) -> None:
    worths = worths_of(widths, seed)
    ranking = np.sort(np.concatenate(list(worths.values())))
    parts = min(parts, len(ranking))
    picks = sample(worths, parts, np.random.default_rng(seed))
    picked = sorted(float(worths[name][channel]) for name, channel in picks)
    for worth, stretch in zip(picked, np.array_split(ranking, parts), strict=True):
        assert stretch[0] <= worth <= stretch[-1]


def test_samples_follow_the_generator_alone() -> None:
    worths = worths_of([20, 30], 1)
    picks = [sample(worths, 10, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert picks[0] == picks[1] != picks[2]


# --------------------------------------------------------------------------------------------------------------- refit


def evidence(coefficients: tuple[float, float], seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Two profits of unlike size for 40 filters, and loss changes with some error in proportion."""
    rng = np.random.default_rng(seed)
    parts = rng.lognormal(sigma=1.0, size=(40, 2)) * 1e-3
    return parts, parts @ coefficients * (1 + noise * rng.normal(size=40))


def taught(calibration: Calibration, coefficients: tuple[float, float], times: int, seed: int = 0) -> Calibration:
    for i in range(times):
        calibration = refit(calibration, *evidence(coefficients, seed + i))
    return calibration


@settings(max_examples=25)
@given(a=st.floats(0.2, 3), b=st.floats(0.2, 3), seed=st.integers(0, 1000))
def test_refit_recovers_coefficients_from_noisy_audits(a: float, b: float, seed: int) -> None:
    found = taught(Calibration(), (a, b), 40, seed).coefficients
    assert found == pytest.approx((a, b), rel=0.1)


@pytest.mark.parametrize("truth", [(1.0, 0.0), (0.0, 0.7)])
def test_refit_finds_the_profit_that_does_not_count(truth: tuple[float, float]) -> None:
    assert taught(Calibration(), truth, 40).coefficients == pytest.approx(truth, abs=0.05)


def test_refit_forgets() -> None:
    """Evidence of old is outweighed: after a change of mind the coefficients follow."""
    old = taught(Calibration(), (2.0, 0.3), 40)
    assert old.coefficients == pytest.approx((2.0, 0.3), rel=0.1)
    gaps = []
    for times in range(1, 21):
        found = np.array(taught(old, (0.5, 1.5), times, 50).coefficients)
        gaps.append(float(np.abs(found - [0.5, 1.5]).max()))
    assert gaps[0] < 1.5
    assert gaps[-1] < 0.1
    assert gaps[-1] < gaps[0]


def test_the_first_audit_does_not_overthrow_the_prior_on_one_filter() -> None:
    """One filter, of which the loss fell: the prior (0, 1) moves and does not flip."""
    found = refit(Calibration(), np.array([[1e-3, 1e-3]]), np.array([-1e-3]))
    assert 0 < found.coefficients[1] < 1


@settings(max_examples=60)
@given(data=st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 3), min_size=1, max_size=12), rounds=st.integers(1, 3))
def test_coefficients_are_never_negative_and_never_all_zero(data: list[tuple[float, ...]], rounds: int) -> None:
    table = np.array(data)
    calibration = Calibration()
    for _ in range(rounds):
        calibration = refit(calibration, table[:, :2], table[:, 2])
        assert all(math.isfinite(c) and c >= 0 for c in calibration.coefficients)
        assert any(calibration.coefficients)


def test_audits_against_both_profits_leave_the_old_coefficients() -> None:
    calibration = taught(Calibration(), (1.0, 0.5), 5)
    for seed in range(20):
        parts, changes = evidence((1.0, 1.0), seed)
        calibration, before = refit(calibration, parts, -5 * changes), calibration
    assert calibration.coefficients == before.coefficients


def test_refit_does_not_depend_on_the_unit_of_the_loss() -> None:
    parts, changes = evidence((0.8, 0.4), 1)
    small, large = (refit(Calibration(), parts * unit, changes * unit).coefficients for unit in (1e-6, 1e6))
    assert small == pytest.approx(large, rel=1e-9)


def test_rows_that_are_not_finite_teach_nothing() -> None:
    parts, changes = evidence((0.8, 0.4), 1)
    spoiled = np.vstack([parts, [[np.nan, 1.0], [1.0, np.inf], [1.0, 1.0]]])
    found = refit(Calibration(), spoiled, np.append(changes, [1.0, 1.0, np.nan]))
    assert found == refit(Calibration(), parts, changes)
    calibration = Calibration()
    assert refit(calibration, np.full((2, 2), np.nan), np.ones(2)) == calibration
    assert refit(calibration, np.zeros((0, 2)), np.zeros(0)) == calibration


def test_audits_in_which_nothing_happened_are_survived() -> None:
    found = refit(Calibration(), np.zeros((4, 2)), np.zeros(4))
    assert found.coefficients == pytest.approx(Calibration().coefficients, abs=1e-6)


def test_before_any_audit_what_co_channels_cannot_replace_is_the_worth() -> None:
    assert Calibration().coefficients == (0.0, 1.0)


# ----------------------------------------------------------------------------------------------------------- agreement


def test_agreement_of_proportional_figures_is_perfect_and_has_their_slope() -> None:
    predicted = np.array([0.5, 1.0, 4.0, -1.0])
    spearman, slope = agreement(predicted, 0.7 * predicted)
    assert spearman == pytest.approx(1)
    assert slope == pytest.approx(0.7)


def test_agreement_of_opposite_ranks_is_minus_one() -> None:
    predicted = np.array([1.0, 2.0, 3.0, 4.0])
    spearman, slope = agreement(predicted, 1 / predicted)
    assert spearman == pytest.approx(-1)
    assert slope is not None
    assert slope > 0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(-5, 5, width=16), st.floats(-5, 5, width=16)), min_size=3, max_size=20))
def test_agreement_equals_correlation_of_ranks_and_least_squares(pairs: list[tuple[float, float]]) -> None:
    predicted, measured = np.array(pairs).T
    spearman, slope = agreement(predicted, measured)
    if np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        assert (spearman, slope) == (None, None)
        return

    def ranks(values: np.ndarray) -> list[float]:
        return [float(np.mean([*np.flatnonzero(np.sort(values) == v)])) for v in values]

    assert spearman == pytest.approx(float(np.corrcoef(ranks(predicted), ranks(measured))[0, 1]), abs=1e-9)
    assert slope == pytest.approx(float(np.linalg.lstsq(predicted[:, None], measured, rcond=None)[0][0]), abs=1e-6)


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [([], []), ([1.0, 2.0], [1.0, 2.0]), ([1.0] * 4, [1.0, 2.0, 3.0, 4.0]), ([1.0, 2.0, 3.0], [0.0] * 3),
     ([1.0, np.nan, 3.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, np.inf, 3.0])],
)  # fmt: skip
def test_agreement_says_nothing_where_it_is_not_defined(predicted: list[float], measured: list[float]) -> None:
    assert agreement(np.array(predicted), np.array(measured)) == (None, None)


def test_agreement_leaves_out_what_is_not_finite() -> None:
    predicted, measured = np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 4.0, 6.0, 1.0])
    spearman, slope = agreement(predicted, measured)
    assert spearman == pytest.approx(1)
    assert slope == pytest.approx(2)


def test_swapped_tensors_go_back_also_where_what_follows_fails() -> None:
    model = nn.Linear(2, 2)
    old, new = model.weight.detach().clone(), torch.zeros(2, 2)
    with swapped(model, {"weight": new}):
        assert torch.equal(model.weight, new)
    assert torch.equal(model.weight, old)
    with pytest.raises(ZeroDivisionError), swapped(model, {"weight": new}):
        raise ZeroDivisionError
    assert torch.equal(model.weight, old)
