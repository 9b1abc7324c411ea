"""Worth and gain in nats: pure functions of the probe's sums.

Sign and unit everywhere: positive = the loss rises when the filter is removed, nats per sample.

Letters: n samples, f channels of a group, c input channels of a reader, o its outputs, k positions of its kernel
window, p pixels. x what the reader reads, g the gradient of one sample's loss at its output, W (o, c, k) its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autowidth.channels import ChannelGroup, ChannelMap, ParamAxis, Place

RIDGE = 1e-3
"""Added to covariances, relative to their mean variance: keeps duplicated and dead channels finite."""


@dataclass(slots=True, kw_only=True)
class Reader:
    """Sums over everything that one weight read; channels as `fold` orders them, positions = samples x pixels.

    gram (c, c): sum of x x'; total (c,): sum of x; inputs: number of positions summed;
    force (o, o): sum of g g' over output positions, g the gradient of one sample's loss; outputs: their number.
    """

    gram: Tensor
    total: Tensor
    inputs: int = 0
    force: Tensor
    outputs: int = 0

    def add(self, other: Reader) -> None:
        """Adds the sums of another part of the data."""
        self.gram += other.gram
        self.total += other.total
        self.inputs += other.inputs
        self.force += other.force
        self.outputs += other.outputs


@dataclass(slots=True, kw_only=True)
class Sums:
    """What one probe adds up. t is the activation x gradient of a channel at all its readers, one number per sample.

    first[group] (width,): sum of t; second[group] (width,): sum of t squared; readers: by the axis that reads.
    All sums are float32 or wider; `samples` and `loss` (sum over samples, nats) are their counts.
    """

    samples: int
    loss: float
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    readers: dict[ParamAxis, Reader]

    def add(self, other: Sums) -> None:
        """Adds the sums of another batch or rank."""
        self.samples += other.samples
        self.loss += other.loss
        for name in self.first:
            self.first[name] += other.first[name]
            self.second[name] += other.second[name]
        for axis, reader in other.readers.items():
            if axis in self.readers:
                self.readers[axis].add(reader)
            else:
                self.readers[axis] = reader


def next_layer(first: Tensor, second: Tensor, samples: int) -> Tensor:
    """What the readers lose when a channel is taken from them: E[-t] + 1/2 E[t^2], (f,).

    `first`, `second` (f,) are sums over n samples of t and t^2, t = activation x gradient at the readers. The first
    order is exact for small changes; the second takes the empirical Fisher information for the curvature (LeCun 1990,
    Theis 2018, arXiv 1801.05787).
    """
    return (second / 2 - first) / samples


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


def residual(cov: Tensor, inverse: Tensor) -> Tensor:
    """The variance (c,) of each channel that its peers cannot predict: one over the diagonal of the inverse.

    At most the variance itself: where rounding has made the covariance indefinite, the inverse does not know that.
    """
    rest = 1 / inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.minimum(rest, cov.diagonal().double().clamp_min(0)).to(cov.dtype)


def substitutes(inverse: Tensor, gone: Tensor, kept: Tensor) -> Tensor:
    """The weights (gone, kept) with which the kept channels best predict those that go, by least squares.

    `inverse` (c, c) is the inverse covariance P of all of them: C_gk C_kk^-1 = -P_gg^-1 P_gk, so that one inverse
    serves every choice of what goes.
    """
    solved: Tensor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return -solved


def pull(weight: Tensor, force: Tensor, outputs: int, samples: int) -> Tensor:
    """How hard the loss pulls on each input channel of a reader, per unit of its variance, (c,).

    `weight` (o, c, k); `force` (o, o) is the sum of g g' over `outputs` positions of n samples. With curvature
    E = E[g g'] and P = outputs / n pixels per sample this is P tr(E W_c W_c').
    """
    per_pixel = force / max(outputs, 1)
    return (outputs / samples) * torch.einsum("ock,op,pck->c", weight, per_pixel, weight)


def own_layer(rest: Tensor, strength: Tensor) -> Tensor:
    """What peers cannot replace, 1/2 x residual variance x pull, (c,): structured optimal brain surgery.

    After the best linear compensation from its peers, only a channel's residual is lost; its cost is taken to second
    order with Kronecker-factored curvature (Hassibi 1993; Wang 2019, EigenDamage, arXiv 1905.05934).
    """
    return rest * strength / 2


def combined(parts: Tensor, coefficients: Tensor) -> Tensor:
    """The worth (f,) from the parts (f, 2) = (next-layer, own-layer) and their coefficients (2,)."""
    return parts @ coefficients


def fold(channel_map: ChannelMap, axis: ParamAxis) -> tuple[tuple[int, ...], ...]:
    """The peers on an axis that reads: for each its positions, (peers, copies).

    As a rule every position is a peer of its own. Where the network flattens a map into a linear layer, each channel
    takes several positions: they are folded into one peer and count as its pixels.
    """
    places = _on(channel_map, axis)
    copies = {place.copies for place in places}
    if copies == {1} or len(copies) > 1:
        return tuple((p,) for p in range(channel_map.shapes[axis.name][axis.dim]))
    return tuple(row for place in places for row in place.index)


def _on(channel_map: ChannelMap, axis: ParamAxis) -> list[Place]:
    return [place for group in channel_map.groups for place in group.with_role("read") if place.axis == axis]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """What is known of the channels that one weight reads: c peers as `fold` orders them, each with k positions.

    index (c, k): positions on the axis; mean (c,), cov (c, c), inverse (c, c): of what they carry; pull (c,).
    """

    index: Tensor
    mean: Tensor
    cov: Tensor
    inverse: Tensor
    pull: Tensor


def peers(sums: Sums, channel_map: ChannelMap, weights: Mapping[str, Tensor]) -> dict[ParamAxis, Peers]:
    """The peers of every axis that the probe saw reading. `weights` by name, as they were when the probe ran."""
    return {axis: _peers_of(sums, channel_map, axis, weights[axis.name]) for axis in sums.readers}


def _peers_of(sums: Sums, channel_map: ChannelMap, axis: ParamAxis, weight: Tensor) -> Peers:
    reader = sums.readers[axis]
    index = torch.tensor(fold(channel_map, axis), device=weight.device)
    slices = _slices(weight.detach().float(), axis)
    cov = covariance(reader.gram, reader.total, reader.inputs)
    return Peers(
        index=index,
        mean=reader.total / reader.inputs,
        cov=cov,
        inverse=precision(cov),
        pull=pull(slices[:, index].flatten(2), reader.force, reader.outputs, sums.samples),
    )


def _slices(weight: Tensor, axis: ParamAxis) -> Tensor:
    """A weight as (outputs, positions on the axis that reads, kernel window)."""
    front = weight.movedim(axis.dim, 1)
    return front.reshape(*front.shape[:2], -1)


def parts(sums: Sums, channel_map: ChannelMap, known: Mapping[ParamAxis, Peers]) -> dict[str, Tensor]:
    """For each channel group its filters' two profits, (f, 2): next-layer and own-layer, nats per sample."""
    own = {axis: _own_of_reader(axis, found, channel_map) for axis, found in known.items()}
    return {group.name: _parts_of(sums, group, own) for group in channel_map.groups}


def _own_of_reader(axis: ParamAxis, found: Peers, channel_map: ChannelMap) -> Tensor:
    """The own-layer profit of every position of an axis that reads, (length of the axis,)."""
    profit = own_layer(residual(found.cov, found.inverse), found.pull)
    spread = profit.new_zeros(channel_map.shapes[axis.name][axis.dim])
    spread[found.index] = profit[:, None].expand(found.index.shape) / found.index.size(1)
    return spread


def _parts_of(sums: Sums, group: ChannelGroup, own: Mapping[ParamAxis, Tensor]) -> Tensor:
    next_part = next_layer(sums.first[group.name], sums.second[group.name], sums.samples)
    own_part = torch.zeros_like(next_part)
    for place in group.with_role("read"):
        if place.axis in own:
            own_part = own_part + own[place.axis][torch.tensor(place.index, device=own_part.device)].sum(-1)
    return torch.stack([next_part, own_part], dim=-1)


def folded(
    removed: Mapping[str, Sequence[int]],
    channel_map: ChannelMap,
    known: Mapping[ParamAxis, Peers],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The readers' weights (and biases) once the removed channels are gone and their peers stand in for them.

    `removed` is group name -> channels. What each of them carries is replaced by its regression on the channels that
    stay: the reader's weights for those take it over, its mean goes into the bias where the reader has one (a norm
    behind it absorbs it otherwise). The removed slices are zero. Weights behind a parametrization, and readers that
    the probe did not see, are zeroed without compensation. Shapes are those before the removal.
    """
    gone: dict[ParamAxis, list[int]] = {}
    for name, channels in removed.items():
        for place in channel_map.group(name).with_role("read"):
            gone.setdefault(place.axis, []).extend(p for c in channels for p in place.index[c])
    result: dict[str, Tensor] = {}
    for axis, positions in gone.items():
        weight = result.get(axis.name, weights[axis.name]).detach().clone()
        found = known.get(axis)
        if found is not None and ".parametrizations." not in axis.name:
            bias = axis.name.removesuffix("weight") + "bias"
            known_bias = {bias: weights[bias]} if bias in weights and axis.dim == 1 else {}  # not of transposed layers
            result |= _handed_over(weight, axis, positions, found, known_bias)
        weight.index_fill_(axis.dim, torch.tensor(positions, device=weight.device), 0.0)
        result[axis.name] = weight
    return result


def _handed_over(
    weight: Tensor, axis: ParamAxis, positions: Sequence[int], found: Peers, bias: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Adds to the weight, in place, what the peers take over. Returns the bias with what is constant of it."""
    leaving = torch.isin(found.index, torch.tensor(positions, device=weight.device)).all(1)
    out, kept = leaving.nonzero().flatten(), (~leaving).nonzero().flatten()
    if not len(out) or not len(kept):
        return {}
    stand_in = substitutes(found.inverse, out, kept).to(torch.float32)
    front = weight.movedim(axis.dim, 1)
    window = _slices(weight.float(), axis)[:, found.index[out]]
    taken = torch.einsum("oskw,sc->ockw", window, stand_in)
    front[:, found.index[kept]] += taken.reshape(*taken.shape[:3], *front.shape[2:]).to(weight.dtype)
    constant = found.mean[out] - stand_in @ found.mean[kept]
    return {name: (b + torch.einsum("oskw,s->o", window, constant)).detach().to(b.dtype) for name, b in bias.items()}
