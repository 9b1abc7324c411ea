"""Rehearsal: every channel group is resized for trial on a scratch copy, and frozen if the network does not survive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap, ResizePlan
from autowidth.surgery import apply_
from autowidth.trace.frames import described
from autowidth.trace.passes import Passes


def rehearsed(passes: Passes, channel_map: ChannelMap) -> ChannelMap:
    """The map in which every group that does not survive a trial resize is frozen, with the reason."""
    groups = list(channel_map.groups)
    scratches = passes.scratches()
    unfit: dict[str, str] = {}
    while groups:
        found = _failing(passes, channel_map, groups, scratches)
        if not found:
            break
        unfit |= found
        groups = [group for group in groups if group.name not in unfit]
    for group in channel_map.groups:
        if group.name in unfit:
            channel_map = channel_map.without([group.name], unfit[group.name])
    return channel_map


def _failing(
    passes: Passes, channel_map: ChannelMap, groups: Sequence[ChannelGroup], scratches: Iterator[nn.Module]
) -> dict[str, str]:
    """Group name -> why it cannot be resized; empty if all these groups survive together.

    One trial does for all where nothing is wrong. What fails is halved until it is found: where c is the culprit among
    a b c d, the trials are a b c d (fails), a b (survives), c d (fails), c (fails, found), d (survives).
    """
    act, broken, trouble = _first_trouble(passes, channel_map, groups, scratches)
    if not trouble:
        return {}
    if broken or len(groups) == 1:
        return dict.fromkeys(broken or [groups[0].name], f"{act} a channel {trouble}")
    half = len(groups) // 2
    found: dict[str, str] = {}
    for part in (groups[:half], groups[half:]):
        found |= _failing(passes, channel_map, part, scratches)
    return found or {group.name: f"resized together with others, a channel {trouble}" for group in groups}


def _first_trouble(
    passes: Passes, channel_map: ChannelMap, groups: Sequence[ChannelGroup], scratches: Iterator[nn.Module]
) -> tuple[str, list[str], str]:
    """(act, names of broken groups, what went wrong) of the first trial that goes wrong; no words where none does."""
    for act, plan in _trials(groups):
        broken, trouble = _trial(passes, channel_map, plan, scratches)
        if trouble:
            return act, broken, trouble
    return "", [], ""


def _trials(groups: Sequence[ChannelGroup]) -> list[tuple[str, ResizePlan]]:
    """What is tried, as (act, plan): several groups all at once, a single one by removal and insertion apart.

    In the common trial every group loses a channel and gains others. Differing gains (1, 3, 5 ... 31) tell groups apart
    that only survive when they are resized alike; all odd, because `chunk` into halves of n + 1 and n channels forgives
    a difference of one. For the same reason a single group is tried with three fresh channels as well as with one.
    """
    if len(groups) > 1:
        return [("resizing", {group.name: _exchange(group, 1 + 2 * (i % 16)) for i, group in enumerate(groups)})]
    (group,) = groups
    unchanged = IndexMap.identity(group.width)
    removal: ResizePlan = {group.name: IndexMap.removing([0], group.width)} if group.width > 2 else {}
    gains: list[ResizePlan] = [{group.name: unchanged.inserting(n)} for n in (1, 3)]
    return [("removing", removal), *(("inserting", gain) for gain in gains)]


def _exchange(group: ChannelGroup, gain: int) -> IndexMap:
    """The first channel leaves, if there are others, and so many come that the group grows by `gain`."""
    leaving = 1 if group.width > 2 else 0
    return IndexMap.removing(range(leaving), group.width).inserting(gain + leaving)


def _trial(
    passes: Passes, channel_map: ChannelMap, plan: ResizePlan, scratches: Iterator[nn.Module]
) -> tuple[list[str], str]:
    """Resizes a scratch copy and looks at it again. Returns (names of broken groups, what went wrong)."""
    if not plan:
        return [], ""
    scratch = next(scratches)
    try:
        expected = apply_(scratch, channel_map, plan)
        seen = {group.places for group in passes.map_of(scratch).groups}
    except Exception as error:
        return [], f"fails: {described(error)}"
    moved = [group.name for group in expected.groups if group.name in plan and group.places not in seen]
    return moved, "changes which channels belong together" if moved else ""
