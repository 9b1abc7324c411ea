"""Vocabulary: axes that carry channels, channel groups, index maps, plans. Names and integers, no tensors."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from autowidth.errors import AutoWidthError
from autowidth.notebook import bar, table

FRESH = -1
"""In an index map: this slot has no old channel behind it, it is inserted."""

Role = Literal["write", "read", "carry"]
"""What a parameter does with a channel: a convolution's output axis writes it, its input axis reads it,
norms, biases and depthwise weights carry it along."""


class UnknownGroupError(AutoWidthError, KeyError):
    """A name that is no channel group of the model."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True, order=True)
class ParamAxis:
    """One axis of one parameter or buffer: `name` as in `named_parameters()`, `dim` counted from 0."""

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[dim {self.dim}]"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the channels of a group live on one axis.

    `index[c]` holds the positions of channel c on the axis, in order: one position as a rule, k of them where the
    network flattens a map of k pixels into a linear layer, or reads the channel k times.
    """

    axis: ParamAxis
    role: Role
    index: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> int:
        """How many positions each channel takes on this axis."""
        return len(self.index[0])


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """The axes that must be resized together, and where each of the `width` channels lives on them."""

    name: str
    places: tuple[Place, ...]

    @property
    def width(self) -> int:
        return len(self.places[0].index)

    @property
    def axes(self) -> tuple[ParamAxis, ...]:
        return tuple(place.axis for place in self.places)

    def with_role(self, role: Role) -> tuple[Place, ...]:
        """The places with this role, in the order in which the network met them."""
        return tuple(place for place in self.places if place.role == role)


@dataclass(frozen=True, slots=True)
class FrozenAxis:
    """Positions of an axis that must not be resized, and why."""

    axis: ParamAxis
    index: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class WeightUse:
    """One use of a weight in the forward pass: `macs_per_weight` multiply-accumulates per element and sample."""

    name: str
    macs_per_weight: float


@dataclass(frozen=True, slots=True)
class IndexMap:
    """For each new slot the old index, or -1 for a fresh channel. `size` is the old width.

    A slot that takes over an old channel stands where that channel stood; fresh and repeated ones follow the slot
    before them. `source` in rising order keeps everybody's place, any other order permutes the places.

    Raises ValueError for an empty map and for an index outside -1 .. size-1.
    """

    source: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", tuple(int(s) for s in self.source))
        if not self.source:
            raise ValueError(
                f"an index map of a group of width {self.size} keeps no channel: keep or insert at least one"
            )
        if bad := [s for s in self.source if not FRESH <= s < self.size]:
            raise ValueError(f"index map has source {bad[0]}, allowed are -1 (fresh) and 0 to {self.size - 1}")

    @classmethod
    def identity(cls, size: int) -> IndexMap:
        return cls(tuple(range(size)), size)

    @classmethod
    def removing(cls, channels: Iterable[int], size: int) -> IndexMap:
        """The map that removes these channels."""
        gone = set(channels)
        if bad := [c for c in gone if not 0 <= c < size]:
            raise ValueError(f"cannot remove channel {bad[0]} of a group of width {size}")
        return cls(tuple(c for c in range(size) if c not in gone), size)

    @classmethod
    def between(cls, width: int, wanted: int) -> IndexMap:
        """The map from one width to another: the last channels leave, or fresh ones come behind them."""
        return cls.removing(range(wanted, width), width).inserting(wanted - width)

    def inserting(self, count: int) -> IndexMap:
        """This map with `count` fresh channels at its end."""
        return IndexMap((*self.source, *(FRESH,) * count), self.size)

    def then(self, later: IndexMap) -> IndexMap:
        """The one map that does what this and then `later` do. Raises ValueError where the widths do not meet."""
        if later.size != self.width:
            raise ValueError(f"a map of width {later.size} cannot follow one that ends at width {self.width}")
        return IndexMap(tuple(self.source[s] if s >= 0 else FRESH for s in later.source), self.size)

    @property
    def width(self) -> int:
        """The new width."""
        return len(self.source)

    @property
    def removed(self) -> tuple[int, ...]:
        """Old indices that no slot takes over."""
        kept = set(self.source)
        return tuple(c for c in range(self.size) if c not in kept)

    @property
    def inserted(self) -> tuple[int, ...]:
        """New slots without an old channel."""
        return tuple(slot for slot, s in enumerate(self.source) if s == FRESH)

    @property
    def is_identity(self) -> bool:
        return self.source == tuple(range(self.size))

    def anchors(self) -> list[int]:
        """For each slot the old channel whose place it takes, or -1 where it follows the slot before it."""
        first: list[bool] = []  # whether the slot is the first that takes over its channel
        seen = {FRESH}
        for s in self.source:
            first.append(s not in seen)
            seen.add(s)
        places = iter(sorted(seen - {FRESH}))
        return [next(places) if is_first else FRESH for is_first in first]


ResizePlan: TypeAlias = Mapping[str, IndexMap]
"""Channel group name -> what becomes of its channels. Groups that are not named stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMap:
    """What a trace found: channel groups, frozen axes with reasons, the weights in use, all shapes.

    Its `repr` is a table of the groups with their widths and of the reasons why axes are frozen.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenAxis, ...]
    uses: tuple[WeightUse, ...]
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n".join(_table(self))

    def _repr_html_(self) -> str:
        """For notebooks: the channel groups with their widths to scale, and why axes are frozen."""
        most = max((group.width for group in self.groups), default=1)
        rows = [(g.name, g.width, bar(g.width, most=most), len(g.axes)) for g in self.groups]
        reasons = Counter(frozen.reason for frozen in self.frozen)
        return table(("channel group", "width", "", "axes"), rows, title=_table(self)[0]) + (
            table(("frozen because", "axes"), list(reasons.items()), title="Frozen, wholly or in part")
            if reasons
            else ""
        )

    def group(self, name: str) -> ChannelGroup:
        """The group of this name. Raises UnknownGroupError with the closest names."""
        for group in self.groups:
            if group.name == name:
                return group
        known = [group.name for group in self.groups]
        close = difflib.get_close_matches(name, known, n=3) or known[:5]
        raise UnknownGroupError(f"no channel group is named {name!r}; close names: {', '.join(close) or 'none'}")

    @property
    def widths(self) -> dict[str, int]:
        return {group.name: group.width for group in self.groups}

    def without(self, names: Iterable[str], reason: str) -> ChannelMap:
        """The map in which these groups are frozen, for this reason. Raises UnknownGroupError."""
        gone = {name: self.group(name) for name in names}
        frozen = [
            FrozenAxis(place.axis, tuple(position for row in place.index for position in row), reason)
            for group in self.groups
            if group.name in gone
            for place in group.places
        ]
        groups = tuple(group for group in self.groups if group.name not in gone)
        return replace(self, groups=groups, frozen=(*self.frozen, *frozen))

    def check(self, plan: ResizePlan) -> None:
        """Raises UnknownGroupError or ValueError where the plan does not fit the groups."""
        for name, index_map in plan.items():
            width = self.group(name).width
            if index_map.size != width:
                raise ValueError(
                    f"plan for {name!r} is written for width {index_map.size}, but the group has width {width} now"
                )

    def gathers(self, plan: ResizePlan) -> dict[ParamAxis, np.ndarray]:
        """For every axis that the plan touches: for each new position the old one, or -1. Raises as `check` does."""
        return {axis: layout.source for axis, layout in self._layouts(plan).items()}

    def resized(self, plan: ResizePlan) -> ChannelMap:
        """The map of the network after the plan. Raises as `check` does."""
        return self._after(self._layouts(plan))

    def gathers_and_resized(self, plan: ResizePlan) -> tuple[dict[ParamAxis, np.ndarray], ChannelMap]:
        """What `gathers` and `resized` return, for the price of one."""
        layouts = self._layouts(plan)
        return {axis: layout.source for axis, layout in layouts.items()}, self._after(layouts)

    def _after(self, layouts: Mapping[ParamAxis, _Layout]) -> ChannelMap:
        shapes = dict(self.shapes)
        for axis, layout in layouts.items():
            shape = list(shapes[axis.name])
            shape[axis.dim] = len(layout.source)
            shapes[axis.name] = tuple(shape)
        groups = tuple(
            replace(group, places=tuple(_moved(place, group.name, layouts.get(place.axis)) for place in group.places))
            for group in self.groups
        )
        frozen = tuple(
            replace(f, index=tuple(layouts[f.axis].position(p) for p in f.index)) if f.axis in layouts else f
            for f in self.frozen
        )
        return replace(self, groups=groups, frozen=frozen, shapes=shapes)

    def _layouts(self, plan: ResizePlan) -> dict[ParamAxis, _Layout]:
        self.check(plan)
        moves = {name: _Move.of(name, index_map) for name, index_map in plan.items() if not index_map.is_identity}
        touched: dict[ParamAxis, list[tuple[_Move, Index]]] = {}
        for name, move in moves.items():
            for place in self.group(name).places:
                touched.setdefault(place.axis, []).append((move, place.index))
        known: dict[tuple[object, ...], _Layout] = {}  # weight, bias and norm of a layer share one index object
        layouts = {}
        for axis, on_axis in touched.items():
            length = self.shapes[axis.name][axis.dim]
            key = (length, *((move.name, id(index)) for move, index in on_axis))
            if key not in known:
                known[key] = _lay_out(length, on_axis)
            layouts[axis] = known[key]
        return layouts


# ---- the table -------------------------------------------------------------------------------------------------------

_LISTED, _REASONS, _NOTES, _LONGEST = 14, 8, 3, 110
"""Groups, reasons and notes that a table lists, and characters of a reason or note."""


def _table(channel_map: ChannelMap) -> list[str]:
    """The lines of a channel map's table; at most 30, whatever the network."""
    groups = [(group.name, str(group.width), str(len(group.axes))) for group in channel_map.groups]
    rows = [("channel group", "width", "axes"), *groups]
    name, width, axes = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"  {row[0]:<{name}}  {row[1]:>{width}}  {row[2]:>{axes}}" for row in rows]
    by_reason: dict[str, set[ParamAxis]] = {}
    for frozen in channel_map.frozen:
        by_reason.setdefault(frozen.reason, set()).add(frozen.axis)
    reasons = [f"  {_counted(len(found), 'axis', 'axes')}: {reason}" for reason, found in by_reason.items()]
    total = len({frozen.axis for frozen in channel_map.frozen})
    return [
        f"ChannelMap: {_counted(len(groups), 'channel group', 'channel groups')} that can be resized",
        *(lines[:1] if groups else []),
        *_elided(lines[1:], _LISTED),
        *([f"frozen, wholly or in part: {_counted(total, 'axis', 'axes')}"] if reasons else []),
        *(_shortened(line) for line in _elided(reasons, _REASONS)),
        *(_shortened(f"note: {note}") for note in _elided(channel_map.notes, _NOTES)),
    ]


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _elided(lines: Sequence[str], most: int) -> list[str]:
    """The lines, or where there are more than `most` those at both ends, and between them how many are left out."""
    if len(lines) <= most:
        return list(lines)
    first, last = most // 2, (most - 1) // 2
    return [*lines[:first], f"  ... {len(lines) - first - last} more ...", *lines[len(lines) - last :]]


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


# ---- the new order of an axis ----------------------------------------------------------------------------------------

Index: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Move:
    """What an index map says about the order of slots, worked out once for all axes of the group.

    source: for each slot its old channel, or FRESH. places: the old channel whose place it takes, or FRESH. anchored:
    the slots that take a place.
    """

    name: str
    source: np.ndarray
    places: np.ndarray
    anchored: np.ndarray

    @classmethod
    def of(cls, name: str, index_map: IndexMap) -> _Move:
        places = np.array(index_map.anchors())
        return cls(name, np.asarray(index_map.source), places, np.flatnonzero(places != FRESH))


def _moved(place: Place, group: str, layout: _Layout | None) -> Place:
    """The place after the layout of its axis."""
    if layout is None:
        return place
    if group in layout.index:
        return replace(place, index=layout.index[group])
    return replace(place, index=tuple(tuple(layout.position(p) for p in row) for row in place.index))


@dataclass(frozen=True, slots=True)
class _Layout:
    """The new order of one axis.

    source: for each new position the old one, or FRESH. index: where the channels of each resized group are now.
    where: old position -> new one, for the positions of nobody who is resized.
    """

    source: np.ndarray
    index: dict[str, tuple[tuple[int, ...], ...]]
    where: dict[int, int]

    def position(self, old: int) -> int:
        return self.where[old]


def _lay_out(length: int, moves: Sequence[tuple[_Move, Index]]) -> _Layout:
    """Puts every new position next to its sibling.

    Each new position gets a sort key (anchor, rank): an old channel is anchored where it stood, a fresh one behind the
    last position of its sibling, rank by rank. Positions that no resized group lives on keep their place. Sorting the
    keys yields the new axis.

    An axis of seven positions: three channels of two pixels each, and one position of nobody. Channel 1 leaves, a fresh
    channel comes behind channel 0.

        slot  old channel  keys of its two positions  what they hold
        0     0            (0, 0) (1, 0)              0 1
        1     fresh        (1, 1) (1, 2)              -1 -1
        2     2            (4, 0) (5, 0)              4 5
        rest               (6, 0)                     6

    >>> move = _Move.of("g", IndexMap((0, FRESH, 2), 3))
    >>> layout = _lay_out(7, [(move, ((0, 1), (2, 3), (4, 5)))])
    >>> layout.source.tolist(), layout.index["g"], layout.where
    ([0, 1, -1, -1, 4, 5, 6], ((0, 1), (2, 3), (4, 5)), {6: 6})
    """
    anchors, ranks, contents = [], [], []
    for move, where in moves:
        old = np.asarray(where, dtype=np.int64)  # (old width, copies)
        anchor, rank = _keys(old, move)
        content = np.where(move.source[:, None] >= 0, old[move.source], FRESH)  # (new width, copies)
        anchors.append(anchor.ravel())
        ranks.append(rank.ravel())
        contents.append(content)
    rest = _rest(length, [where for _, where in moves])
    # All positions of all groups one behind the other, then the rest; `order` sorts them by anchor, then by rank.
    order = np.lexsort((np.concatenate([*ranks, np.zeros_like(rest)]), np.concatenate([*anchors, rest])))
    source = np.concatenate([*(content.ravel() for content in contents), rest])[order]
    new_position = np.argsort(order)
    *groups, rest_now = np.split(new_position, np.cumsum([content.size for content in contents]))
    together = zip(moves, contents, groups, strict=True)
    index = {move.name: _rows(now.reshape(content.shape)) for (move, _), content, now in together}
    return _Layout(source, index, dict(zip(rest.tolist(), rest_now.tolist(), strict=True)))


def _rest(length: int, indices: Sequence[Index]) -> np.ndarray:
    """The positions of an axis that are in none of these indices."""
    free = np.ones(length, dtype=bool)
    for index in indices:
        free[np.asarray(index, dtype=np.int64)] = False
    return np.flatnonzero(free)


def _rows(table: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, table.tolist()))


def _keys(old: np.ndarray, move: _Move) -> tuple[np.ndarray, np.ndarray]:
    """Sort keys (anchor, rank), each (new width, copies), for the slots of one group on one axis.

    `old` (old width, copies) are the positions of the old channels. The leader of a slot is the last slot up to it that
    takes a place; those ahead of the first leader follow it backwards. A leader is anchored at the positions whose
    place it takes, with rank 0. Behind it each copy is anchored at the last position of its block, with ranks that
    count on from 1, block by block; ahead of it at the first position of its block, with negative ranks.

    Four slots for two channels at 0 1 and 2 3 (one block of two copies): fresh, channel 0, fresh, channel 1.

    >>> anchor, rank = _keys(np.array([[0, 1], [2, 3]]), _Move.of("g", IndexMap((FRESH, 0, FRESH, 1), 2)))
    >>> anchor.tolist(), rank.tolist()
    ([[0, 0], [0, 1], [1, 1], [2, 3]], [[-2, -1], [0, 0], [1, 2], [0, 0]])
    """
    block = _blocks(old)
    first = np.searchsorted(block, block)  # for each copy the first and the last copy of its block
    last = np.searchsorted(block, block, side="right") - 1
    length, offset = last - first + 1, np.arange(len(block)) - first
    slots = np.arange(len(move.places))
    if not len(move.anchored):  # nobody stays: all stand where the first channel stood
        return np.broadcast_to(old[0][first], (len(slots), len(block))), slots[:, None] * length + offset
    nearest = np.searchsorted(move.anchored, slots, side="right") - 1  # -1: ahead of the first one
    leader = move.anchored[np.maximum(nearest, 0)]
    sibling = old[move.places[leader]]  # (new width, copies)
    behind = (slots - leader)[:, None]  # how many slots behind the leader; negative ahead of the first one
    anchor = np.where(behind == 0, sibling, np.where(behind > 0, sibling[:, last], sibling[:, first]))
    rank = np.where(behind > 0, 1 + (behind - 1) * length + offset, behind * length + offset)
    return anchor, np.where(behind == 0, 0, rank)


def _blocks(old: np.ndarray) -> np.ndarray:
    """The block of each copy: copies that stand side by side in every channel move as one block.

    Two channels that live on 0 1 and 8, and on 2 3 and 9, have a block of two copies and one of one:

    >>> _blocks(np.array([[0, 1, 8], [2, 3, 9]])).tolist()
    [0, 0, 1]
    """
    if old.shape[1] == 1:
        return np.zeros(1, dtype=np.int64)
    together = (np.diff(old, axis=1) == 1).all(axis=0)
    return np.concatenate([[0], np.cumsum(~together)])
