"""Surgery that fails changes nothing, and what it refuses is refused before the first write."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from autowidth.channels import FRESH, ChannelGroup, ChannelMap, IndexMap
from autowidth.errors import AutoWidthError
from autowidth.surgery import (
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
from surgery_nets import (
    NOT_ELEMENTWISE,
    OPTIMIZERS,
    Build,
    Net,
    adam,
    any_net,
    assert_same,
    attributes,
    carried,
    chain,
    contents,
    identities,
    make,
    place,
    residual,
    shapes_of,
    train,
    wild_plan,
)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
