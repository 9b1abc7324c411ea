"""Methods that are compared: every one ends where it should, and the controls are what they say."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autowidth.cost import count_macs, macs_cost
from autowidth.lab.loop import Method, train
from autowidth.lab.loop_parts import probe_batches
from autowidth.lab.methods import (
    METHODS,
    OneShot,
    Task,
    dense_macs,
    fresh_network,
    uniform_widths,
)
from autowidth.lab.models import build
from autowidth.lab.other_tools import (
    SEEN,
    MissingToolError,
    UnfitModelError,
    gromo_grown,
    growing_network,
    growth_plan,
    inner_widths,
    torch_pruned,
)
from autowidth.lab.prepare import load_images
from autowidth.lab.settings import Settings
from autowidth.policy import Budget, BudgetError, Costs, GroupReport, Never, Situation, Start
from autowidth.trace import trace
from composed import composed

QUICK = Settings(
    model="resnet8", data="digits", epochs=2, batch_size=50, limit=150, threads=1, looks=1,
    policy=composed(Budget(), count=2, begin=0.2, end=0.8, grace=0),
)  # fmt: skip
DIGIT = torch.zeros(2, 1, 8, 8)
ANSWERS = {"autowidth": 2}
"""How many results a method gives, if not one."""


def task(settings: Settings = QUICK, macs: float = 0.5) -> Task:
    return Task(settings=settings, macs=macs, images=load_images(settings))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_at_the_target_and_gives_a_network_that_runs(name: str) -> None:
    if name == "gromo":
        pytest.importorskip("gromo")
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
    reports = tuple(
        GroupReport(name=g.name, width_start=g.width, worth=tuple(worths[g.name]), grace=(False,) * g.width)
        for g in channel_map.groups
    )
    return Situation(step=1, total_steps=2, groups=reports, costs=Costs(macs=cost))


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
        OneShot(macs=macs).check(Start(costs=seen.costs, widths=seen.widths))


@given(share=st.floats(0.05, 4.0))
@settings(max_examples=20, deadline=None)
def test_uniform_widths_cost_at_most_the_target_and_leave_little_of_it(share: float) -> None:
    cost = situation(drawn(0)).costs.macs
    start = {name: len(w) for name, w in drawn(0).items()}
    widths = uniform_widths(cost, start, share * cost.at(start))
    assert cost.at(widths) <= share * cost.at(start)
    assert cost.at({name: width + 1 for name, width in widths.items()}) > share * cost.at(start)


# ---- other tools ---------------------------------------------------------------------------------------------------


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


def probe_loss(network: torch.nn.Module, settings: Settings) -> float:
    """The mean loss, in evaluation mode, on the images from which GroMo grows."""
    network.eval()
    with torch.no_grad():
        seen = list(islice(iter(probe_batches(load_images(settings), settings.seed)), SEEN))
        return sum(F.cross_entropy(network(x), y, reduction="sum").item() for x, y in seen) / sum(
            len(y) for _, y in seen
        )


def test_gromo_grows_the_blocks_that_it_is_told_to_and_the_loss_falls() -> None:
    pytest.importorskip("gromo")
    longer = QUICK.model_copy(update={"limit": 600, "epochs": 3, "channels_last": True})
    images = load_images(longer)
    plan = growth_plan("resnet14", images, 0.5 * count_macs(build("resnet14", in_channels=1), DIGIT))
    torch.manual_seed(0)
    small = growing_network(plan, images, share=0.5, device=torch.device("cpu"))
    small = train(longer, method=Method(policy=Never()), network=small, images=images).network
    before = {name: value.clone() for name, value in small.state_dict().items()}
    grown = gromo_grown(small, images, inner=plan.inner, seed=longer.seed)
    assert inner_widths(small) == [[width] * 2 for width in plan.inner_at(0.5)]
    assert inner_widths(grown) == [[width] * 2 for width in plan.inner]
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert probe_loss(grown, longer) < probe_loss(small, longer)
    for name, parameter in grown.named_parameters():
        assert parameter.requires_grad and parameter.grad is None, name
    groups = {g.name: g.width for g in trace(grown, DIGIT).groups}
    assert groups["stages.1.0.first_layer.layer"] == plan.inner[1]
    again = train(longer, method=Method(policy=Never()), network=grown, images=images)
    assert again.loss < 1.5 and again.macs == count_macs(grown, DIGIT)


def test_gromo_leaves_blocks_alone_that_are_wide_enough() -> None:
    pytest.importorskip("gromo")
    images = load_images(QUICK)
    plan = growth_plan("resnet8", images, 60_000)
    network = growing_network(plan, images, share=0.5, device=torch.device("cpu"))
    first, second, third = plan.inner_at(0.5)
    assert inner_widths(gromo_grown(network, images, inner=(first, second + 2, third), seed=0)) == [
        [first],
        [second + 2],
        [third],
    ]


@pytest.mark.parametrize("model", ["resnet8", "resnet20"])
def test_the_network_of_gromo_is_ours_as_far_as_it_can_be(model: str) -> None:
    pytest.importorskip("gromo")
    images = load_images(QUICK)
    ours = build(model, in_channels=1)
    whole = count_macs(ours, DIGIT)
    plan = growth_plan(model, images, whole)
    theirs = growing_network(plan, images, share=1.0, device=torch.device("cpu"))
    assert (plan.stream, plan.inner) == (16, (16, 32, 64))
    assert count_macs(theirs, DIGIT) == whole
    values = {name: ours.state_dict()[our_name(name)] for name in theirs.state_dict()}
    assert {our_name(name) for name in values} == set(ours.state_dict())
    theirs.load_state_dict(values)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), rtol=1e-5, atol=1e-5)


def our_name(name: str) -> str:
    """What our ResNet calls a weight of GroMo's."""
    parts = {"pre_net.0": "stem.conv", "pre_net.1": "stem.norm", "post_net.2": "head.linear"}
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    # Every second module of a stage is a ReLU; a norm stands in two places under one object.
    name = re.sub(r"^stages\.(\d)\.(\d)\.", lambda m: f"stages.{m[1]}.{int(m[2]) // 2}.", name)
    name = re.sub(r"(first|second)_layer\.layer\.", r"\1.conv.", name)
    name = re.sub(r"(first|second)_layer\.(extended_)?post_layer_function\.(0\.)?", r"\1.norm.", name)
    return name.replace("downsample.0", "shortcut.conv").replace("downsample.1", "shortcut.norm")


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_the_plan_of_growth_meets_its_target(share: float) -> None:
    pytest.importorskip("gromo")
    images = load_images(QUICK)
    target = share * count_macs(build("resnet20", in_channels=1), DIGIT)
    plan = growth_plan("resnet20", images, target)
    macs = count_macs(growing_network(plan, images, share=1.0, device=torch.device("cpu")), DIGIT)
    assert 0.85 * target < macs <= target
    assert plan.inner[0] == pytest.approx(plan.stream, abs=1)


@pytest.mark.parametrize("model", ["vgg8", "densenet22", "resnet8-padding", "torchvision.models:resnet18"])
def test_gromo_says_which_models_it_grows(model: str) -> None:
    with pytest.raises(UnfitModelError, match=r"residual networks of basic blocks only, not .*resnet20, resnet32"):
        growth_plan(model, load_images(QUICK), 1e6)


def test_gromo_refuses_a_target_below_one_channel() -> None:
    pytest.importorskip("gromo")
    with pytest.raises(BudgetError, match="one channel"):
        growth_plan("resnet8", load_images(QUICK), 10)


def test_a_tool_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gromo", "gromo.containers", "gromo.containers.resnet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingToolError, match=r"pip install 'autowidth\[bench\]'"):
        growth_plan("resnet8", load_images(QUICK), 1e6)


def test_one_epoch_is_too_short_to_grow_in() -> None:
    pytest.importorskip("gromo")
    result = METHODS["gromo"](task(QUICK.model_copy(update={"epochs": 1})))[0].result
    assert result.inserted == 0 and result.widths == result.widths_start


def test_ablations_differ_from_the_run_that_they_ablate() -> None:
    longer = QUICK.model_copy(update={"policy": composed(QUICK.policy, offer=0.2, grace=1, count=3), "epochs": 3})
    whole = METHODS["autowidth"](task(longer))[0].result
    assert whole.inserted > 0
    assert METHODS["autowidth-no-insertion"](task(longer))[0].result.inserted == 0
    for name in ("autowidth-random", "autowidth-l1", "autowidth-next", "autowidth-no-compensation"):
        other = METHODS[name](task(longer))[0].result
        assert (other.widths, other.loss) != (whole.widths, whole.loss), name
