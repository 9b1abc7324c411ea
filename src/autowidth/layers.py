"""What a record says of the layers of a network: what they are called, how wide they are, what they take."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from autowidth.channels import ChannelMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight in use, as it was at the start of a run.

    shape: of the weight; out: the dim that holds its filters; macs: multiply-accumulates of one sample.
    axes: dim -> (channel group -> positions that each of its channels takes there).
    frozen: why its filters must not be resized, None where they may.
    """

    name: str
    shape: tuple[int, ...]
    macs: float
    out: int = 0
    axes: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    frozen: str | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The channel groups that its filters belong to."""
        return tuple(self.axes.get(self.out, {}))

    def length(self, dim: int, start: Mapping[str, int], widths: Mapping[str, int]) -> int:
        """How long the dim is at these widths of the channel groups; `start` are those of the start."""
        axis = self.axes.get(dim, {})
        return self.shape[dim] + sum(n * (widths[group] - start[group]) for group, n in axis.items())

    def width(self, start: Mapping[str, int], widths: Mapping[str, int]) -> int:
        """How many filters it has at these widths."""
        return self.length(self.out, start, widths)

    def macs_at(self, start: Mapping[str, int], widths: Mapping[str, int]) -> float:
        """Multiply-accumulates of one sample at these widths."""
        return self.macs * prod(self.length(dim, start, widths) / self.shape[dim] for dim in self.axes)

    def as_json(self) -> dict[str, Any]:
        """What `of_json` makes the layer of."""
        axes = [[dim, dict(groups)] for dim, groups in self.axes.items()]
        known: dict[str, Any] = {"name": self.name, "shape": list(self.shape), "macs": self.macs, "axes": axes}
        return known | ({"out": self.out} if self.out else {}) | ({"frozen": self.frozen} if self.frozen else {})

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> Layer:
        """The layer of this record; raises KeyError, TypeError, ValueError or AttributeError where it is none."""
        shape, out = tuple(map(int, record["shape"])), int(record.get("out", 0))
        axes = {int(dim): {str(g): int(n) for g, n in groups.items()} for dim, groups in record["axes"]}
        if not all(0 <= dim < len(shape) and shape[dim] > 0 for dim in (out, *axes)):
            raise ValueError(f"{record['name']!r} has shape {shape} and no dims {sorted({out, *axes})}")
        frozen = record.get("frozen")
        return cls(
            name=str(record["name"]), shape=shape, macs=float(record["macs"]), out=out, axes=axes,
            frozen=None if frozen is None else str(frozen),
        )  # fmt: skip


def layers_in(records: Iterable[Mapping[str, Any]], groups: Container[str]) -> list[Layer]:
    """The layers of these records; raises as `of_json`, and ValueError for channels that are of none of the groups."""
    layers = [Layer.of_json(record) for record in records]
    for layer in layers:
        for group in (group for axis in layer.axes.values() for group in axis):
            if group not in groups:
                raise ValueError(f"{layer.name!r} has channels of {group!r}, which is no channel group")
    return layers


def layers_of(channel_map: ChannelMap) -> tuple[Layer, ...]:
    """All weights in use, in the order of the forward pass; a weight that is used several times is there once."""
    macs: dict[str, float] = {}
    for use in channel_map.uses:
        macs[use.name] = macs.get(use.name, 0.0) + use.macs_per_weight
    axes: dict[str, dict[int, dict[str, int]]] = {name: {} for name in macs}
    written: dict[str, int] = {}
    for group in channel_map.groups:
        for place in group.places:
            name, dim = place.axis.name, place.axis.dim
            if name in axes:
                axes[name].setdefault(dim, {})[group.name] = place.copies
                if place.role == "write":
                    written[name] = dim
    frozen: dict[tuple[str, int], str] = {}
    for axis in channel_map.frozen:
        frozen.setdefault((axis.axis.name, axis.axis.dim), axis.reason)
    return tuple(
        Layer(
            name=name.split(".parametrizations.")[0].removesuffix(".weight"), shape=channel_map.shapes[name],
            macs=each * prod(channel_map.shapes[name]), out=written.get(name, 0), axes=axes[name],
            frozen=None if axes[name].get(written.get(name, 0)) else frozen.get((name, written.get(name, 0))),
        )
        for name, each in macs.items()
    )  # fmt: skip
