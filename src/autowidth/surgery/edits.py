"""What is to be done: for every tensor of the plan the new order of its axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from autowidth.channels import ChannelMap, ParamAxis, ResizePlan, Role

Fill = Literal["zero", "one", "mean", "normal", "weight"]
"""What a fresh position holds: 0, 1, the mean of its surviving siblings along the axis, a normal draw with the
standard deviation of the surviving elements, or (optimizer state only) what the parameter itself holds there."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What happens to one axis of one tensor. `source` holds the old position per new one, or -1, int64.

    Of four positions the last comes to the front, the first is doubled, one is fresh, and two are gone:

    >>> edit = Edit(0, np.array([3, 0, -1, 0]), "write")
    >>> edit.kept.tolist(), edit.first().tolist(), edit.fresh.tolist(), edit.removed(4).tolist()
    ([0, 3], [1, 0], [2], [1, 2])
    """

    dim: int
    source: np.ndarray
    role: Role

    @property
    def kept(self) -> np.ndarray:
        """Old positions that survive, each once, rising."""
        return np.unique(self.source[self.source >= 0])

    @property
    def fresh(self) -> np.ndarray:
        """New positions without an old one."""
        return np.flatnonzero(self.source < 0)

    def removed(self, length: int) -> np.ndarray:
        """Old positions that do not survive."""
        return np.setdiff1d(np.arange(length), self.kept)

    def first(self) -> np.ndarray:
        """For each kept old position the first new one that holds it."""
        values, first = np.unique(self.source, return_index=True)
        return first[values >= 0]


Edits: TypeAlias = tuple[Edit, ...]
"""The edits of one tensor, by rising dim."""


def edits_of(channel_map: ChannelMap, plan: ResizePlan, gathers: Mapping[ParamAxis, np.ndarray]) -> dict[str, Edits]:
    """Tensor name -> the edits of its axes. `gathers` are those of the channel map for this plan."""
    roles: dict[ParamAxis, set[Role]] = {}
    for name in plan:
        for place in channel_map.group(name).places:
            roles.setdefault(place.axis, set()).add(place.role)
    edits: dict[str, list[Edit]] = {}
    for axis in sorted(gathers):
        # An axis that is read in one place and written in another gets the zeros that keep the function unchanged.
        role = next(role for role in ("read", "write", "carry") if role in roles[axis])
        edits.setdefault(axis.name, []).append(Edit(axis.dim, gathers[axis].astype(np.int64), role))
    return {name: tuple(found) for name, found in edits.items()}
