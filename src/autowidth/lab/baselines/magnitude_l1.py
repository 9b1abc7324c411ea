"""L1 norm of a filter (Li, Kadav, Durdanovic, Samet, Graf 2017, Pruning Filters for Efficient ConvNets, 1608.08710)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="l1", unit=None, scope="layer", source="Li et al. 2017, arXiv 1608.08710")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The sum of absolute weights of every filter, (width,) by channel group; no unit. Data are not looked at.

    The paper ranks within a layer and prunes both ends of a residual stream by the shortcut's filters; here the norms
    of all filters that write a channel are added. Biases and norms do not count.
    """
    return sum_over_writers(channel_map, effective_weights(model), lambda filters: filters.abs().sum(1))
