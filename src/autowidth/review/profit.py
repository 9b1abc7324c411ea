"""Worth in nats: pure functions of sums over samples.

Sign and unit everywhere: positive = the loss rises when the filter is removed, nats per sample.

Letters: n samples, f channels of a group. x what a reader (a layer that reads the channel) reads, g the gradient of
one sample's loss there.

Both profits are the loss change to second order, E[-t] + 1/2 E[t^2], of taking something from the readers: t is what is
taken x gradient, summed over the readers and their positions, one number per sample. They differ in what is taken:

    next-layer profit   the channel itself: what the readers lose if nothing stands in for it
    own-layer profit    what its co-channels cannot predict of it: what the readers lose once it is reconstructed

(docs/decisions/007). The worth is the non-negative combination of both that audits have taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autowidth.channels import ChannelMap


@dataclass(slots=True, kw_only=True)
class Sums:
    """What the gradient pass of a probe adds up. t is what is taken x gradient, one number per channel and sample.

    first[group] (width,): sum of t, the channel itself taken; second[group] (width,): sum of t squared;
    rest_first, rest_second: the same, what co-channels cannot predict of it taken. All sums are float32 or wider;
    `samples` and `loss` (sum over samples, nats) are their counts. Sums of batches and of ranks add up.
    """

    samples: int = 0
    loss: float = 0.0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    rest_first: dict[str, Tensor] = field(default_factory=dict)
    rest_second: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Adds the sums of another batch or rank."""
        self.samples += other.samples
        self.loss += other.loss
        for mine, more in zip(self._by_group(), other._by_group(), strict=True):
            for name, sums in more.items():
                mine[name] = mine[name] + sums if name in mine else sums

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


def combined(profits: Tensor, coefficients: Tensor) -> Tensor:
    """The worth (f,) from the profits (f, 2) = (next-layer, own-layer) and their coefficients (2,)."""
    return profits @ coefficients


def profits(sums: Sums, channel_map: ChannelMap) -> dict[str, Tensor]:
    """For each channel group its filters' two profits, (f, 2): next-layer and own-layer, nats per sample."""
    groups = [group.name for group in channel_map.groups]
    both = [
        _changes({name: first[name] for name in groups}, second, sums.samples)
        for first, second in ((sums.first, sums.second), (sums.rest_first, sums.rest_second))
    ]
    return {name: torch.nan_to_num(torch.stack([profit[name] for profit in both], dim=-1)) for name in groups}


def _changes(first: Mapping[str, Tensor], second: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """The loss change of every filter by channel group; the trust in first orders is one for the whole network."""
    if not first:
        return {}
    share = trust(torch.cat([*first.values()]), torch.cat([second[name] for name in first]), samples)
    return {name: loss_change(t, second[name], samples, share) for name, t in first.items()}
