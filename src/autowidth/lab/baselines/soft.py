"""Soft filter pruning (He, Kang, Dong, Fu, Yang 2018, arXiv 1808.06866): zeroed after every epoch, trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelGroup, ChannelMap, Role
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.review.statistics import effective_weights


def at_once(progress: float) -> float:
    """The whole share from the first epoch on."""
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft:
    """Zeroes the filters of least L2 norm in every channel group after each epoch; they go on training.

    widths_left: the share of every group's filters that stay, rounded as the widths of a uniformly narrowed network
    are. reached: how much of the final removal is due, from the progress of training, 0 to 1 (asymptotic.py has
    another). Afterwards the filters of least norm in each group go: the importance measure l2.

    The authors' code ranks and zeroes each layer by itself; here the layers that write a channel have their norms
    added and are zeroed together, so that the channel can go. It zeroes a filter's weights and leaves the norm behind
    them as it is; so do we while training goes on, since with a scale of zero no gradient would come back to the
    filter. When progress is 1 nothing more is to come back, and all that carries the channel (biases, scales, depthwise
    kernels) becomes zero as well: the channel is silent, and its removal changes nothing.

    Raises ValueError for a share that is not above 0 and at most 1.
    """

    widths_left: float
    reached: Callable[[float], float] = at_once

    def __post_init__(self) -> None:
        if not 0 < self.widths_left <= 1:
            raise ValueError(f"widths_left={self.widths_left}: the share of filters that stay is above 0, at most 1")

    def after_backward(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Nothing."""

    def after_step(self, model: nn.Module, channel_map: ChannelMap, progress: float, lr: float) -> None:
        """Nothing."""

    @torch.no_grad()
    def after_epoch(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Zeroes the weakest filters."""
        norms = sum_over_writers(channel_map, effective_weights(model), lambda filters: filters.norm(dim=1))
        left = 1 - self.reached(progress) * (1 - self.widths_left)
        roles: tuple[Role, ...] = ("write", "carry") if progress >= 1 else ("write",)
        parameters = dict(model.named_parameters())
        for group in channel_map.groups:
            stay = max(1, round(group.width * left))
            weakest = norms[group.name].argsort(stable=True)[: group.width - stay]
            for role in roles:
                _zero(parameters, group, role, weakest)


@registry.training_rule(name="soft", importance="l2", source="He et al. 2018, arXiv 1808.06866")
def rule(*, widths_left: float) -> Soft:
    """The rule that leaves this share of every width, from the first epoch on."""
    return Soft(widths_left=widths_left)


def _zero(parameters: dict[str, nn.Parameter], group: ChannelGroup, role: Role, weakest: Tensor) -> None:
    """Zeroes the slices of these channels (k,) on all parameters where the group has this role."""
    for place in group.with_role(role):
        name = _size(place.axis.name)
        if name in parameters:  # statistics of norms are buffers, and stay
            positions = torch.tensor(place.index, device=weakest.device)[weakest].flatten()
            parameter = parameters[name]
            parameter.index_fill_(place.axis.dim, positions.to(parameter.device), 0)


def _size(name: str) -> str:
    """Under weight norm the size of a filter, whose direction cannot be zero; any other name as it is."""
    owner, found, leaf = name.partition(".parametrizations.")
    return f"{owner}{found}{leaf.removesuffix('original1')}original0" if leaf.endswith(".original1") else name
