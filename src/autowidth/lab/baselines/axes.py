"""From values per position of a param axis to values per channel of a channel group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autowidth.channels import ChannelGroup, ChannelMap, ParamAxis, Place


def filters(weight: Tensor, axis: ParamAxis) -> Tensor:
    """The filters of a layer as rows, (length of the axis, values per filter), float32, without gradient."""
    return weight.detach().float().movedim(axis.dim, 0).flatten(1)


def channels(values: Tensor, place: Place) -> Tensor:
    """The sum of `values` (length of the axis,) over the positions of each channel, (width,)."""
    return values[torch.tensor(place.index, device=values.device)].sum(-1)


def sum_over_writers(
    channel_map: ChannelMap, weights: Mapping[str, Tensor], of_layer: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """For each channel group, (width,): what `of_layer` makes of each writer's filters, summed over the writers.

    `of_layer` takes the filters of one layer, (length of the axis, values per filter), and returns one number each.
    """
    importances = {}
    for group in channel_map.groups:
        importances[group.name] = empty(group, weights)
        for place in group.with_role("write"):
            importances[group.name] += channels(of_layer(filters(weights[place.axis.name], place.axis)), place)
    return importances


def readers(channel_map: ChannelMap) -> dict[ParamAxis, list[tuple[str, Place]]]:
    """For each param axis that reads channels, the names of the channel groups on it and where on it they lie."""
    found: dict[ParamAxis, list[tuple[str, Place]]] = {}
    for group in channel_map.groups:
        for place in group.with_role("read"):
            found.setdefault(place.axis, []).append((group.name, place))
    return found


def empty(group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """Zeros (width,), where the weights of the group are."""
    return torch.zeros(group.width, device=weights[group.places[0].axis.name].device)
