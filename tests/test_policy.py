"""Laws of policies: the budget is met, minimum widths and newborns are safe, and the prior favours the wide."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autowidth.channels import ChannelMap, IndexMap
from autowidth.cost import Cost, macs_cost
from autowidth.lab.models import build
from autowidth.policy import (
    Auto,
    Budget,
    BudgetError,
    Costs,
    Decision,
    GroupReport,
    Never,
    Policy,
    PolicyError,
    Price,
    Situation,
    Start,
    shrunk,
    uniform_share,
)
from autowidth.policy.targets import ABSOLUTE
from autowidth.trace import trace
from composed import composed

pytestmark = pytest.mark.filterwarnings("error")

Worths = Callable[[str, int], Sequence[float]]
"""Group name and width -> worths (width,)."""

LAB = (("resnet8", 1.0), ("resnet8", 0.5), ("resnet8-padding", 1.0), ("vgg8", 0.25), ("densenet40", 0.25))


def start_of(cost: Cost, widths: Mapping[str, int], samples: int | None = None) -> Start:
    """A start of these widths, whose parameters cost what its MACs do."""
    return Start(costs=Costs(macs=cost, params=cost), widths=widths, samples=samples)


# ------------------------------------------------------------------------------------------------------- cost models


@functools.cache
def lab_map(name: str, width: float) -> ChannelMap:
    """The channel map of a laboratory network on 8 x 8 pixels; without rehearsal, which would find nothing."""
    return trace(build(name, in_channels=1, width=width), torch.zeros(1, 1, 8, 8), rehearse=False)


def chain_cost(widths: Sequence[int], factors: Sequence[float]) -> Cost:
    """A chain of layers: layer t reads group t - 1 and writes group t; three channels come in, ten go out."""
    groups, terms = len(widths), len(widths) + 1
    base, copies = np.zeros((terms, 2)), np.zeros((terms, 2, groups))
    base[0, 1], base[-1, 0] = 3, 10
    for g in range(groups):
        copies[g, 0, g] = copies[g + 1, 1, g] = 1
    return Cost(tuple(f"g{g}" for g in range(groups)), np.array(factors[:terms], dtype=np.float64), base, copies)


@st.composite
def chains(draw: st.DrawFn, *, least: int = 4, most: int = 24) -> tuple[Cost, dict[str, int]]:
    widths = draw(st.lists(st.integers(least, most), min_size=1, max_size=5))
    factors = draw(st.lists(st.integers(1, 900), min_size=len(widths) + 1, max_size=len(widths) + 1))
    return chain_cost(widths, factors), {f"g{g}": width for g, width in enumerate(widths)}


def lognormal(seed: int, spread: float = 1.0) -> Worths:
    """Worths as a network has them: many small ones, a few large, some layers worth far more than others."""
    rng = np.random.default_rng(seed)
    level: dict[str, float] = {}

    def draw(name: str, width: int) -> list[float]:
        level.setdefault(name, float(rng.lognormal(sigma=spread)))
        return (rng.lognormal(size=width) * level[name] * 1e-3).tolist()

    return draw


# ------------------------------------------------------------------------------------------------------- simulated runs


@dataclass(frozen=True)
class Review:
    """One simulated review: what the policy saw, what it decided, the widths after it."""

    situation: Situation
    decision: Decision
    widths: dict[str, int]

    @property
    def before(self) -> dict[str, int]:
        return {reports.name: len(reports.worth) for reports in self.situation.groups}

    @property
    def cost(self) -> float:
        return self.situation.costs.macs.at(self.widths)


Loss = Callable[[Mapping[str, int]], float]
"""Widths -> loss, nats."""


def simulate(
    policy: Policy,
    cost: Cost,
    start: Mapping[str, int],
    worths: Worths,
    total: int = 1000,
    loss: Loss | None = None,
    fidelity: float | None = None,
) -> list[Review]:
    """A whole run on reports alone. Keeps the age of every channel as the engine would.

    The loss is what `loss` says of the widths; audits always show `fidelity`.
    """
    policy.check(start_of(cost, start))
    born: dict[str, list[int | None]] = {name: [None] * width for name, width in start.items()}
    reviews: list[Review] = []
    for number, step in enumerate(policy.reviews(total)):
        reports = tuple(
            GroupReport(
                name=name,
                width_start=start[name],
                worth=tuple(worths(name, len(ages))),
                grace=tuple(age is not None and number - age < policy.limits.grace for age in ages),
            )
            for name, ages in born.items()
        )
        before = {name: len(ages) for name, ages in born.items()}
        situation = Situation(
            step=step, total_steps=total, groups=reports, costs=Costs(macs=cost, params=cost), agreement=fidelity,
            loss=None if loss is None else loss(before),
        )  # fmt: skip
        decision = policy.decide(situation)
        for name, index_map in decision.plan.items():
            assert index_map.size == len(born[name]), "a plan is written for the widths of its own review"
            assert not index_map.is_identity, "a plan names only groups that change"
            born[name] = [number if s < 0 else born[name][s] for s in index_map.source]
        reviews.append(Review(situation, decision, {name: len(ages) for name, ages in born.items()}))
    return reviews


# ------------------------------------------------------------------------------------------------- the budget is met


def room(cost: Cost, widths: Mapping[str, int], target: float) -> float:
    """How far below the target a network ends, as a multiple of 2 % of it or of its dearest channel: 1 is too much."""
    gap = target - cost.at(widths)
    assert gap >= -1e-9 * target, "above the target"
    return gap / max(0.02 * target, float(max(cost.of_channel(cost.vector(widths) + 1))))


@pytest.mark.parametrize(("name", "width"), LAB)
@pytest.mark.parametrize("macs", [0.3, 0.5, 0.8, 1.0, 1.5, 2.0])
def test_a_budget_ends_within_two_percent_below_its_target(name: str, width: float, macs: float) -> None:
    """Or, where a network is so narrow that one channel is more than that, within one channel."""
    channel_map = lab_map(name, width)
    cost, start = macs_cost(channel_map), channel_map.widths
    for seed in range(2):
        last = simulate(Budget(macs=macs), cost, start, lognormal(seed))[-1]
        assert room(cost, last.widths, macs * cost.at(start)) < 1


@settings(max_examples=60)
@given(
    chain=chains(),
    macs=st.floats(0.25, 2.5),
    offer=st.sampled_from([0.0, 0.05, 0.2]),
    grace=st.integers(0, 3),
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_budget_is_never_exceeded_and_leaves_no_room_for_a_channel(
    chain: tuple[Cost, dict[str, int]], macs: float, offer: float, grace: int, count: int, seed: int
) -> None:
    cost, start = chain
    policy = composed(Budget(macs=macs), offer=offer, grace=grace, count=count)
    try:
        policy.check(start_of(cost, start))
    except BudgetError:
        assume(False)
    last = simulate(policy, cost, start, lognormal(seed))[-1]
    assert room(cost, last.widths, macs * cost.at(start)) < 1


@settings(max_examples=30)
@given(chain=chains(), macs=st.floats(0.3, 2.0), seed=st.integers(0, 99))
def test_the_way_to_the_budget_has_no_detour(chain: tuple[Cost, dict[str, int]], macs: float, seed: int) -> None:
    """No review aims beyond the target, and the targets go one way."""
    cost, start = chain
    try:
        Budget(macs=macs).check(start_of(cost, start))
    except BudgetError:
        assume(False)
    reviews = simulate(Budget(macs=macs), cost, start, lognormal(seed))
    targets = [review.decision.target for review in reviews]
    assert all(target is not None for target in targets)
    assert targets == sorted(targets, reverse=macs < 1)
    assert targets[-1] == pytest.approx(macs * cost.at(start))
    for review, target in zip(reviews, targets, strict=True):
        assert review.cost <= target * (1 + 1e-9) or review.widths == review.before


@settings(max_examples=40)
@given(chain=chains(least=1, most=12), macs=st.floats(0.05, 1.0), least=st.integers(1, 6), seed=st.integers(0, 99))
def test_minimum_widths_are_kept(chain: tuple[Cost, dict[str, int]], macs: float, least: int, seed: int) -> None:
    cost, start = chain
    policy = composed(Budget(macs=macs), min_width=least)
    floor = {name: min(width, least) for name, width in start.items()}
    if macs * cost.at(start) < cost.at(floor):
        with pytest.raises(BudgetError, match=f"min_width={least}"):
            policy.check(start_of(cost, start))
        return
    for review in simulate(policy, cost, start, lognormal(seed)):
        assert all(width >= floor[name] for name, width in review.widths.items())


# ------------------------------------------------------------------------------------------------------------ newborns


@settings(max_examples=40)
@given(
    chain=chains(),
    macs=st.floats(0.3, 1.8),
    grace=st.integers(0, 4),
    offer=st.sampled_from([0.05, 0.3]),
    seed=st.integers(0, 99),
)
def test_newborns_in_grace_stay(
    chain: tuple[Cost, dict[str, int]], macs: float, grace: int, offer: float, seed: int
) -> None:
    """Even where they are worth nothing at all; and by the last review everybody can be judged."""
    cost, start = chain
    policy = composed(Budget(macs=macs), grace=grace, offer=offer)
    try:
        policy.check(start_of(cost, start))
    except BudgetError:
        assume(False)
    drawn = lognormal(seed)

    def worthless_tail(name: str, width: int) -> list[float]:
        return [*drawn(name, width)[: start[name]], *[-1.0] * max(width - start[name], 0)]

    reviews = simulate(policy, cost, start, worthless_tail)
    for review in reviews:
        for reports in review.situation.groups:
            if reports.name in review.decision.plan:
                gone = review.decision.plan[reports.name].removed
                assert not any(reports.grace[channel] for channel in gone)
    assert not any(any(reports.grace) for reports in reviews[-1].situation.groups)
    for review in reviews[len(reviews) - grace :]:
        assert not any(index_map.inserted for index_map in review.decision.plan.values())


@pytest.mark.parametrize("macs", [0.5, 1.0, 2.0])
def test_newborns_are_offered_places(macs: float) -> None:
    channel_map = lab_map("resnet8", 1.0)
    reviews = simulate(Budget(macs=macs), macs_cost(channel_map), channel_map.widths, lognormal(0))
    assert sum(len(m.inserted) for review in reviews for m in review.decision.plan.values()) > 0


def test_without_an_offer_nobody_is_inserted() -> None:
    channel_map = lab_map("resnet8", 1.0)
    reviews = simulate(composed(Budget(macs=0.5), offer=0), macs_cost(channel_map), channel_map.widths, lognormal(0))
    assert not any(m.inserted for review in reviews for m in review.decision.plan.values())


def test_a_budget_above_one_grows_and_never_ends_narrower() -> None:
    channel_map = lab_map("vgg8", 0.25)
    cost, start = macs_cost(channel_map), channel_map.widths
    last = simulate(Budget(macs=2.0), cost, start, lambda _, width: [1e-3] * width)[-1]
    assert all(last.widths[name] >= start[name] for name in start)
    assert last.cost > 1.9 * cost.at(start)


def test_newborns_go_where_filters_earn_more() -> None:
    """Two layers of the same cost: the one whose filters are worth more is offered more."""
    cost = chain_cost([10, 10], [100, 0.001, 100])
    cost.base[0, 1] = cost.base[2, 0] = 3
    level = {"g0": 1.0, "g1": 8.0}
    last = simulate(Budget(macs=1.5), cost, {"g0": 10, "g1": 10}, lambda name, width: [level[name]] * width)[-1]
    assert last.widths["g1"] > last.widths["g0"]


# ----------------------------------------------------------------------------------------------------- who has to leave


def last_decision(policy: Budget, cost: Cost, worth: Mapping[str, Sequence[float]], start: Mapping[str, int]) -> Review:
    """The last review of a run, if nothing had happened before it."""
    reports = tuple(
        GroupReport(name=n, width_start=start[n], worth=tuple(w), grace=(False,) * len(w)) for n, w in worth.items()
    )
    situation = Situation(step=1000, total_steps=1000, groups=reports, costs=Costs(macs=cost))
    decision = policy.decide(situation)
    widths = {n: decision.plan[n].width if n in decision.plan else len(w) for n, w in worth.items()}
    return Review(situation, decision, widths)


@settings(max_examples=40)
@given(chain=chains(), macs=st.floats(0.3, 0.95), seed=st.integers(0, 99))
def test_within_a_group_the_least_worthy_leave(chain: tuple[Cost, dict[str, int]], macs: float, seed: int) -> None:
    """Without exception, save for filters taken back because they still fit, and those are the best of the losers."""
    cost, start = chain
    policy = composed(Budget(macs=macs), count=1)
    try:
        policy.check(start_of(cost, start))
    except BudgetError:
        assume(False)
    drawn = lognormal(seed)
    worth = {name: drawn(name, width) for name, width in start.items()}
    review = last_decision(policy, cost, worth, start)
    for name, index_map in review.decision.plan.items():
        gone = [worth[name][c] for c in index_map.removed]
        kept = [worth[name][c] for c in index_map.source]
        assert max(gone) <= min(kept)
    predicted = sum(max(worth[name][c], 0.0) for name, m in review.decision.plan.items() for c in m.removed)
    assert review.decision.predicted == pytest.approx(predicted, abs=1e-12)


@settings(max_examples=40)
@given(chain=chains(), macs=st.floats(0.3, 0.95), seed=st.integers(0, 99))
def test_nobody_leaves_who_could_have_stayed(chain: tuple[Cost, dict[str, int]], macs: float, seed: int) -> None:
    """Without newborns: of every group that lost filters, one more would break the budget."""
    cost, start = chain
    policy = composed(Budget(macs=macs), count=1)
    try:
        policy.check(start_of(cost, start))
    except BudgetError:
        assume(False)
    drawn = lognormal(seed)
    review = last_decision(policy, cost, {name: drawn(name, width) for name, width in start.items()}, start)
    for name in review.decision.plan:
        assert cost.at(review.widths | {name: review.widths[name] + 1}) > macs * cost.at(start)


def test_filters_that_do_harm_leave_first() -> None:
    cost = chain_cost([8, 8], [10, 10, 10])
    worth = {"g0": [1e-9] * 8, "g1": [5.0] * 6 + [-0.1, -0.2]}
    review = last_decision(composed(Budget(macs=0.9), count=1), cost, worth, {"g0": 8, "g1": 8})
    assert 7 in review.decision.plan["g1"].removed


def test_with_equal_worth_the_narrower_group_loses_less() -> None:
    """Diminishing returns: of two groups of one cost and one worth, the one already narrow keeps its filters."""
    cost = chain_cost([16, 16], [1, 0.001, 1])
    cost.base[0, 1] = cost.base[2, 0] = 5
    worth = {"g0": [1e-3] * 8, "g1": [1e-3] * 16}
    start = {"g0": 16, "g1": 16}
    with_prior = last_decision(composed(Budget(macs=0.5), count=1, diminishing=2.0), cost, worth, start)
    lost = {name: with_prior.before[name] - with_prior.widths[name] for name in worth}
    assert lost["g0"] < lost["g1"]
    assert abs(with_prior.widths["g0"] - with_prior.widths["g1"]) <= 1


def test_the_stronger_the_prior_the_nearer_to_uniform() -> None:
    channel_map = lab_map("vgg8", 0.25)
    cost, start = macs_cost(channel_map), channel_map.widths

    def spread(exponent: float) -> float:
        policy = composed(Budget(macs=0.4), offer=0, diminishing=exponent)
        widths = simulate(policy, cost, start, lognormal(3, spread=2.0))[-1].widths
        return float(np.std([widths[name] / start[name] for name in start]))

    assert spread(8.0) < spread(2.0) < spread(0.0)


def test_reports_in_another_order_lead_to_the_same_decision() -> None:
    channel_map = lab_map("resnet8", 1.0)
    drawn = lognormal(2)
    worth = {name: drawn(name, width) for name, width in channel_map.widths.items()}
    orders = (worth, dict(reversed(worth.items())))
    plans = [
        dict(last_decision(Budget(macs=0.5), macs_cost(channel_map), order, channel_map.widths).decision.plan)
        for order in orders
    ]
    assert plans[0] == plans[1]


# ------------------------------------------------------------------------------------------------------------- when


@settings(max_examples=80)
@given(total=st.integers(1, 5000), count=st.integers(1, 30), begin=st.floats(0, 0.9), length=st.floats(0.01, 1))
def test_reviews_lie_between_begin_and_end(total: int, count: int, begin: float, length: float) -> None:
    end = min(begin + length, 1.0)
    steps = composed(Budget(), count=count, begin=begin, end=end).reviews(total)
    assert 1 <= len(steps) <= count
    assert list(steps) == sorted(set(steps))
    for step in steps:
        assert 1 <= step <= total
        assert step == 1 or begin * total - 0.5 <= step <= end * total + 0.5
    if total * (end - begin) > 2 * count:
        assert len(steps) == count
        gaps = np.diff(steps)
        assert not len(gaps) or gaps.max() - gaps.min() <= 2  # each step is rounded


def test_a_run_of_one_step_can_still_meet_its_budget() -> None:
    channel_map = lab_map("resnet8", 1.0)
    cost, start = macs_cost(channel_map), channel_map.widths
    reviews = simulate(Budget(macs=0.5), cost, start, lognormal(0), total=1)
    assert len(reviews) == 1
    assert 0.49 * cost.at(start) <= reviews[-1].cost <= 0.5 * cost.at(start)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("macs", [0.0, -0.5, float("nan")])
def test_a_budget_of_nothing_is_refused_at_the_door(macs: float) -> None:
    with pytest.raises(BudgetError, match="impossible"):
        Budget(macs=macs)


@pytest.mark.parametrize(
    "settings_",
    [{"begin": 0.6, "end": 0.5}, {"begin": -0.1}, {"end": 1.1}, {"count": -1}, {"min_width": 0}, {"grace": -1},
     {"offer": -0.1}, {"offer": 1.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings_: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match="need"):
        composed(Budget(), **settings_)


def test_a_budget_below_minimum_widths_names_the_least_that_is_possible() -> None:
    channel_map = lab_map("resnet8", 1.0)
    cost, start = macs_cost(channel_map), channel_map.widths
    with pytest.raises(BudgetError, match="min_width=2") as caught:
        Budget(macs=1e-4).check(start_of(cost, start))
    least = cost.at(dict.fromkeys(start, 2)) / cost.at(start)
    assert f"{least:.3g}" in str(caught.value)
    Budget(macs=least * 1.01).check(start_of(cost, start))


def test_growth_without_insertion_is_refused() -> None:
    channel_map = lab_map("resnet8", 1.0)
    cost, start = macs_cost(channel_map), channel_map.widths
    with pytest.raises(BudgetError, match="offer=0"):
        composed(Budget(macs=1.5), offer=0).check(start_of(cost, start))
    with pytest.raises(BudgetError, match="raise count or lower grace"):
        composed(Budget(macs=1.5), count=2, grace=2).check(start_of(cost, start))
    composed(Budget(macs=1.0), offer=0).check(start_of(cost, start))


# -------------------------------------------------------------------------------------------------- share, Never


@settings(max_examples=60)
@given(chain=chains(), share=st.floats(0.1, 5))
def test_uniform_share_is_the_factor_that_costs_the_target(chain: tuple[Cost, dict[str, int]], share: float) -> None:
    cost, start = chain
    target = share * cost.at(start)
    factor = uniform_share(cost, start, target)
    assert cost.at(cost.vector(start) * factor) == pytest.approx(target, rel=1e-6)
    assert (factor > 1) == (share > 1) or share == pytest.approx(1, rel=1e-9)


def test_uniform_share_of_one_layer_between_fixed_ones_is_the_share_itself() -> None:
    cost = chain_cost([10], [4, 7])
    assert uniform_share(cost, {"g0": 10}, 0.37 * cost.at({"g0": 10})) == pytest.approx(0.37)


def test_never_does_nothing() -> None:
    channel_map = lab_map("resnet8", 1.0)
    policy = Never()
    policy.check(start_of(macs_cost(channel_map), channel_map.widths))
    assert policy.reviews(1000) == ()
    reports = tuple(
        GroupReport(name=n, width_start=w, worth=(-1.0,) * w, grace=(False,) * w) for n, w in channel_map.widths.items()
    )
    situation = Situation(step=1, total_steps=2, groups=reports, costs=Costs(macs=macs_cost(channel_map)))
    assert not policy.decide(situation).plan


# ------------------------------------------------------------------------------------------------------ plans that cost


def reports_of(worths: Mapping[str, tuple[float, ...]]) -> list[GroupReport]:
    """Reports on groups of these worths, nobody in grace."""
    return [GroupReport(name=n, width_start=len(w), worth=w, grace=(False,) * len(w)) for n, w in worths.items()]


def test_a_shrunk_decision_predicts_the_interactions_of_those_who_still_leave() -> None:
    """Four of eight leave instead of eight: with interactions c they cost their worths and c 4^2."""
    report = replace(reports_of({"a": (1e-3,) * 16})[0], together=(8, 8e-3 + 0.64))
    lesser = shrunk(Decision(plan={"a": IndexMap.removing(range(8), 16)}, predicted=0.648), [report])
    assert lesser.plan == {"a": IndexMap.removing(range(4), 16)}
    assert lesser.predicted == pytest.approx(4e-3 + 0.01 * 4**2)


def test_a_shrunk_decision_keeps_the_weaker_half_of_the_removals_and_no_insertions() -> None:
    worths = reports_of({"a": (3.0, 1.0, 5.0, 0.5), "b": (0.1, -2.0, 9.0)})
    plan = {"a": IndexMap.removing([0, 1, 3], 4).inserting(2), "b": IndexMap.removing([1], 3)}
    lesser = shrunk(Decision(plan=plan, predicted=4.5, target=7, price=0.25), worths)
    assert lesser.plan == {"b": IndexMap.removing([1], 3), "a": IndexMap.removing([3], 4)}
    assert lesser.predicted == 0.5
    assert (lesser.target, lesser.price) == (7, 0.25)


def test_a_shrunk_decision_keeps_to_multiples() -> None:
    worths = reports_of({"a": tuple(map(float, range(24))), "b": tuple(map(float, range(100, 116)))})
    plan = {"a": IndexMap.removing(range(16), 24), "b": IndexMap.removing(range(8), 16)}
    lesser = shrunk(Decision(plan=plan, multiple=8), worths)  # the weaker half is twelve of a: 24 - 12 is no multiple
    assert lesser.plan == {"a": IndexMap.removing(range(8), 24)}
    assert shrunk(Decision(plan={"b": plan["b"]}, multiple=8), worths).plan == {}


@settings(max_examples=30)
@given(chain=chains(least=8, most=40), macs=st.floats(0.2, 0.8), fidelity=st.none() | st.floats(-1, 1))
def test_what_a_plan_may_cost_grows_with_what_was_predicted_is_halved_in_doubt_and_unlimited_at_the_end(
    chain: tuple[Cost, dict[str, int]], macs: float, fidelity: float | None
) -> None:
    cost, start = chain
    assume(feasible(cost, start, macs))
    policy = composed(Budget(macs=macs), tolerance=0.25)
    trusting = simulate(policy, cost, start, lognormal(0))
    *early, last = run = simulate(policy, cost, start, lognormal(0), fidelity=fidelity)
    assert [review.decision.plan for review in run] == [review.decision.plan for review in trusting]
    doubted = fidelity is not None and fidelity < policy.limits.doubt
    for review in early:
        assert review.decision.predicted is not None
        whole = 2 * review.decision.predicted + 0.25
        assert review.decision.max_rise == (whole / 2 if doubted else whole)
        assert bool(review.decision.notes) == doubted
        assert all(f"Spearman of {fidelity:.2f}, below 0.2:" in note for note in review.decision.notes)
    assert last.decision.max_rise == math.inf and not last.decision.notes
    assert last.cost <= macs * cost.at(start)


def test_a_price_that_is_doubted_may_cost_half_as_much_at_every_review() -> None:
    cost, start = chain_cost([32] * 3, [9] * 4), {f"g{g}": 32 for g in range(3)}
    policy = composed(Price(), count=4, offer=0.0)
    trusted, doubted = (
        simulate(policy, cost, start, lognormal(1), loss=lambda widths: 0.5, fidelity=f) for f in (0.9, 0.0)
    )
    for before, after in zip(trusted, doubted, strict=True):
        assert after.decision.plan == before.decision.plan
        assert after.decision.max_rise == before.decision.max_rise / 2
        assert len(before.decision.notes) == 1 and after.decision.notes[1:] == before.decision.notes
        assert "Spearman of 0.00, below 0.2:" in after.decision.notes[0]


@pytest.mark.parametrize("wrong", [{"tolerance": -0.1}, {"diminishing": -1.0}])
def test_negative_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match="may be negative"):
        composed(Budget(), **wrong)


# ------------------------------------------------------------------------------------------------------- options


def feasible(cost: Cost, start: Mapping[str, int], macs: float, kept: tuple[str, ...] = ()) -> bool:
    """Whether minimum widths cost less than this share."""
    return cost.at({n: w if n in kept else min(w, 2) for n, w in start.items()}) < macs * cost.at(start)


def test_a_pattern_that_matches_nothing_is_an_error_with_close_names() -> None:
    cost, start = chain_cost([8, 8], [9, 9, 9]), {"g0": 8, "g1": 8}
    with pytest.raises(PolicyError, match=r"protect='h0' matches no channel group.*g0"):
        composed(Budget(), protect=("h0",)).check(start_of(cost, start))
    with pytest.raises(PolicyError, match="nothing is left"):
        composed(Auto(samples=10), protect=("g*",)).check(start_of(cost, start))


@settings(max_examples=30)
@given(chain=chains(), macs=st.floats(0.3, 1.5), seed=st.integers(0, 99))
def test_protected_groups_keep_their_widths(chain: tuple[Cost, dict[str, int]], macs: float, seed: int) -> None:
    cost, start = chain
    assume(len(start) > 1)
    assume(feasible(cost, start, macs, kept=("g0",)))
    policy = composed(Budget(macs=macs), protect=("g0",))
    assert all(r.widths["g0"] == start["g0"] for r in simulate(policy, cost, start, lognormal(seed)))


@settings(max_examples=30)
@given(chain=chains(least=8, most=40), macs=st.floats(0.3, 1.5), multiple=st.sampled_from([2, 4, 8]))
def test_widths_that_change_become_multiples(chain: tuple[Cost, dict[str, int]], macs: float, multiple: int) -> None:
    cost, start = chain
    policy = composed(Budget(macs=macs), multiple=multiple)
    assume(cost.at(policy.limits.narrowest(start)) <= macs * cost.at(start))
    reviews = simulate(policy, cost, start, lognormal(0))
    changed = [w for r in reviews for name, w in r.widths.items() if w != start[name]]
    assume(changed)
    assert all(width % multiple == 0 for width in changed)
    assert reviews[-1].cost <= macs * cost.at(start)


@settings(max_examples=60)
@given(
    chain=chains(least=2, most=40), macs=st.floats(0.05, 0.95), multiple=st.sampled_from([1, 3, 8, 16]),
    least=st.integers(1, 9), protect=st.sampled_from([(), ("g1",)]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_budget_is_refused_at_the_door_or_met(
    chain: tuple[Cost, dict[str, int]], macs: float, multiple: int, least: int, protect: tuple[str, ...], seed: int
) -> None:
    """Whatever multiples, minimum widths and protected groups leave: no run ends above its budget without a word."""
    cost, start = chain
    assume(len(start) > 1 or not protect)
    policy = composed(Budget(macs=macs), multiple=multiple, min_width=least, protect=protect, offer=0.0)
    target = macs * cost.at(start)
    if cost.at(policy.limits.narrowest(start)) > target:
        with pytest.raises(BudgetError, match=f"multiple={multiple}"):
            policy.check(start_of(cost, start))
        return
    last = simulate(policy, cost, start, lognormal(seed))[-1]
    assert last.cost <= target * (1 + 1e-9)
    assert last.decision.missed is None


def test_a_budget_that_is_missed_says_so() -> None:
    """Nothing is known of any filter: nobody may leave, and the last decision says what that comes to."""
    cost, start = chain_cost([16, 16], [9, 9, 9]), {"g0": 16, "g1": 16}
    *early, last = simulate(Budget(macs=0.5), cost, start, lambda _, width: [math.inf] * width)
    assert all(review.decision.missed is None for review in early)
    assert last.decision.missed is not None
    assert "ends at 100.0% of the start instead of 50.0%; nothing is known of 32 filters" in last.decision.missed


def test_the_price_of_filters_that_do_harm_is_nothing() -> None:
    """In nats per unit of the cost, as every price; a negative worth is no price."""
    cost = chain_cost([8, 8], [10, 10, 10])
    worth = {"g0": [1.0] * 8, "g1": [1.0] * 4 + [-0.4, -0.3, -0.2, -0.1]}
    review = last_decision(composed(Budget(macs=0.9), count=1), cost, worth, {"g0": 8, "g1": 8})
    assert review.decision.plan.keys() == {"g1"}
    assert review.decision.price == 0.0
    alone = chain_cost([8], [10, 10])  # every channel costs 10 x 3 + 10 x 10
    dearer = last_decision(
        composed(Budget(macs=0.5), count=1), alone, {"g0": [1.0] * 4 + [-0.1] * 4}, {"g0": 8}
    ).decision
    assert dearer.price == 0.0
    dearer = last_decision(
        composed(Budget(macs=0.4), count=1), alone, {"g0": [1.0] * 4 + [-0.1] * 4}, {"g0": 8}
    ).decision
    assert (dearer.price, dearer.unit, dearer.target) == (pytest.approx(1 / 130), "macs", pytest.approx(0.4 * 8 * 130))


@settings(max_examples=30)
@given(chain=chains(least=8, most=40), macs=st.floats(0.2, 0.9), most=st.floats(0.05, 0.5))
def test_no_review_but_the_last_moves_more_than_it_may(
    chain: tuple[Cost, dict[str, int]], macs: float, most: float
) -> None:
    cost, start = chain
    assume(feasible(cost, start, macs))
    reviews = simulate(composed(Budget(macs=macs), max_move=most, offer=0.0), cost, start, lognormal(0))
    before = cost.at(start)
    for review in reviews[:-1]:
        room = max(cost.of_channel(cost.vector(review.before)))
        assert review.cost >= (1 - most) * before - room
        before = review.cost


@settings(max_examples=30)
@given(chain=chains(least=8, most=40), loss=st.floats(0.3, 3.0), pace=st.floats(0.05, 1.0), most=st.floats(0.05, 0.9))
def test_the_last_review_of_a_price_goes_the_whole_way_that_is_left(
    chain: tuple[Cost, dict[str, int]], loss: float, pace: float, most: float
) -> None:
    """Down to where the loss says, by `max_move` at most; up it goes no further: newborns could not be judged."""
    cost, start = chain
    policy = composed(Price(pace=pace), count=3, max_move=most, offer=0.0)
    *_, last = simulate(policy, cost, start, lognormal(1), loss=lambda widths: loss)
    now, aim = cost.at(last.before), policy.justified(last.situation, loss)
    assert last.decision.target == pytest.approx(min(max(aim, (1 - most) * now), now), abs=1)


def test_a_review_before_the_last_goes_its_share_of_the_way() -> None:
    cost, start = chain_cost([32] * 3, [9] * 4), {f"g{g}": 32 for g in range(3)}
    policy = composed(Price(pace=0.3), count=4, offer=0.0, max_move=0.9)
    first, _, third, last = simulate(policy, cost, start, lognormal(1), loss=lambda widths: 0.5)
    for review, share in ((first, 0.3), (third, 0.5), (last, 1.0)):
        now, aim = cost.at(review.before), policy.justified(review.situation, 0.5)
        assert review.decision.target == pytest.approx(now * (aim / now) ** share, abs=1)


@settings(max_examples=30)
@given(chain=chains(), share=st.floats(0.3, 0.9))
def test_a_budget_in_parameters_or_in_absolute_numbers_is_the_same_promise(
    chain: tuple[Cost, dict[str, int]], share: float
) -> None:
    cost, start = chain
    full = cost.at(start)
    assume(share * full > ABSOLUTE and feasible(cost, start, share))
    by_share = simulate(Budget(macs=share), cost, start, lognormal(0))
    by_number = simulate(Budget(macs=share * full), cost, start, lognormal(0))
    by_params = simulate(Budget(params=share), cost, start, lognormal(0))
    assert by_share[-1].widths == by_number[-1].widths == by_params[-1].widths


def test_a_budget_in_two_units_is_refused() -> None:
    with pytest.raises(BudgetError, match="pass one of them"):
        Budget(macs=0.5, params=0.5)
    with pytest.raises(BudgetError, match=r"latency=0\.5 and latency_ms=3"):
        Budget(latency=0.5, latency_ms=3)
    with pytest.raises(BudgetError, match=r"latency=0\.5 needs to know"):
        Budget(latency=0.5).check(start_of(chain_cost([8], [1, 1]), {"g0": 8}))


@settings(max_examples=30)
@given(chain=chains(), macs=st.sampled_from([0.6, 1.0]), multiple=st.sampled_from([1, 4]), seed=st.integers(0, 3))
def test_no_group_is_flooded_with_newborns(
    chain: tuple[Cost, dict[str, int]], macs: float, multiple: int, seed: int
) -> None:
    cost, start = chain
    policy = composed(Budget(macs=macs), offer=0.2, multiple=multiple)
    assume(cost.at(policy.limits.narrowest(start)) < macs * cost.at(start))
    for review in simulate(policy, cost, start, lognormal(seed, spread=3.0)):
        target = review.decision.target
        assert target is not None
        if target <= cost.at(review.before):  # a network that must grow has to arrive
            for name, index_map in review.decision.plan.items():
                assert len(index_map.inserted) <= max(multiple, 0.25 * review.before[name])


def test_newborns_that_cost_too_much_are_not_offered() -> None:
    cost, start = chain_cost([16, 16, 16], [9, 9, 9, 9]), {"g0": 16, "g1": 16, "g2": 16}

    def born(newborn: float) -> int:
        reviews = simulate(composed(Budget(macs=0.6), offer=0.1, newborn=newborn), cost, start, lognormal(1))
        return sum(len(m.inserted) for r in reviews for m in r.decision.plan.values())

    assert born(0.0) == 0
    assert 0 < born(0.5) <= born(1.0) <= born(4.0)


# ------------------------------------------------------------------------------------------------------- prices


@pytest.mark.parametrize("seed", [0, 1])
def test_auto_settles_at_the_same_macs_from_narrow_and_from_wide_starts(seed: int) -> None:
    """Where the loss follows the power law, every start leads to the size at which an e-fold earns what all costs."""
    channel_map = lab_map("resnet8", 1.0)
    cost = macs_cost(channel_map)
    full = cost.at(channel_map.widths)
    settled = []
    for factor in (0.5, 1.0, 2.0):
        start = {name: round(width * factor) for name, width in channel_map.widths.items()}
        policy = composed(Auto(exponent=0.2, nats_per_parameter=0.4, samples=round(full)), count=16)
        reviews = simulate(policy, cost, start, lognormal(seed), loss=lambda w: (cost.at(w) / full) ** -0.2)
        settled.append(reviews[-1].cost / full)
    # 0.2 (m ** -0.2) = 0.4 m, where the uniform multiple of these MACs has the widths that were found
    assert settled == pytest.approx([0.5 ** (1 / 1.2)] * 3, rel=0.05)


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, None])
def test_a_loss_that_says_nothing_about_size_moves_nothing(loss: float | None) -> None:
    cost, start = chain_cost([16, 16], [9, 9, 9]), {"g0": 16, "g1": 16}
    said = None if loss is None else lambda w: loss
    assert all(
        not r.decision.plan for r in simulate(composed(Price(), offer=0.0), cost, start, lognormal(0), loss=said)
    )


def test_auto_without_the_number_of_samples_is_refused() -> None:
    cost, start = chain_cost([8, 8], [9, 9, 9]), {"g0": 8, "g1": 8}
    with pytest.raises(BudgetError, match=r"Auto\(samples=len\(dataset\)\)"):
        Auto().check(start_of(cost, start))


@pytest.mark.parametrize(
    "policy", [Price(nats_per_model=0.1, exponent=0.1), Auto(nats_per_parameter=0.1, exponent=0.1, samples=7200)]
)
def test_a_network_grows_while_its_loss_is_high_and_shrinks_once_it_is_low(policy: Price) -> None:
    cost, start = chain_cost([16, 16, 16], [9, 9, 9, 9]), {"g0": 16, "g1": 16, "g2": 16}

    def first(loss: float) -> float:
        review = simulate(policy, cost, start, lognormal(1), loss=lambda w: loss)[0]
        return review.cost / cost.at(start)

    # at a loss of 1 the whole network, 0.1 nats by either policy (it has 7200 parameters), earns what it costs
    assert cost.at(start) == pytest.approx(7200, rel=0.15)
    assert first(0.3) < 0.75 < 0.9 < first(1.0) <= 1.1 < 1.3 < first(3.0)


@pytest.mark.parametrize("wrong", [{"nats_per_model": 0.0}, {"exponent": 0.0}, {"pace": 0.0}, {"pace": 1.5}])
def test_impossible_prices_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Price(**wrong)


# ------------------------------------------------------------------------------------------------- leaving together


def test_an_interaction_is_what_a_trial_costs_beyond_the_worths() -> None:
    reports = GroupReport(name="g", width_start=6, worth=(3.0, 1.0, -1.0, 2.0, 9.0, 9.0), grace=(False,) * 5 + (True,))
    assert reports.judged == (2, 1, 3, 0, 4)
    assert reports.interaction == 0.0
    together = replace(reports, together=(3, 12.0))  # -1 counts for nothing, 1 and 2 for three
    assert together.interaction == pytest.approx((12.0 - 3.0) / 3**2)
    assert replace(reports, together=(3, 2.0)).interaction == 0.0, "filters that gain by company gain nothing here"


def decided(policy: Budget, together: Mapping[str, tuple[int, float] | None]) -> Decision:
    """One decision on two groups of 16 filters of one cost and one worth."""
    cost = chain_cost([16, 16], [1, 0.001, 1])
    cost.base[0, 1] = cost.base[2, 0] = 5
    reports = tuple(
        GroupReport(name=n, width_start=16, worth=(1e-3,) * 16, grace=(False,) * 16, together=t)
        for n, t in together.items()
    )
    return policy.decide(Situation(step=1, total_steps=1, groups=reports, costs=Costs(macs=cost)))


def test_a_group_whose_filters_stand_in_for_each_other_keeps_more_of_them() -> None:
    policy = composed(Budget(macs=0.5), count=1, diminishing=0.0, offer=0.0)
    plan = decided(policy, {"g0": (8, 8e-3 + 0.64), "g1": (8, 8e-3 + 0.16)}).plan
    lost = {name: len(index_map.removed) for name, index_map in plan.items()}
    assert sum(lost.values()) == pytest.approx(16, abs=1)
    # marginal costs 1e-3 + c (2 k + 1) are alike where c0 k0 = c1 k1, and c0 = 4 c1
    assert lost["g1"] / lost["g0"] == pytest.approx(4, rel=0.3)


def test_what_is_predicted_holds_the_interactions() -> None:
    policy = composed(Budget(macs=0.5), count=1, diminishing=0.0, offer=0.0)
    decision = decided(policy, {"g0": (8, 8e-3 + 0.64), "g1": None})
    lost = {name: len(index_map.removed) for name, index_map in decision.plan.items()}
    interaction = 0.64 / 8**2 * lost.get("g0", 0) ** 2
    assert decision.predicted == pytest.approx(sum(lost.values()) * 1e-3 + interaction)


@pytest.mark.parametrize("wrong", [-0.1, 1.0])
def test_a_share_that_leaves_together_is_a_share(wrong: float) -> None:
    with pytest.raises(ValueError, match="trial_share"):
        composed(Budget(), trial_share=wrong)
