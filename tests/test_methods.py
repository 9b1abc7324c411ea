"""Methods that are compared: every one ends where it should, and the controls are what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autowidth.cost import count_macs, macs_cost
from autowidth.lab.methods import (
    METHODS,
    OneShot,
    Task,
    dense_macs,
    fresh_network,
    uniform_widths,
)
from autowidth.lab.models import build
from autowidth.lab.peers import torch_pruned
from autowidth.lab.train import Method, Settings, load_images, train
from autowidth.policy import Books, Budget, BudgetError, Costs, Never, Situation
from autowidth.trace import trace

QUICK = Settings(
    model="resnet8", data="digits", epochs=2, batch_size=50, limit=150, threads=1, looks=1,
    budget=Budget(count=2, begin=0.2, end=0.8, grace=0),
)  # fmt: skip
DIGIT = torch.zeros(2, 1, 8, 8)
ANSWERS = {"autowidth": 2}
"""How many results a method gives, if not one."""


def task(settings: Settings = QUICK, macs: float = 0.5) -> Task:
    return Task(settings=settings, macs=macs, images=load_images(settings))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_at_the_target_and_gives_a_network_that_runs(name: str) -> None:
    finishes = METHODS[name](task())
    assert len(finishes) == ANSWERS.get(name, 1)
    whole = dense_macs(task())
    for finish in finishes:
        result = finish.result
        assert count_macs(result.network, DIGIT) == result.macs
        assert np.isfinite(result.loss)
        assert result.epochs == (4 if name.endswith("-x2") else 2)
        assert result.seconds > 0 and result.cpu_seconds > 0
        if name == "dense":
            assert result.macs == whole
        elif name != "autowidth-auto":
            assert result.macs <= 0.5 * whole
            assert result.macs > 0.35 * whole, "a target is to be met, not to be passed by far"


def test_the_target_counts_from_the_network_of_factor_one() -> None:
    narrow = QUICK.model_copy(update={"width": 0.5})
    found = METHODS["l1"](task(narrow, 0.2))[0].result
    assert found.macs <= 0.2 * dense_macs(task()) < found.macs_start


def test_the_retrained_control_has_the_widths_that_were_found_and_nothing_else_of_them() -> None:
    found, again = METHODS["autowidth"](task())
    assert again.method == "retrained"
    assert again.result.widths == found.result.widths
    assert again.result.removed == again.result.inserted == 0
    plain = train(QUICK, method=Method(policy=Never()), network=fresh_network(task(), lambda _: found.result.widths))
    for mine, theirs in zip(plain.network.parameters(), again.result.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_a_fresh_network_is_one_that_was_built_with_these_widths(factor: float) -> None:
    """The weights are drawn for the widths that they have, not cut out of those of another network."""

    def scaled(channel_map: object) -> Mapping[str, int]:
        return {g.name: round(g.width * factor) for g in trace(build("resnet8", in_channels=1), DIGIT).groups}

    torch.manual_seed(QUICK.seed)
    built = build("resnet8", in_channels=1, width=factor)
    network = fresh_network(task(), scaled)
    shapes = {n: p.shape for n, p in network.named_parameters()}
    if factor != 1.7:  # the builder rounds otherwise there
        assert shapes == {n: p.shape for n, p in built.named_parameters()}
    for name, parameter in network.named_parameters():
        if parameter.dim() == 4:
            expected = (2 / parameter[0].numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.25), name


# ---- one-shot --------------------------------------------------------------------------------------------------------


def situation(worths: Mapping[str, list[float]], width: float = 1.0) -> Situation:
    channel_map = trace(build("resnet8", in_channels=1, width=width), DIGIT, rehearse=False)
    cost = macs_cost(channel_map)
    books = tuple(
        Books(name=g.name, width_start=g.width, worth=tuple(worths[g.name]), grace=(False,) * g.width)
        for g in channel_map.groups
    )
    return Situation(step=1, total_steps=2, books=books, costs=Costs(macs=cost))


def drawn(seed: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    channel_map = trace(build("resnet8", in_channels=1), DIGIT, rehearse=False)
    return {g.name: rng.lognormal(sigma=2, size=g.width).tolist() for g in channel_map.groups}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), macs=st.floats(0.1, 1.0), scope=st.sampled_from(["layer", "network"]))
def test_one_shot_removes_the_least_worthy_and_meets_its_target(seed: int, macs: float, scope: str) -> None:
    worths = drawn(seed)
    seen = situation(worths)
    decision = OneShot(macs=macs, scope=scope).decide(seen)  # type: ignore[arg-type]
    widths = {name: len(w) for name, w in worths.items()}
    left = widths | {name: m.width for name, m in decision.plan.items()}
    assert seen.costs.macs.at(left) <= macs * seen.costs.macs.at(widths) * (1 + 1e-9)
    for name, index_map in decision.plan.items():
        gone = [worths[name][c] for c in index_map.removed]
        assert max(gone) <= min(worths[name][c] for c in index_map.source)
    if scope == "layer":
        shares = [left[name] / widths[name] for name in widths]
        assert max(shares) - min(shares) < 0.5 / min(widths.values()) + 0.07
    elif decision.plan:
        dearest = max(worths[n][c] for n, m in decision.plan.items() for c in m.removed)
        open_to = [w for n, ws in worths.items() for w in ws if left[n] > 2]
        weaker = [w for w in open_to if w < dearest]
        assert len(weaker) <= sum(len(m.removed) for m in decision.plan.values())


def test_filters_about_which_a_criterion_says_nothing_stay() -> None:
    worths = {name: [float("inf")] * len(w) if number % 2 else w for number, (name, w) in enumerate(drawn(0).items())}
    decision = OneShot(macs=0.05, scope="network").decide(situation(worths))
    assert decision.plan
    assert all(np.isfinite(worths[name]).all() for name in decision.plan)


@pytest.mark.parametrize("macs", [0.0, 1.5])
def test_one_shot_refuses_what_it_cannot_meet(macs: float) -> None:
    seen = situation(drawn(0))
    with pytest.raises(BudgetError, match="impossible"):
        OneShot(macs=macs).check(seen.costs, {books.name: len(books.worth) for books in seen.books})


@given(share=st.floats(0.05, 4.0))
@settings(max_examples=20, deadline=None)
def test_uniform_widths_cost_at_most_the_target_and_leave_little_of_it(share: float) -> None:
    cost = situation(drawn(0)).costs.macs
    start = {name: len(w) for name, w in drawn(0).items()}
    widths = uniform_widths(cost, start, share * cost.at(start))
    assert cost.at(widths) <= share * cost.at(start)
    assert cost.at({name: width + 1 for name, width in widths.items()}) > share * cost.at(start)


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "scope"), [("magnitude", "layer"), ("taylor", "network"), ("bn-scale", "network")]
)
def test_torch_pruning_meets_the_target_and_leaves_the_network_alone(importance: str, scope: str) -> None:
    network = build("resnet8", in_channels=1)
    for name, parameter in network.named_parameters():
        if "norm" in name:  # fresh norms all have the same scale, which says nothing about their channels
            torch.nn.init.uniform_(parameter, 0.1, 1.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = load_images(QUICK)
    pruned = torch_pruned(network, images, importance=importance, scope=scope, macs=0.4, seed=0)  # type: ignore[arg-type]
    whole = count_macs(network, DIGIT)
    assert 0.3 * whole < count_macs(pruned, DIGIT) <= 0.4 * whole
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert pruned(DIGIT).shape == (2, 10)


def test_ablations_differ_from_the_run_that_they_ablate() -> None:
    longer = QUICK.model_copy(update={"budget": replace(QUICK.budget, offer=0.2, grace=1, count=3), "epochs": 3})  # type: ignore[type-var]
    whole = METHODS["autowidth"](task(longer))[0].result
    assert whole.inserted > 0
    assert METHODS["autowidth-no-insertion"](task(longer))[0].result.inserted == 0
    for name in ("autowidth-random", "autowidth-l1", "autowidth-next", "autowidth-no-compensation"):
        other = METHODS[name](task(longer))[0].result
        assert (other.widths, other.loss) != (whole.widths, whole.loss), name
