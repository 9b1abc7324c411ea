"""Laws of index maps and channel maps."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autowidth import channels
from autowidth.channels import (
    FRESH,
    ChannelGroup,
    ChannelMap,
    FrozenAxis,
    IndexMap,
    ParamAxis,
    Place,
    ResizePlan,
    UnknownGroupError,
)
from autowidth.errors import AutoWidthError
from autowidth.lab.models import build
from autowidth.trace import trace
from nets import NETS, example

# ---- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def index_maps(draw: st.DrawFn, size: int | None = None) -> IndexMap:
    """Any index map: removal, insertion anywhere, repetition, permutation."""
    width = draw(st.integers(1, 6)) if size is None else size
    source = draw(st.lists(st.integers(FRESH, width - 1), min_size=1, max_size=8))
    return IndexMap(tuple(source), width)


@st.composite
def chains(draw: st.DrawFn, count: int) -> list[IndexMap]:
    """Index maps each of which can follow the one before it."""
    maps = [draw(index_maps())]
    while len(maps) < count:
        maps.append(draw(index_maps(size=maps[-1].width)))
    return maps


def orderly(size: int) -> st.SearchStrategy[IndexMap]:
    """Maps that keep everybody's place: removal, and fresh channels behind any slot."""
    flags = st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=size, max_size=size)
    sources = flags.map(
        lambda rows: [s for c, (kept, fresh) in enumerate(rows) for s in [c] * kept + [FRESH] * fresh] or [0]
    )
    return sources.map(lambda source: IndexMap(tuple(source), size))


def channel_map() -> ChannelMap:
    """Three groups and one frozen axis: `a` and `b` share an axis that is a flattened concatenation, twice."""
    a = ChannelGroup("a", (
        Place(ParamAxis("a.weight", 0), "write", tuple((c,) for c in range(3))),
        Place(ParamAxis("fc.weight", 1), "read", tuple((2 * c, 2 * c + 1, 11 + c) for c in range(3))),
    ))  # fmt: skip
    b = ChannelGroup("b", (
        Place(ParamAxis("b.weight", 0), "write", tuple((c,) for c in range(2))),
        Place(ParamAxis("fc.weight", 1), "read", tuple((6 + 2 * c, 7 + 2 * c) for c in range(2))),
    ))  # fmt: skip
    c = ChannelGroup("c", (
        Place(ParamAxis("fc.weight", 0), "write", tuple((c,) for c in range(4))),
        Place(ParamAxis("out.weight", 1), "read", tuple((3 - c,) for c in range(4))),
    ))  # fmt: skip
    shapes = {"a.weight": (3, 3, 1, 1), "b.weight": (2, 3, 1, 1), "fc.weight": (4, 14), "out.weight": (2, 4)}
    return ChannelMap(
        groups=(a, b, c),
        frozen=(FrozenAxis(ParamAxis("fc.weight", 1), (10,), "a constant channel"),),
        uses=(),
        shapes=shapes,
    )


def injective(size: int) -> st.SearchStrategy[IndexMap]:
    """Maps that remove and permute."""
    orders = st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)
    return orders.map(lambda order: IndexMap(tuple(order), size))


def arbitrary(size: int) -> st.SearchStrategy[IndexMap]:
    """Any map of this size."""
    return index_maps(size=size)


Maps = Callable[[int], st.SearchStrategy[IndexMap]]


@st.composite
def plans(draw: st.DrawFn, of: ChannelMap, maps: Maps = arbitrary) -> ResizePlan:
    """A plan for some of the groups."""
    names = draw(st.sets(st.sampled_from(sorted(of.widths))))
    return {name: draw(maps(of.widths[name])) for name in sorted(names)}


# ---- index maps ------------------------------------------------------------------------------------------------------


def gather(values: list[Any], index_map: IndexMap) -> list[Any]:
    """What the map does, said by the simplest means."""
    return [values[s] if s != FRESH else None for s in index_map.source]


@given(chains(2))
def test_then_does_one_after_the_other(maps: list[IndexMap]) -> None:
    first, second = maps
    values = [f"c{i}" for i in range(first.size)]
    assert gather(values, first.then(second)) == gather(gather(values, first), second)


@given(chains(3))
def test_then_is_associative(maps: list[IndexMap]) -> None:
    a, b, c = maps
    assert a.then(b).then(c) == a.then(b.then(c))


@given(index_maps())
def test_identity_is_neutral(index_map: IndexMap) -> None:
    assert IndexMap.identity(index_map.size).then(index_map) == index_map
    assert index_map.then(IndexMap.identity(index_map.width)) == index_map
    assert index_map.is_identity == (index_map == IndexMap.identity(index_map.size))


@given(index_maps())
def test_removed_and_inserted_account_for_everybody(index_map: IndexMap) -> None:
    kept = set(index_map.source) - {FRESH}
    assert kept | set(index_map.removed) == set(range(index_map.size))
    assert not kept & set(index_map.removed)
    assert all((s == FRESH) == (slot in index_map.inserted) for slot, s in enumerate(index_map.source))
    assert index_map.width == len(index_map.source)


@given(st.integers(2, 8), st.data())
def test_removing_and_inserting(size: int, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    count = data.draw(st.integers(0, 3))
    index_map = IndexMap.removing(gone, size).inserting(count)
    assert index_map.removed == tuple(sorted(gone))
    assert index_map.width == size - len(gone) + count
    assert list(index_map.inserted) == list(range(size - len(gone), index_map.width))


@given(index_maps())
def test_anchors_are_the_places_of_the_survivors_in_order(index_map: IndexMap) -> None:
    anchors = index_map.anchors()
    first = [s != FRESH and s not in index_map.source[:slot] for slot, s in enumerate(index_map.source)]
    assert [a for a in anchors if a != FRESH] == sorted(set(index_map.source) - {FRESH})
    assert [a != FRESH for a in anchors] == first


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IndexMap((), 4), "group of width 4 keeps no channel"),
        (lambda: IndexMap((0, 4), 4), "source 4, allowed are -1 .* and 0 to 3"),
        (lambda: IndexMap((-2,), 4), "source -2"),
        (lambda: IndexMap.removing([4], 4), "cannot remove channel 4 of a group of width 4"),
        (lambda: IndexMap.removing(range(4), 4), "keeps no channel"),
        (lambda: IndexMap.identity(3).then(IndexMap.identity(4)), "width 4 cannot follow one that ends at width 3"),
    ],
)
def test_impossible_maps_are_refused(make: Callable[[], IndexMap], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_sources_become_plain_integers() -> None:
    assert all(type(s) is int for s in IndexMap(tuple(np.array([1, 0])), 2).source)
    assert IndexMap(tuple(torch.tensor([1, 0])), 2) == IndexMap((1, 0), 2)


# ---- channel maps ----------------------------------------------------------------------------------------------------


def owners(of: ChannelMap) -> dict[ParamAxis, list[tuple[str, int, int] | None]]:
    """For each axis, position by position: (group, channel, copy) that lives there, None where nobody does."""
    axes: dict[ParamAxis, list[tuple[str, int, int] | None]] = {}
    for group in of.groups:
        for place in group.places:
            row = axes.setdefault(place.axis, [None] * of.shapes[place.axis.name][place.axis.dim])
            for channel, positions in enumerate(place.index):
                for number, position in enumerate(positions):
                    assert row[position] is None, "two channels at one position"
                    row[position] = (group.name, channel, number)
    return axes


@given(st.data())
def test_gathers_carry_each_channel_to_its_new_place(data: st.DataObject) -> None:
    before = channel_map()
    plan = data.draw(plans(before))
    after, gathers = before.resized(plan), before.gathers(plan)
    both = before.gathers_and_resized(plan)
    assert both[1] == after
    assert {axis: source.tolist() for axis, source in both[0].items()} == {a: s.tolist() for a, s in gathers.items()}
    old, new = owners(before), owners(after)
    for axis, row in new.items():
        source = gathers.get(axis, np.arange(len(old[axis])))
        assert len(source) == len(row)
        for position, owner in enumerate(row):
            if owner is None:
                assert source[position] != FRESH
                assert old[axis][source[position]] is None
                continue
            group, channel, number = owner
            was = plan[group].source[channel] if group in plan else channel
            assert (source[position] == FRESH) == (was == FRESH)
            if was != FRESH:
                assert old[axis][source[position]] == (group, was, number)


@given(st.data())
def test_shapes_widths_and_frozen_positions_follow(data: st.DataObject) -> None:
    before = channel_map()
    plan = data.draw(plans(before))
    after = before.resized(plan)
    assert after.widths == {name: plan[name].width if name in plan else w for name, w in before.widths.items()}
    copies = {"a": 3, "b": 2}
    assert after.shapes["fc.weight"] == (
        after.widths["c"], 1 + sum(n * after.widths[name] for name, n in copies.items()),
    )  # fmt: skip
    row = owners(after)[ParamAxis("fc.weight", 1)]
    assert [i for i, owner in enumerate(row) if owner is None] == list(after.frozen[0].index)


@pytest.mark.parametrize("maps", [orderly, injective])
@given(data=st.data())
def test_resized_twice_is_resized_once_by_both(maps: Maps, data: st.DataObject) -> None:
    before = channel_map()
    first = data.draw(plans(before, maps))
    middle = before.resized(first)
    second = data.draw(plans(middle, maps))
    names = first.keys() | second.keys()
    both = {
        name: first.get(name, IndexMap.identity(before.widths[name])).then(
            second.get(name, IndexMap.identity(middle.widths[name]))
        )
        for name in names
    }
    twice, once = middle.resized(second), before.resized(both)
    assert twice.widths == once.widths
    assert twice.shapes == once.shapes
    # What survives is at the same place either way; a newborn of the first plan that the second one keeps may have
    # lost the sibling beside which it stood.
    if not any(m.inserted for m in first.values()):
        assert twice == once
    for axis, gather_both in before.gathers(both).items():
        a = before.gathers(first).get(axis, np.arange(before.shapes[axis.name][axis.dim]))
        b = middle.gathers(second).get(axis, np.arange(len(a)))
        composed = np.where(b >= 0, a[np.maximum(b, 0)], FRESH)
        assert composed[composed >= 0].tolist() == gather_both[gather_both >= 0].tolist()


@given(st.data())
def test_groups_resized_together_or_in_turn_give_the_same(data: st.DataObject) -> None:
    before = channel_map()
    plan = data.draw(plans(before))
    together, in_turn = before.resized(plan), before
    for name, index_map in plan.items():
        in_turn = in_turn.resized({name: index_map})
    assert in_turn == together


@given(st.data())
def test_fresh_channels_stand_beside_their_sibling(data: st.DataObject) -> None:
    before = channel_map()
    plan = data.draw(plans(before, orderly))
    after = before.resized(plan)
    for group in after.groups:
        for place in group.places:
            columns = np.array(place.index)
            assert (np.diff(columns, axis=0) != 0).all()
            if place.axis != ParamAxis("out.weight", 1):  # there the channels stand in reverse
                assert (np.diff(columns, axis=0) > 0).all(), "channels keep their order in every copy"
    row = owners(after)[ParamAxis("fc.weight", 1)]
    assert [owner[0] if owner else "-" for owner in row] == (
        ["a"] * 2 * after.widths["a"] + ["b"] * 2 * after.widths["b"] + ["-"] + ["a"] * after.widths["a"]
    )
    for start in range(0, 2 * after.widths["a"], 2):
        pixels = row[start : start + 2]
        assert pixels == [("a", start // 2, 0), ("a", start // 2, 1)], "pixels of a channel stay together"


def test_identity_plan_touches_nothing() -> None:
    before = channel_map()
    plan = {name: IndexMap.identity(width) for name, width in before.widths.items()}
    assert before.gathers(plan) == {}
    assert before.resized(plan) == before


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.groups])
def test_traced_maps_stay_consistent(name: str) -> None:
    model, inputs, _ = example(name)
    before = trace(model, inputs, rehearse=False)
    plan = {
        g.name: IndexMap.removing([0] if g.width > 1 else [], g.width).inserting(1 + i)
        for i, g in enumerate(before.groups)
    }
    after = before.resized(plan)
    owners(after)
    for axis, source in before.gathers(plan).items():
        assert after.shapes[axis.name][axis.dim] == len(source)
    back = {n: IndexMap(tuple(range(m.width - len(m.inserted))), m.width) for n, m in plan.items()}
    survivors = {n: IndexMap.removing([0] if w > 1 else [], w) for n, w in before.widths.items()}
    assert after.resized(back) == before.resized(survivors)


def test_errors_name_the_group_and_the_remedy() -> None:
    before = channel_map()
    with pytest.raises(UnknownGroupError, match=r"named 'aa'; close names: a") as caught:
        before.group("aa")
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, AutoWidthError)
    assert not str(caught.value).startswith('"')
    with pytest.raises(UnknownGroupError):
        before.check({"nobody": IndexMap.identity(2)})
    with pytest.raises(ValueError, match="'a' is written for width 4, but the group has width 3"):
        before.resized({"a": IndexMap.identity(4)})


def test_places_and_roles() -> None:
    a = channel_map().group("a")
    assert a.width == 3
    assert [p.copies for p in a.places] == [1, 3]
    assert a.axes == (ParamAxis("a.weight", 0), ParamAxis("fc.weight", 1))
    assert a.with_role("read") == (a.places[1],)
    assert a.with_role("carry") == ()
    assert str(a.axes[1]) == "fc.weight[dim 1]"


def test_groups_can_be_taken_out_for_a_reason() -> None:
    before = channel_map()
    after = before.without(["c", "a"], "the user said so")
    assert after.groups == (before.group("b"),)
    assert after.frozen[:1] == before.frozen
    assert [(str(f.axis), f.index, f.reason) for f in after.frozen[1:]] == [
        ("a.weight[dim 0]", (0, 1, 2), "the user said so"),
        ("fc.weight[dim 1]", (0, 1, 11, 2, 3, 12, 4, 5, 13), "the user said so"),
        ("fc.weight[dim 0]", (0, 1, 2, 3), "the user said so"),
        ("out.weight[dim 1]", (3, 2, 1, 0), "the user said so"),
    ]
    assert (after.uses, after.shapes, after.notes) == (before.uses, before.shapes, before.notes)
    assert before.without([], "nobody") == before
    with pytest.raises(UnknownGroupError, match="named 'd'"):
        before.without(["a", "d"], "no such group")


def test_frozen_groups_follow_the_groups_beside_them() -> None:
    """What is taken out stays where its channels are when a group on the same axis is resized."""
    before = channel_map().without(["b"], "stays")
    after = before.resized({"a": IndexMap.removing([0], 3)})
    (place,) = (f for f in after.frozen if f.reason == "stays" and f.axis.name == "fc.weight")
    assert place.index == (4, 5, 6, 7)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_small_map_is_a_table() -> None:
    of = replace(channel_map(), notes=("only one branch was followed",))
    assert str(of) == repr(of)
    assert repr(of).splitlines() == [
        "ChannelMap: 3 channel groups that can be resized",
        "  channel group  width  axes",
        "  a                  3     2",
        "  b                  2     2",
        "  c                  4     2",
        "frozen, wholly or in part: 1 axis",
        "  1 axis: a constant channel",
        "note: only one branch was followed",
    ]


def test_reasons_are_counted_not_listed() -> None:
    of = channel_map().without(["a", "b", "c"], "its parameters do not train")
    assert repr(of).splitlines() == [
        "ChannelMap: 0 channel groups that can be resized",
        "frozen, wholly or in part: 5 axes",  # fc.weight[dim 1] for two reasons
        "  1 axis: a constant channel",
        "  5 axes: its parameters do not train",
    ]


def test_a_long_map_is_a_short_table() -> None:
    of = trace(build("resnet110", width=0.125), torch.zeros(1, 3, 8, 8), rehearse=False)
    for i, group in enumerate(of.groups[:20]):
        of = of.without([group.name], f"reason {i}: {'long ' * 40}")
    of = replace(of, notes=tuple(f"note {i}" for i in range(9)))
    lines = repr(of).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120
    listed = sum(line.startswith("  stages.") for line in lines)
    assert any(line == f"  ... {len(of.groups) - listed} more ..." for line in lines)
    assert lines[2].split()[0] == of.groups[0].name  # both ends are there
    assert any(line.split()[0] == of.groups[-1].name for line in lines)
    assert sum("axes: reason" in line or "axis: reason" in line for line in lines) > 3


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(channels)
    assert result.attempted >= 3 and result.failed == 0
