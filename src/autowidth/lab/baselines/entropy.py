"""Information in a filter's weights (Hur and Kang 2018, J. Supercomputing 75:2950, 10.1007/s11227-018-2684-z)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(
    name="entropy", unit=None, scope="layer", source="after Hur and Kang 2018, J. Supercomputing 75:2950"
)
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """By how much a filter's weights carry more information than its layer's on average, (width,) by channel group.

    In nats of information per weight, which is no change of a loss. Of the paper only the abstract is known to us: the
    weights of a layer are taken as Gaussian, and a single weight goes if its information is below a threshold that is
    the average one, the entropy. For whole filters we take the mean over the filter of -ln p(w) less that entropy,
    which is mean of (w - m)^2 / (2 s^2) - 1/2 with the layer's mean m and variance s^2. Where several layers write a
    channel, their numbers are added. Data are not looked at.
    """
    return sum_over_writers(channel_map, effective_weights(model), surplus)


def surplus(filters: Tensor) -> Tensor:
    """Information less entropy of each row of (f, values) under one Gaussian for all values, nats per value, (f,)."""
    variance = filters.var(correction=0).clamp_min(torch.finfo(filters.dtype).tiny)
    return ((filters - filters.mean()).square().mean(1) / variance - 1) / 2
