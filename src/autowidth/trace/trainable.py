"""Channel groups whose parameters do not train keep their widths."""

from __future__ import annotations

from torch import nn

from autowidth.channels import ChannelMap


def keep_frozen_parameters(channel_map: ChannelMap, model: nn.Module) -> ChannelMap:
    """The map in which the groups that live on a parameter that does not train are frozen.

    These are the groups of which any axis belongs to a parameter of the model with requires_grad=False, such as those
    of a pretrained backbone that is kept as it is. Buffers do not count: they never train.
    """
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    names = [group.name for group in channel_map.groups if any(axis.name in still for axis in group.axes)]
    return channel_map.without(names, "its parameters do not train (requires_grad=False)") if names else channel_map
