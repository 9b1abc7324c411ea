"""Scale of the batch norm (Liu, Li, Shen, Huang, Yan, Zhang 2017, Network Slimming, arXiv 1708.06519)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import channels
from autowidth.review.batches import Batches, Loss


@registry.importance(name="bn-scale", unit=None, scope="network", source="Liu et al. 2017, arXiv 1708.06519")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The absolute scale of every channel's batch norm, (width,) by channel group; no unit. Data are not looked at.

    The paper trains with an L1 penalty on the scales, which this measure does not ask for: it ranks the scales that
    plain training led to. Where a channel passes through several norms (a residual stream, a dense block, which the
    paper prunes norm by norm behind a selection layer), their absolute scales are added. A channel group without a
    batch norm with scales gets NaN: the measure says nothing about it.
    """
    scales = {
        f"{name}.weight": module.weight.detach().float().abs()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    }
    importances = {}
    for group in channel_map.groups:
        found = [place for place in group.with_role("carry") if place.axis.name in scales]
        parts = [channels(scales[place.axis.name], place) for place in found]
        importances[group.name] = torch.stack(parts).sum(0) if parts else torch.full((group.width,), torch.nan)
    return importances
