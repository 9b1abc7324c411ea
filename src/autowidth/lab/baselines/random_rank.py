"""Chance: the importance measure that every other one must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.probe import Loss


@registry.importance(name="random", unit=None, scope="layer", source="chance")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Sequence[tuple[Any, Any]],
    loss_fn: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Uniform numbers from 0 to 1 out of the generator (on the CPU), (width,) by channel group; no unit."""
    return {group.name: torch.rand(group.width, generator=generator) for group in channel_map.groups}
