"""The ledger, in which the rules write down what a trace finds: slots, which of them are one channel, roles, uses."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autowidth.channels import ParamAxis, Role, WeightUse
from autowidth.rules.labels import NEUTRAL, Labels, lies_along, overlay, shrunk, spread

_MANY = 10_000


@dataclass
class Ledger:
    """What a trace writes down, entry by entry; `autowidth.trace` reads the channel groups off it in the end.

    Every id is given out once, in rising order: `slots` gives one to each position of a param axis, `mark` one to
    whatever must not be resized. `unite` enters that two ids are the same channel; nothing is ever taken back.

    batch: samples in the example inputs. where: names the line of the user's code that is being run.
    axes, starts, lengths: the param axes that have slots; axis i has the ids starts[i] to starts[i] + lengths[i] - 1.
    marks: id of each frozen mark -> its reason. edges: pairs of ids that are one channel, as two vectors each.
    roles: what the layers do with the channels of each axis, in the order in which they were met.
    uses: the weights in use. elements: number of elements of each parameter. ids: how many ids are given out.
    """

    batch: int
    where: Callable[[], str] = str
    axes: list[ParamAxis] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    marks: dict[int, str] = field(default_factory=dict)
    edges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    roles: dict[ParamAxis, set[Role]] = field(default_factory=dict)
    uses: list[WeightUse] = field(default_factory=list)
    elements: dict[str, int] = field(default_factory=dict)
    ids: int = 0

    def slots(self, name: str, dim: int, length: int) -> Tensor:
        """New slot ids (length,) for one param axis."""
        self.axes.append(ParamAxis(name, dim))
        self.starts.append(self.ids)
        self.lengths.append(length)
        self.elements[name] = self.elements.get(name, 1) * length
        return self._take(length)

    def mark(self, reason: str, count: int = 1) -> Tensor:
        """New frozen marks (count,): whatever is united with them must not be resized."""
        marks = self._take(count)
        self.marks.update(dict.fromkeys(marks.tolist(), reason))
        return marks

    def _take(self, count: int) -> Tensor:
        taken = torch.arange(self.ids, self.ids + count)
        self.ids += count
        return taken

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Says that the ids a and b (broadcast against each other) name the same channels, position by position."""
        if a is b:
            return
        a, b = torch.broadcast_tensors(a, b)
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (x != NEUTRAL) & (y != NEUTRAL)
        x, y = x[both], y[both]
        if len(x) > _MANY:  # the same pairs again and again, as where heads and tokens end up in one dim
            x, y = np.divmod(np.unique(x * self.ids + y), self.ids)
        self.edges.append((x, y))

    def freeze(self, labels: Labels, reason: str) -> None:
        """Freezes every channel in the label tensors, and notes the reason."""
        for label in labels:
            ids = shrunk(label).unique()
            self.unite(ids, self.mark(reason, len(ids)))  # a mark each: who is frozen is not thereby the same

    def frozen_labels(self, shape: Sequence[int], reason: str) -> Labels:
        """The label tensors of a tensor that must not be resized in any dim but the first (the batch)."""
        dims = [d for d in range(1, len(shape)) if shape[d] > 0]
        return tuple(spread(self.mark(reason, shape[d]), shape, d) for d in dims)

    def axis_of(self, number: int) -> ParamAxis | None:
        """The param axis that an id belongs to; None for NEUTRAL and for frozen marks."""
        if number == NEUTRAL or number in self.marks:
            return None
        return self.axes[bisect_right(self.starts, number) - 1]

    def play(self, ids: Tensor, role: Role) -> None:
        """Gives the axes of these slots (n,) a role."""
        slots = ids.numpy()[ids.numpy() < self.starts[-1] + self.lengths[-1]]  # frozen marks come after the slots
        owners = np.unique(np.searchsorted(self.starts, slots, side="right"))
        for owner in owners.tolist():
            axis = self.axis_of(self.starts[owner - 1]) if owner else None
            if axis is not None:
                self.roles.setdefault(axis, set()).add(role)

    def rank(self, label: Tensor) -> int:
        """How surely a label tensor names channels: 2 if a layer reads, writes or carries what its ids are united
        with, 1 if that is a position of a weight's first two dims, 0 if it is a kernel window, a token or a mark."""
        known = np.zeros(self.ids, dtype=bool)
        known[[i for i in shrunk(label).unique().tolist() if i != NEUTRAL]] = True
        none = np.empty(0, dtype=np.int64)
        a, b = (np.concatenate(side) for side in zip((none, none), *self.edges, strict=True))
        self.edges = [(a, b)]  # who asks once asks again
        count = 0
        while count < (count := int(known.sum())):
            known[b[known[a]]] = True
            known[a[known[b]]] = True
        axes = {self.axis_of(i) for i in known.nonzero()[0].tolist()} - {None}
        if axes & self.roles.keys():
            return 2
        return int(any(axis.dim < 2 for axis in axes if axis is not None))

    def use(self, weight: Tensor, ids: Tensor, macs: float) -> None:
        """Notes that the weight behind these slots does `macs` multiply-accumulates per element on the whole batch.

        A weight that was mixed from another number of elements is none of the parameter's.
        """
        axis = self.axis_of(int(ids.reshape(-1)[0]))
        if axis is not None and self.elements[axis.name] == weight.numel():
            self.uses.append(WeightUse(axis.name, macs / self.batch))

    def along(self, labels: Labels, dim: int) -> Tensor | None:
        """The ids along one dim (n,): what differs in other dims is united. None where nothing lies along it."""
        vectors = []
        for label in labels:
            dims = lies_along(label)
            if dim % label.dim() in dims:
                vectors.append(self._collapse(label, dim % label.dim()))
        if not vectors and labels and labels[0].size(dim) == 1:
            vectors = [shrunk(label).reshape(-1) for label in labels if not lies_along(label)][:1]
        for other in vectors[1:]:
            self.unite(vectors[0], other)
        return overlay(vectors) if vectors else None

    def _collapse(self, label: Tensor, dim: int) -> Tensor:
        """The ids of one label tensor along a dim (n,); those that share a position of the dim are united."""
        rows = shrunk(label).movedim(dim, 0).reshape(label.size(dim), -1)
        if rows.size(1) > 1:
            self.unite(rows[:, :1], rows[:, 1:])
        return overlay(list(rows.unbind(1)))


def merged(ledger: Ledger, operands: Sequence[Labels], shape: Sequence[int]) -> Labels:
    """The label tensors of an elementwise result of this shape: operands that lie along the same dim are united."""
    result: list[Tensor] = []
    for label in (one for labels in operands for one in labels):
        grown = label.numel() != math.prod(shape)
        if grown and not lies_along(label):
            continue  # one channel broadcast over many, as a spatial attention map is: not the same channel
        wide = label.expand(tuple(shape))
        for i, other in enumerate(result):
            if lies_along(wide) & lies_along(other) or not (lies_along(wide) or lies_along(other)):
                result[i] = joined(ledger, other, wide)
                break
        else:
            result.append(wide)
    return tuple(result)


def joined(ledger: Ledger, a: Tensor, b: Tensor) -> Tensor:
    """Unites two label tensors of equal shape and returns one: the first wins where both have an id."""
    if a is b:
        return a
    small_a, small_b = torch.broadcast_tensors(shrunk(a), shrunk(b))
    ledger.unite(small_a, small_b)
    if not bool((small_a == NEUTRAL).any()) and lies_along(a) >= lies_along(b):
        return a
    return torch.where(small_a == NEUTRAL, small_b, small_a).expand(a.shape)
