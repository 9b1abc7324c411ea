"""L2 norm of a filter, the variant of Li et al. 2017 (1608.08710) that they and He et al. 2018 (1808.06866) compare."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="l2", unit=None, scope="layer", source="Li et al. 2017, arXiv 1608.08710")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The Euclidean norm of every filter, (width,) by channel group; no unit. Data are not looked at.

    Left open is what to do where several layers write a channel: here their norms are added. Biases and norms do not
    count.
    """
    return sum_over_writers(channel_map, effective_weights(model), lambda filters: filters.norm(dim=1))
