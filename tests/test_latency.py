"""Laws of latency: the formula is found again, the cost goes through what was measured, nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import autowidth.latency as latencies
from autowidth.cost import count_macs, elements_cost
from autowidth.engine import AutoWidth
from autowidth.lab.data import digits
from autowidth.lab.models import build
from autowidth.latency import Latency, fit_latency, timed
from autowidth.policy import Budget, BudgetError, Schedule
from autowidth.review.effort import Effort
from autowidth.trace import trace

IMAGE = torch.zeros(1, 1, 8, 8)


def written(network: nn.Module) -> int:
    """Elements that convolutions and linear layers write for one image, counted by hooks."""
    found: list[int] = []
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: found.append(output.numel()))
    with torch.no_grad():
        network(IMAGE)
    return sum(found)


def by_formula(networks: Sequence[nn.Module], example_inputs: object) -> list[float]:
    """Seconds on a machine that is exactly as the formula says: 0.1 ms, 2e-6 ms a MAC, 3e-5 ms an element."""
    return [1e-3 * (0.1 + 2e-6 * count_macs(n, IMAGE) + 3e-5 * written(n)) for n in networks]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latencies, "timed", by_formula)


@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_elements_are_those_that_the_layers_write(name: str) -> None:
    network = build(name, in_channels=1)
    channel_map = trace(network, IMAGE)
    assert elements_cost(channel_map).at(channel_map.widths) == written(network)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_machine_that_follows_the_formula_is_found_out(multiple: int) -> None:
    network = build("vgg8", in_channels=1)
    found = fit_latency(network, trace(network, IMAGE), IMAGE, multiple=multiple)
    assert (found.overhead, found.per_mac, found.per_element) == pytest.approx((0.1, 2e-6, 3e-5), rel=1e-3)
    assert found.measured == pytest.approx(found.fitted, rel=1e-6)
    assert found.error < 1e-6


def test_the_cost_goes_through_what_is_measured_now_and_at_the_start() -> None:
    network = build("resnet8", in_channels=1)
    wide = trace(network, IMAGE)
    narrow = trace(build("resnet8", in_channels=1, width=0.5), IMAGE)
    plain = Latency(overhead=0.1, per_mac=1e-6, per_element=1e-5, measured=0, fitted=0, error=0)
    start, now = (plain.cost(channel_map).at(channel_map.widths) for channel_map in (wide, narrow))
    found = Latency(overhead=0.1, per_mac=1e-6, per_element=1e-5, measured=1.2 * start, fitted=start, error=0)
    cost = found.cost_through(narrow, 1.1 * now)
    assert cost.at(narrow.widths) == pytest.approx(1.1 * now)
    assert cost.at(wide.widths) == pytest.approx(1.2 * start)
    vector = cost.vector(narrow.widths)
    for g, saved in enumerate(cost.of_channel(vector)):
        fewer = vector - np.eye(len(vector))[g]
        assert cost.at(vector) - cost.at(fewer) == pytest.approx(saved)


def test_real_times_are_positive_and_the_model_is_left_alone() -> None:
    network = build("resnet8", in_channels=1).train()
    network.head.eval()
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    found = fit_latency(network, trace(network, IMAGE), IMAGE)
    assert found.measured > 0 and found.per_mac + found.per_element + found.overhead > 0
    assert [module.training for module in network.modules()] == modes
    (seconds,) = timed([network], IMAGE)
    assert 0.2 < 1000 * seconds / found.measured < 5
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_network_of_many_times_the_work_takes_longer() -> None:
    small, large = (build("vgg8", in_channels=1, width=width) for width in (0.25, 4.0))
    faster, slower = timed([small, large], torch.zeros(16, 1, 8, 8))
    assert faster < slower


def run(policy: Budget, steps: int = 40) -> AutoWidth:
    torch.manual_seed(0)
    network = build("resnet8", in_channels=1)
    optimizer = SGD(network.parameters(), 0.05)
    images = digits(limit=640)
    engine = AutoWidth(
        network, optimizer, example_inputs=IMAGE, probe=list(images.plain_batches("train", 64))[:3],
        loss_fn=F.cross_entropy, policy=policy, total_steps=steps, effort=Effort(probe_samples=64, audit_samples=64),
    )  # fmt: skip
    stream = images.training_batches(16, seed=0)
    for _, (x, y) in zip(range(steps), stream, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        engine.step()
    return engine


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("given", ["share", "milliseconds"])
def test_a_latency_budget_is_met(given: str) -> None:
    (start,) = by_formula([build("resnet8", in_channels=1)], IMAGE)
    wanted = 0.6 * 1000 * start
    policy = (
        Budget(latency=0.6, schedule=Schedule(count=4))
        if given == "share"
        else Budget(latency_ms=wanted, schedule=Schedule(count=4))
    )
    engine = run(policy)
    assert engine.latency_ms_start == pytest.approx(1000 * start)
    assert engine.latency_ms is not None
    assert 0.95 * wanted < engine.latency_ms <= 1.001 * wanted


@pytest.mark.usefixtures("exact")
def test_less_than_the_overhead_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"latency_ms=0\.1 is below the least that widths allow"):
        run(Budget(latency_ms=0.1))


def test_a_budget_of_macs_measures_no_latency() -> None:
    engine = run(Budget(macs=0.8, schedule=Schedule(count=1)), steps=1)
    assert engine.latency_ms_start is None and engine.latency_ms is None
