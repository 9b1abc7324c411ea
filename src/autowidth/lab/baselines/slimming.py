"""Network slimming (Liu, Li, Shen, Huang, Yan, Zhang 2017, arXiv 1708.06519): L1 on the scales while they train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimming:
    """Adds the subgradient of strength x |scale| to the scales of all batch norms that carry a removable channel.

    Afterwards the channels of least absolute scale in the whole network go: the measure bn-scale. The paper chooses the
    strength among 1e-3, 1e-4 and 1e-5 on CIFAR: 1e-4 for VGG, 1e-5 for ResNet and DenseNet; the default is 1e-4 for
    all. It starts the scales at 0.5; here they start where the network puts them.
    """

    strength: float = 1e-4

    def after_backward(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Adds strength x sign(scale) to the gradients."""
        scales = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
        for group in channel_map.groups:
            for place in group.with_role("carry"):
                scale = scales.get(place.axis.name)
                if scale is not None and scale.grad is not None:
                    index = torch.tensor(place.index, device=scale.device).flatten()
                    scale.grad[index] += self.strength * scale.detach()[index].sign()

    def after_step(self, model: nn.Module, channel_map: ChannelMap, progress: float, lr: float) -> None:
        """Nothing."""

    def after_epoch(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Nothing."""


@registry.training_rule(name="slimming", importance="bn-scale", source="Liu et al. 2017, arXiv 1708.06519")
def rule(*, widths_left: float) -> Slimming:
    """The rule, which is the same whatever share of the widths is left."""
    return Slimming()
