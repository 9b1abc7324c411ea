"""From the ledger of a trace to channel groups: united slots are a channel, channels with the same places a group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from autowidth.channels import ChannelGroup, ChannelMap, FrozenAxis, ParamAxis, Place, Role
from autowidth.rules import Ledger

_NO_CHANNEL = "no layer reads or writes channels here"


def read_off(ledger: Ledger, shapes: dict[str, tuple[int, ...]]) -> ChannelMap:
    """Classes of united slots become channels; channels with the same places become channel groups."""
    classes = _classes(ledger)
    slots = _Slots.of(ledger, classes)
    reasons = {int(classes[i]): reason for i, reason in reversed(ledger.marks.items())}
    alike: dict[bytes, list[int]] = {}
    for channel, key in enumerate(slots.keys):
        alike.setdefault(key, []).append(channel)
    groups: list[tuple[Place, ...]] = []
    frozen: dict[tuple[ParamAxis, str], list[int]] = {}
    for members in alike.values():
        unfit = _unfit(ledger, slots.axes_of(members[0]))
        if unfit == _NO_CHANNEL:
            continue  # kernel windows, tokens and the like: nobody reads or writes channels there
        free = []
        for channel in members:
            reason = reasons.get(slots.label(channel)) or unfit
            if reason is None:
                free.append(channel)
            else:
                for axis, position in slots.places_of(channel):
                    frozen.setdefault((axis, reason), []).append(position)
        if free:
            groups.append(_group(ledger, slots, free))
    return ChannelMap(
        groups=_named(sorted(groups, key=lambda places: slots.rank[places[0].axis])),
        frozen=tuple(FrozenAxis(axis, tuple(index), reason) for (axis, reason), index in frozen.items()),
        uses=tuple(ledger.uses),
        shapes=shapes,
    )


@dataclass(frozen=True, slots=True)
class _Slots:
    """All slots sorted by class, then by the order in which their axes were met, then by position.

    first[i] to first[i + 1] are the slots of channel i; keys[i] says on which axes it has how many.
    """

    axes: tuple[ParamAxis, ...]
    rank: dict[ParamAxis, int]
    owner: np.ndarray
    position: np.ndarray
    classes: np.ndarray
    first: np.ndarray
    keys: list[bytes]

    @classmethod
    def of(cls, ledger: Ledger, classes: np.ndarray) -> _Slots:
        """Sorts the slots of a ledger whose ids have these classes."""
        met = {axis: i for i, axis in enumerate(ledger.roles)}
        axes = tuple(sorted(ledger.axes, key=lambda axis: met.get(axis, len(met))))
        rank = {axis: i for i, axis in enumerate(axes)}
        owner = np.repeat([rank[axis] for axis in ledger.axes], ledger.lengths)
        position = np.concatenate([np.arange(length) for length in ledger.lengths])
        ids = np.concatenate([np.arange(s, s + n) for s, n in zip(ledger.starts, ledger.lengths, strict=True)])
        order = np.lexsort((position, owner, classes[ids]))
        owner, position, of_slot = owner[order], position[order], classes[ids][order]
        first = np.flatnonzero(np.diff(of_slot, prepend=-1))
        bounds = [*first.tolist(), len(order)]
        raw = owner.tobytes()
        width = owner.itemsize
        keys = [raw[a * width : b * width] for a, b in itertools.pairwise(bounds)]
        return cls(axes, rank, owner, position, of_slot, np.array(bounds), keys)

    def label(self, channel: int) -> int:
        """The number of the channel's class."""
        return int(self.classes[self.first[channel]])

    def axes_of(self, channel: int) -> list[ParamAxis]:
        """The axes on which a channel lives, each as often as it has positions there."""
        return [self.axes[i] for i in self.owner[self.first[channel] : self.first[channel + 1]].tolist()]

    def places_of(self, channel: int) -> list[tuple[ParamAxis, int]]:
        """The axes and positions of a channel."""
        positions = self.position[self.first[channel] : self.first[channel + 1]].tolist()
        return list(zip(self.axes_of(channel), positions, strict=True))


def _classes(ledger: Ledger) -> np.ndarray:
    """For every id the number of its class: one class is one channel and every place where it lives."""
    if not ledger.edges:
        return np.arange(ledger.ids)
    a, b = (np.concatenate(side) for side in zip(*ledger.edges, strict=True))
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(ledger.ids, ledger.ids))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def _unfit(ledger: Ledger, axes: Sequence[ParamAxis]) -> str | None:
    """Why a class that met no frozen mark still cannot be resized."""
    roles = [ledger.roles.get(axis, set()) for axis in axes]
    if not any(roles):
        return _NO_CHANNEL
    if any({"read", "write"} <= role for role in roles):
        return "one axis both reads and writes channels"
    if not any("write" in role for role in roles):
        return "no layer writes these channels"
    if not any("read" in role for role in roles):
        return "no layer reads these channels"
    return None


def _group(ledger: Ledger, slots: _Slots, channels: list[int]) -> tuple[Place, ...]:
    """The places of one channel group; channels in the order in which the first layer writes them."""
    axes = slots.axes_of(channels[0])
    table = slots.position[slots.first[channels][:, None] + np.arange(len(axes))]  # (channel, slot of the channel)
    writer = next(i for i, axis in enumerate(axes) if "write" in ledger.roles.get(axis, set()))
    table = table[np.argsort(table[:, writer], kind="stable")]
    columns = np.ascontiguousarray(table.T)
    places: list[Place] = []
    shared: dict[tuple[int, bytes], tuple[tuple[int, ...], ...]] = {}
    for axis, run in itertools.groupby(range(len(axes)), key=axes.__getitem__):
        roles = ledger.roles.get(axis, set())
        role: Role = "read" if "read" in roles else "write" if "write" in roles else "carry"
        part = columns[list(run)]
        key = (len(part), part.tobytes())  # a layer's weight, bias and norm have the same index: one object for all
        if key not in shared:
            shared[key] = tuple(zip(*part.tolist(), strict=True))
        places.append(Place(axis, role, shared[key]))
    return tuple(places)


def _named(groups: Sequence[tuple[Place, ...]]) -> tuple[ChannelGroup, ...]:
    """Names each group after the layer that first writes it; several groups of one layer are numbered."""
    used: dict[str, int] = {}
    named = []
    for places in groups:
        writer = next(place.axis.name for place in places if place.role == "write")
        name = writer.split(".parametrizations.")[0].removesuffix(".weight")
        used[name] = used.get(name, 0) + 1
        named.append(ChannelGroup(name if used[name] == 1 else f"{name}#{used[name]}", places))
    return tuple(named)
