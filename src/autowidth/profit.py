"""Worth and gain in nats: pure functions of the probe's sums.

Sign and unit everywhere: positive = the loss rises when the filter is removed, nats per sample.

Letters: n samples, f channels of a group, c input channels of a reader, o its outputs, k positions of its kernel
window, p pixels. x what the reader reads, g the gradient of one sample's loss there, W (o, c, k) its weights.

Both profits are the loss change to second order, E[-t] + 1/2 E[t^2], of taking something from the readers: t is what is
taken x gradient, summed over the readers and their positions, one number per sample. They differ in what is taken:

    next-layer profit   the channel itself: what the readers lose if nothing stands in for it
    own-layer profit    what its peers cannot predict of it: what they lose once their weights are made up for it

(docs/decisions/007). The worth is the non-negative combination of both that audits have taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autowidth.channels import ChannelMap, ParamAxis, Place

RIDGE = 1e-3
"""Added to covariances, relative to their mean variance: keeps duplicated and dead channels finite."""


@dataclass(slots=True, kw_only=True)
class Reader:
    """Sums over everything that one weight read; channels as `fold` orders them, positions = samples x pixels.

    gram (c, c): sum of x x'; total (c,): sum of x; inputs: number of positions summed.
    absorber: the tensor that can take a constant which the weight adds to its output: its bias, or the running mean of
    the norm right behind it; None where there is neither.
    """

    gram: Tensor
    total: Tensor
    inputs: int = 0
    absorber: str | None = None

    def add(self, other: Reader) -> None:
        """Adds the sums of another part of the data."""
        self.gram += other.gram
        self.total += other.total
        self.inputs += other.inputs
        self.absorber = self.absorber if self.absorber == other.absorber else None


@dataclass(slots=True, kw_only=True)
class Sums:
    """What one probe adds up. t is what is taken x gradient, one number per channel and sample.

    first[group] (width,): sum of t, the channel itself taken; second[group] (width,): sum of t squared;
    rest_first, rest_second: the same, what peers cannot predict of it taken; readers: by the axis that reads.
    All sums are float32 or wider; `samples` and `loss` (sum over samples, nats) are their counts.
    """

    samples: int = 0
    loss: float = 0.0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    rest_first: dict[str, Tensor] = field(default_factory=dict)
    rest_second: dict[str, Tensor] = field(default_factory=dict)
    readers: dict[ParamAxis, Reader] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Adds the sums of another batch or rank."""
        self.samples += other.samples
        self.loss += other.loss
        for mine, more in zip(self._by_group(), other._by_group(), strict=True):
            for name, sums in more.items():
                mine[name] = mine[name] + sums if name in mine else sums
        for axis, reader in other.readers.items():
            if axis in self.readers:
                self.readers[axis].add(reader)
            else:
                self.readers[axis] = reader

    def _by_group(self) -> tuple[dict[str, Tensor], ...]:
        return self.first, self.second, self.rest_first, self.rest_second


def loss_change(first: Tensor, second: Tensor, samples: int, trust: float = 1.0) -> Tensor:
    """What the readers lose when something is taken from them: trust x E[-t] + 1/2 E[t^2], (f,).

    `first`, `second` (f,) are sums over n samples of t and t^2. The first order is exact for small changes; the second
    takes the empirical Fisher information for the curvature (LeCun 1990; Theis 2018, arXiv 1801.05787).
    """
    return (second / 2 - trust * first) / samples


def trust(first: Tensor, second: Tensor, samples: int) -> float:
    """The share of the first order that is no sampling noise, from 0 to 1, one number for all channels (f,).

    A mean of n samples has the squared error E[t^2] / n, and so E[t]^2 / E[t^2] is 1 / n on average where the true mean
    is nothing. What it is above that, v, is real: the means are shrunk towards 0 by v / (v + 1 / n) (empirical Bayes:
    James and Stein 1961; Efron and Morris 1973). Early in training most of the means is real, late most is noise.
    """
    alive = second > 0
    if not alive.any():
        return 0.0
    squares = first[alive].double().square() / (second[alive].double() * samples)
    real = max(float(squares.mean()) - 1 / samples, 0.0)
    return real / (real + 1 / samples)


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
    """The matrix (c, c) that makes of centred channels what each one's peers cannot predict of it by least squares.

    With P the inverse covariance, row f is P_f / P_ff: one for the channel itself, minus the regression weights for its
    peers. Where rounding has left no positive P_ff, a channel keeps all that it carries.
    """
    own = inverse.diagonal()
    rows = inverse / torch.where(own > 0, own, 1.0)[:, None]
    alone = torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device)
    return torch.where((own > 0)[:, None], rows, alone)


def substitutes(inverse: Tensor, gone: Tensor, kept: Tensor) -> Tensor:
    """The weights (gone, kept) with which the kept channels best predict those that go, by least squares.

    `inverse` (c, c) is the inverse covariance P of all of them: C_gk C_kk^-1 = -P_gg^-1 P_gk, so that one inverse
    serves every choice of what goes.
    """
    solved: Tensor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return -solved


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

    index (c, k): positions on the axis; mean (c,), inverse covariance (c, c): of what they carry; absorber: the tensor
    that takes over their constant part. Without one the mean is 0 and the covariance is about 0: the regression is one
    through the origin.
    """

    index: Tensor
    mean: Tensor
    inverse: Tensor
    absorber: str | None = None


def peers(sums: Sums, channel_map: ChannelMap, weights: Mapping[str, Tensor]) -> dict[ParamAxis, Peers]:
    """The peers on every axis that the probe saw reading. `weights` by name, as they were when the probe ran.

    Left out are weights behind a parametrization, which nobody can write to, and readers of what is not finite.
    """
    found = {axis: _peers_of(reader, channel_map, axis, weights) for axis, reader in sums.readers.items()}
    return {axis: peers for axis, peers in found.items() if peers is not None}


def _peers_of(reader: Reader, channel_map: ChannelMap, axis: ParamAxis, weights: Mapping[str, Tensor]) -> Peers | None:
    if ".parametrizations." in axis.name or not torch.isfinite(reader.gram).all():
        return None
    # A transposed convolution adds a constant unevenly over its output: no tensor can take it over.
    absorber = reader.absorber if axis.dim == 1 else None
    total = reader.total if absorber is not None else torch.zeros_like(reader.total)
    return Peers(
        index=torch.tensor(fold(channel_map, axis), device=weights[axis.name].device),
        mean=total / reader.inputs,
        inverse=precision(covariance(reader.gram, total, reader.inputs)),
        absorber=absorber,
    )


def parts(sums: Sums, channel_map: ChannelMap) -> dict[str, Tensor]:
    """For each channel group its filters' two profits, (f, 2): next-layer and own-layer, nats per sample."""
    groups = [group.name for group in channel_map.groups]
    both = [
        _changes({name: first[name] for name in groups}, second, sums.samples)
        for first, second in ((sums.first, sums.second), (sums.rest_first, sums.rest_second))
    ]
    return {name: torch.nan_to_num(torch.stack([part[name] for part in both], dim=-1)) for name in groups}


def _changes(first: Mapping[str, Tensor], second: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """The loss change of every filter by channel group; the trust in first orders is one for the whole network."""
    if not first:
        return {}
    share = trust(torch.cat([*first.values()]), torch.cat([second[name] for name in first]), samples)
    return {name: loss_change(t, second[name], samples, share) for name, t in first.items()}


def folded(
    removed: Mapping[str, Sequence[int]],
    channel_map: ChannelMap,
    known: Mapping[ParamAxis, Peers],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The readers' weights (and biases) once the removed channels are gone and their peers stand in for them.

    `removed` is group name -> channels. What each of them carries is replaced by its regression on the channels that
    stay: the reader's weights for those take it over, its constant part goes into the reader's bias or the running mean
    of the norm behind it. The removed slices are zero. Weights behind a parametrization, and readers that the probe did
    not see, are zeroed without compensation. Shapes are those before the removal.
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
            if found.absorber is not None and constant is not None:
                result |= _absorbed(found.absorber, constant, result, weights)
        weight.index_fill_(axis.dim, torch.tensor(positions, device=weight.device), 0.0)
        result[axis.name] = weight
    return result


def _hand_over(weight: Tensor, axis: ParamAxis, positions: Sequence[int], found: Peers) -> Tensor | None:
    """Adds to the weight, in place, what the peers take over. Returns the constant (o,) that this leaves out."""
    leaving = torch.isin(found.index, torch.tensor(positions, device=weight.device)).all(1)
    out, kept = leaving.nonzero().flatten(), (~leaving).nonzero().flatten()
    if not len(out):
        return None
    stand_in = substitutes(found.inverse, out, kept).to(torch.float32)
    front = weight.movedim(axis.dim, 1)
    window = slices(weight.float(), axis)[:, found.index[out]]
    taken = torch.einsum("oskw,sc->ockw", window, stand_in)
    front[:, found.index[kept]] += taken.reshape(*taken.shape[:3], *front.shape[2:]).to(weight.dtype)
    return torch.einsum("oskw,s->o", window, found.mean[out] - stand_in @ found.mean[kept])


def _absorbed(
    name: str, constant: Tensor, result: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensor that takes over a constant: a bias adds it to the output, a norm takes it off its running mean."""
    before = result.get(name, weights[name]).detach()
    signed = -constant if name.endswith("running_mean") else constant
    return {name: (before + signed).to(before.dtype)}


def slices(weight: Tensor, axis: ParamAxis) -> Tensor:
    """A weight as (outputs, positions on the axis that reads, kernel window)."""
    front = weight.movedim(axis.dim, 1)
    return front.reshape(*front.shape[:2], -1)
