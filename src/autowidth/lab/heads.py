"""The head of a network where a run brings weights for another number of classes: everything else is taken over."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap
from autowidth.checkpoint import load_, read_run, read_tensors
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace

OUTPUT = "model output"
"""The reason for which the trace freezes the axes that tell classes apart."""


def load_but_head_(network: nn.Module, folder: Path, example_inputs: Inputs) -> tuple[str, ...]:
    """Gives the network the widths and weights of the run, but for a head of another number of classes.

    Returns the names of the tensors of the head, which stay fresh; none where the head fits and was taken too. Raises
    CheckpointError for a run of another network, TraceError. The network is then unchanged.
    """
    state = read_tensors(read_run(folder))
    channel_map = trace(network, example_inputs)
    head = _head(channel_map, network, state)
    loaded = _with_classes(network, head, state)
    widths = load_(loaded, folder, example_inputs=example_inputs).widths
    plan = {
        group.name: IndexMap.between(group.width, widths[group.name])
        for group in channel_map.groups
        if widths[group.name] != group.width
    }
    if plan:
        apply_(network, channel_map, plan)
    content = loaded.state_dict()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name not in head:
                tensor.copy_(content[name])
    return head


def _head(channel_map: ChannelMap, network: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The tensors whose first length is the number of classes, where it is another one in the run."""
    live = network.state_dict()
    ends = dict.fromkeys(f.axis.name for f in channel_map.frozen if f.reason == OUTPUT and f.axis.dim == 0)
    return tuple(n for n in ends if n in live and n in state and state[n].dim() and len(live[n]) != len(state[n]))


def _with_classes(network: nn.Module, head: tuple[str, ...], state: Mapping[str, Tensor]) -> nn.Module:
    """A copy whose head has as many classes as the run's."""
    copied = copy.deepcopy(network)
    for name in head:
        owner, _, leaf = name.rpartition(".")
        module = copied.get_submodule(owner)
        tensor: Tensor = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(tensor.new_zeros(len(state[name]), *tensor.shape[1:])))
        for attribute in ("out_features", "out_channels"):
            if hasattr(module, attribute):
                setattr(module, attribute, len(state[name]))
    return copied
