"""Least-squares reconstruction: what the channels that stay can predict of those that leave, put into the readers.

Letters: c co-channels on an axis that reads, k the positions that each takes there, o outputs of the reader, w its
kernel window (all further dims of the weight); g of the c channels that go, s of them that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from autowidth.channels import ChannelMap, ParamAxis, Place

RIDGE = 1e-3
"""Added to covariances, relative to their mean variance: keeps duplicated and dead channels finite."""

Removed: TypeAlias = Mapping[str, Sequence[int]]
"""Channel group name -> channels that go."""


@dataclass(slots=True, kw_only=True)
class Moments:
    """Sums over everything that one weight read, co-channels in the order of `co_channels`; samples x pixels positions.

    gram (c, c): sum of x x'; total (c,): sum of x; inputs: number of positions summed.
    offset: name of the tensor that can take a constant which the weight adds to its output: its bias, or the running
    mean of the norm right behind it; None where there is neither.
    """

    gram: Tensor
    total: Tensor
    inputs: int = 0
    offset: str | None = None

    def add(self, other: Moments) -> None:
        """Adds the sums of another part of the data."""
        self.gram += other.gram
        self.total += other.total
        self.inputs += other.inputs
        self.offset = self.offset if self.offset == other.offset else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CoChannels:
    """What is known of the c channels that one weight reads.

    index (c, k): positions on the axis; mean (c,), inverse covariance (c, c): of what they carry; offset: the tensor
    that takes their constant part. Without one the mean is 0 and the covariance is about 0: the regression is one
    through the origin.
    """

    index: Tensor
    mean: Tensor
    inverse: Tensor
    offset: str | None = None


Reconstruction: TypeAlias = Mapping[ParamAxis, CoChannels]
"""The co-channels by the axis that reads them. An axis that is missing is read without reconstruction."""


def co_channel_positions(channel_map: ChannelMap, axis: ParamAxis) -> tuple[tuple[int, ...], ...]:
    """The co-channels on an axis that reads: for each its positions, (c, k).

    As a rule every position is a co-channel of its own. Where the network flattens a map into a linear layer, each
    channel takes several positions: they are one co-channel and count as its pixels. A map of 3 channels and 4 pixels
    that is flattened gives ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)).
    """
    places = _on(channel_map, axis)
    copies = {place.copies for place in places}
    if copies == {1} or len(copies) > 1:
        return tuple((p,) for p in range(channel_map.shapes[axis.name][axis.dim]))
    return tuple(row for place in places for row in place.index)


def _on(channel_map: ChannelMap, axis: ParamAxis) -> list[Place]:
    return [place for group in channel_map.groups for place in group.with_role("read") if place.axis == axis]


# ---- the regression --------------------------------------------------------------------------------------------------


def covariance(gram: Tensor, total: Tensor, count: int) -> Tensor:
    """The covariance (c, c) of what a reader reads, from sums over `count` positions, with a small ridge."""
    mean = total / count
    cov = gram / count - torch.outer(mean, mean)
    level = cov.diagonal().mean().clamp_min(torch.finfo(cov.dtype).tiny)
    return cov + RIDGE * level * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)


def precision(cov: Tensor) -> Tensor:
    """The inverse (c, c) of a covariance, in double precision."""
    inverse: Tensor = torch.linalg.inv(cov.double())
    return inverse


def leftover(inverse: Tensor) -> Tensor:
    """The matrix (c, c) that makes of centred channels what co-channels cannot predict of each by least squares.

    With P the inverse covariance, row f is P_f / P_ff: one for the channel itself, minus the regression weights for its
    co-channels. Where rounding has left no positive P_ff, a channel keeps all that it carries.
    """
    own = inverse.diagonal()
    rows = inverse / torch.where(own > 0, own, 1.0)[:, None]
    alone = torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device)
    return torch.where((own > 0)[:, None], rows, alone)


def substitutes(inverse: Tensor, gone: Tensor, kept: Tensor) -> Tensor:
    """The weights (g, s) with which the kept channels best predict those that go, by least squares.

    `inverse` (c, c) is the inverse covariance P of all of them: C_gs C_ss^-1 = -P_gg^-1 P_gs, so that one inverse
    serves every choice of what goes.
    """
    solved: Tensor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return -solved


def reconstruction(
    moments: Mapping[ParamAxis, Moments], channel_map: ChannelMap, weights: Mapping[str, Tensor]
) -> dict[ParamAxis, CoChannels]:
    """The co-channels on every axis that was seen reading. `weights` by name, as they were then.

    Left out are weights behind a parametrization, which nobody can write to, and readers of what is not finite.
    """
    found = {axis: _co_channels(sums, channel_map, axis, weights) for axis, sums in moments.items()}
    return {axis: known for axis, known in found.items() if known is not None}


def _co_channels(
    sums: Moments, channel_map: ChannelMap, axis: ParamAxis, weights: Mapping[str, Tensor]
) -> CoChannels | None:
    if ".parametrizations." in axis.name or not torch.isfinite(sums.gram).all():
        return None
    # A transposed convolution adds a constant unevenly over its output: no tensor can take it.
    offset = sums.offset if axis.dim == 1 else None
    total = sums.total if offset is not None else torch.zeros_like(sums.total)
    return CoChannels(
        index=torch.tensor(co_channel_positions(channel_map, axis), device=weights[axis.name].device),
        mean=total / sums.inputs,
        inverse=precision(covariance(sums.gram, total, sums.inputs)),
        offset=offset,
    )


# ---- the readers without some channels -------------------------------------------------------------------------------


def readers_without(
    removed: Removed, channel_map: ChannelMap, known: Reconstruction, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The readers' weights (and biases) once the removed channels are gone and the others stand in for them.

    What each of the removed carries is replaced by its regression on the channels that stay: the reader's weights for
    those take it over, its constant part goes into the reader's bias or the running mean of the norm behind it. The
    removed slices are zero. Weights behind a parametrization, and readers that `known` does not hold, are zeroed
    without reconstruction. Shapes are those before the removal. `weights`: all tensors of the model by name.
    """
    gone: dict[ParamAxis, list[int]] = {}
    for name, channels in removed.items():
        for place in channel_map.group(name).with_role("read"):
            gone.setdefault(place.axis, []).extend(p for c in channels for p in place.index[c])
    result: dict[str, Tensor] = {}
    for axis, positions in gone.items():
        weight = result.get(axis.name, weights[axis.name]).detach().clone()
        found = known.get(axis)
        if found is not None:
            constant = _hand_over(weight, axis, positions, found)
            if found.offset is not None and constant is not None:
                result |= _shifted(found.offset, constant, result, weights)
        weight.index_fill_(axis.dim, torch.tensor(positions, device=weight.device), 0.0)
        result[axis.name] = weight
    return result


def _hand_over(weight: Tensor, axis: ParamAxis, positions: Sequence[int], found: CoChannels) -> Tensor | None:
    """Adds to the weight, in place, what the co-channels take over. Returns the constant (o,) that this leaves out."""
    leaving = torch.isin(found.index, torch.tensor(positions, device=weight.device)).all(1)
    gone, stay = leaving.nonzero().flatten(), (~leaving).nonzero().flatten()
    if not len(gone):
        return None
    regression = substitutes(found.inverse, gone, stay).to(torch.float32)  # (g, s)
    front = weight.movedim(axis.dim, 1)
    window = slices(weight.float(), axis)[:, found.index[gone]]  # (o, g, k, w): what the reader makes of those that go
    taken = torch.einsum("ogkw,gs->oskw", window, regression)
    front[:, found.index[stay]] += taken.reshape(*taken.shape[:3], *front.shape[2:]).to(weight.dtype)
    return torch.einsum("ogkw,g->o", window, found.mean[gone] - regression @ found.mean[stay])


def _shifted(
    name: str, constant: Tensor, result: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensor that takes a constant: a bias adds it to the output, a norm takes it off its running mean."""
    before = result.get(name, weights[name]).detach()
    signed = -constant if name.endswith("running_mean") else constant
    return {name: (before + signed).to(before.dtype)}


def slices(weight: Tensor, axis: ParamAxis) -> Tensor:
    """A weight as (outputs, positions on the axis that reads, kernel window)."""
    front = weight.movedim(axis.dim, 1)
    return front.reshape(*front.shape[:2], -1)
