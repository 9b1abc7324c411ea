"""Other people's files for built-in networks: what they call our tensors, and in which order their channels stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autowidth.lab.models.networks.resnet import PaddingShortcut, ResNet

WIDTHS = (16, 32, 64)


def in_our_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that the network has for them, in the order of its channels.

    A CIFAR ResNet takes files with the names of He et al.'s code in torch (conv1, bn1, layer1.0.conv1, linear or fc),
    as in Y. Idelbayev's pytorch_resnet_cifar10. Any other state is returned as it is.
    """
    if not isinstance(network, ResNet) or not {"conv1.weight", "layer1.0.conv1.weight"} <= state.keys():
        return dict(state)
    if not any(isinstance(module, PaddingShortcut) for module in network.modules()):
        return {_our_name(name): tensor for name, tensor in state.items()}
    widths = _widths(state)
    return {_our_name(name): _ordered(tensor, name, widths) for name, tensor in state.items()}


def _our_name(theirs: str) -> str:
    """What we call the tensor of this published name."""
    name = re.sub(r"^conv1\.", "stem.conv.", theirs)
    name = re.sub(r"^bn1\.", "stem.norm.", name)
    name = re.sub(r"^(linear|fc)\.", "head.linear.", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.", name)
    name = re.sub(r"\.(shortcut|downsample)\.(0|1)\.", lambda m: f".shortcut.{('conv', 'norm')[int(m[2])]}.", name)
    for number, ours in (("1", "first"), ("2", "second")):
        name = name.replace(f".conv{number}.", f".{ours}.conv.").replace(f".bn{number}.", f".{ours}.norm.")
    return name


def _widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The widths of the streams of a published state, one per stage."""
    firsts = (f"layer{number}.0.conv2.weight" for number in range(1, len(WIDTHS) + 1))
    return tuple(len(state[name]) for name in firsts if name in state)


def channel_order(stage: int, widths: Iterable[int] = WIDTHS) -> Tensor:
    """Which published channel of the stream of this stage (0, 1, 2) each of ours is: (width of the stage,).

    Published shortcuts of option A pad half of the new channels in front and half behind; ours pad behind.
    """
    first, *wider = widths
    order, width = torch.arange(first), first
    for wide in wider[:stage]:
        front = (wide - width) // 2
        order = torch.cat([order + front, torch.arange(front), torch.arange(front + width, wide)])
        width = wide
    return order


def _ordered(tensor: Tensor, theirs: str, widths: tuple[int, ...]) -> Tensor:
    """The tensor of this published name with the channels of streams in our order; as it is where it does not fit."""
    block = re.match(r"layer(\d)\.(\d+)\.(conv|bn)(\d)", theirs)
    if re.match(r"(linear|fc)\.weight", theirs):
        return _taken(tensor, 1, channel_order(len(widths) - 1, widths))
    if block is None:  # the stem: the stream of the first stage is in order
        return tensor
    stage, number, kind, half = int(block[1]) - 1, int(block[2]), block[3], block[4]
    if half == "2":
        return _taken(tensor, 0, channel_order(stage, widths))
    if kind == "conv":
        return _taken(tensor, 1, channel_order(stage if number else max(stage - 1, 0), widths))
    return tensor


def _taken(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """The slices in this order along a dim, where there are as many."""
    fits = tensor.dim() > dim and tensor.shape[dim] == len(order)
    return tensor.index_select(dim, order) if fits else tensor
