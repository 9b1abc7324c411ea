"""Rank of feature maps (Lin, Ji, Wang, Zhang, Zhang, Tian, Shao 2020, HRank, arXiv 2002.10179)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import empty
from autowidth.lab.baselines.calls import watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="hrank", unit=None, scope="layer", source="Lin et al. 2020, arXiv 2002.10179")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The mean rank of a channel's maps, (width,) by channel group; no unit.

    The paper looks at 500 images, and at maps behind the activation. Here these are the maps as the readers get them
    (before global pooling or flattening, if a reader gets them pooled), and all images given count. Where several
    layers read a channel, their means are averaged, so that every value remains a rank. The numerical rank has the
    tolerance of torch.linalg.matrix_rank.
    """
    weights = effective_weights(model)
    ranks = {group.name: empty(group, weights) for group in channel_map.groups}
    counts = dict.fromkeys(ranks, 0)
    with torch.no_grad():
        for inputs, _ in batches:
            _, calls = watched(model, lambda x=inputs: model(x))  # type: ignore[misc]
            for call in calls:
                for group in channel_map.groups:
                    for place in group.with_role("read"):
                        if place.axis.name == call.weight:
                            maps = call.maps(place)
                            ranks[group.name] += torch.linalg.matrix_rank(maps.float()).sum(0)
                            counts[group.name] += len(maps)
    return {name: rank / max(counts[name], 1) for name, rank in ranks.items()}
