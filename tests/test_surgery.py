"""Laws of surgery: identity, composition, inverse, equality with masking, fresh content."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autowidth.channels import FRESH, ChannelGroup, ChannelMap, IndexMap, ParamAxis, ResizePlan
from autowidth.surgery import OPTIMIZER_STATE, apply_
from surgery_nets import (
    ALL_NETS,
    NOT_ELEMENTWISE,
    OPTIMIZERS,
    Build,
    Net,
    adam,
    any_net,
    any_optimizer,
    assert_same,
    attributes,
    carried,
    chain,
    contents,
    depthwise,
    identities,
    make,
    normed,
    per_channel_net,
    place,
    shapes_of,
    train,
    wild_plan,
)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
