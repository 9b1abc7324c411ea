"""Distance from the geometric median (He, Liu, Wang, Hu, Yang 2019, FPGM, arXiv 1811.00250)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="fpgm", unit=None, scope="layer", source="He et al. 2019, arXiv 1811.00250")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The sum of Euclidean distances of a filter to all filters of its layer, (width,) by channel group; no unit.

    This is the paper's approximation: of the given filters, the one with the least sum is nearest to the geometric
    median, and goes first. The paper ranks within a layer; where several layers write a channel, their sums are
    added. Data are not looked at.
    """
    return sum_over_writers(channel_map, effective_weights(model), distances)


def distances(filters: Tensor) -> Tensor:
    """For each row of (f, values) the sum of its Euclidean distances to all rows, (f,)."""
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
