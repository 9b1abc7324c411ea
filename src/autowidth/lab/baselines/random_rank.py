"""Chance: the importance measure that every other one must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.review.batches import Batches, Loss


@registry.importance(name="random", unit=None, scope="layer", source="chance")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Uniform numbers from 0 to 1 out of the generator (on the CPU), (width,) by channel group; no unit."""
    return {group.name: torch.rand(group.width, generator=generator) for group in channel_map.groups}
