"""What a channel costs: MACs and parameters, as functions of the widths."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autowidth.channels import ChannelMap
from autowidth.unwrapping import inner_model, uncompiled

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """A cost that is a sum over weights of factor x length of dim 0 x length of dim 1.

    Letters: t terms, g channel groups, two dims per term. The length of dim d of term t at widths w is
    `base[t, d] + copies[t, d] @ w`; a missing dim has base 1 and no copies. The unit is that of `factor`:
    multiply-accumulates per sample, or parameters.
    """

    names: tuple[str, ...]
    factor: Array
    base: Array
    copies: Array

    def vector(self, widths: Mapping[str, int]) -> Array:
        """Widths by name as a vector (g,)."""
        return np.array([widths[name] for name in self.names], dtype=np.float64)

    def at(self, widths: Mapping[str, int] | Array) -> float:
        """The whole cost at these widths."""
        length = self._lengths(widths)
        return float((self.factor * length[:, 0] * length[:, 1]).sum())

    def of_channel(self, widths: Mapping[str, int] | Array) -> Array:
        """What one channel of each group costs (g,): the saving if it is removed from the network at these widths.

        Exact, not a derivative: a group that a weight both reads and writes saves on both dims at once.
        """
        length, copies = self._lengths(widths), self.copies
        saved = length[:, :1] * copies[:, 1] + length[:, 1:] * copies[:, 0] - copies[:, 0] * copies[:, 1]
        return np.asarray(self.factor @ saved)

    def _lengths(self, widths: Mapping[str, int] | Array) -> Array:
        vector = self.vector(widths) if isinstance(widths, Mapping) else widths
        return self.base + self.copies @ vector


def macs_cost(channel_map: ChannelMap) -> Cost:
    """Multiply-accumulates per sample of all weights in use, as a function of the widths."""
    factors: dict[str, float] = {}
    for use in channel_map.uses:
        factors[use.name] = factors.get(use.name, 0.0) + use.macs_per_weight
    return _cost(channel_map, factors)


def params_cost(channel_map: ChannelMap, parameters: Iterable[str]) -> Cost:
    """The number of elements of these parameters, as a function of the widths."""
    return _cost(channel_map, dict.fromkeys(parameters, 1.0))


def elements_cost(channel_map: ChannelMap) -> Cost:
    """Elements per sample that the weights in use write, as a function of the widths: what norms and copies touch.

    Exact for weights whose dim 0 is their output, as in convolutions and linear layers.
    """
    factors: dict[str, float] = {}
    for use in channel_map.uses:
        factors[use.name] = factors.get(use.name, 0.0) + use.macs_per_weight
    return _cost(channel_map, factors, dims=(0,))


def _cost(channel_map: ChannelMap, factors: Mapping[str, float], dims: Container[int] | None = None) -> Cost:
    """The sum over weights of factor x the lengths of these dims, of all where none are named."""
    names = tuple(group.name for group in channel_map.groups)
    row = {name: t for t, name in enumerate(factors)}
    factor = np.array(list(factors.values()), dtype=np.float64)
    base, copies = np.ones((len(row), 2)), np.zeros((len(row), 2, len(names)))
    columns = _channel_dims(channel_map, row)
    for name, t in row.items():
        for d, length in enumerate(channel_map.shapes[name]):
            if dims is not None and d not in dims:
                continue
            if d in columns[name]:
                base[t, columns[name].index(d)] = length
            else:
                factor[t] *= length
    for g, group in enumerate(channel_map.groups):
        for place in group.places:
            if place.axis.name in row and (dims is None or place.axis.dim in dims):
                t, d = row[place.axis.name], columns[place.axis.name].index(place.axis.dim)
                copies[t, d, g] += place.copies
                base[t, d] -= place.copies * group.width
    return Cost(names, factor, base, copies)


def _channel_dims(channel_map: ChannelMap, names: Iterable[str]) -> dict[str, list[int]]:
    """For each parameter the dims, at most two, along which channels can come and go."""
    dims: dict[str, list[int]] = {name: [] for name in names}
    for group in channel_map.groups:
        for axis in group.axes:
            if axis.name in dims and axis.dim not in dims[axis.name]:
                dims[axis.name].append(axis.dim)
    return dims


def count_macs(model: nn.Module, example_inputs: object) -> int:
    """MACs of one forward pass of one sample, counted by running it in evaluation mode.

    Half of what torch.utils.flop_counter counts (it takes a multiply-accumulate for two operations), divided by the
    batch: convolutions, linear layers and matrix products; norms and activations are free.
    """
    model = inner_model(model)
    args, kwargs = called(example_inputs)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:  # the counter breaks where one that wants a gradient is passed to a module
            parameter.requires_grad_(False)
        with torch.no_grad(), uncompiled(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops()) // 2 // max(tensors[0].size(0), 1)


def called(example_inputs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """Positional and keyword arguments of a call with these inputs. Raises TypeError for what cannot be one."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(f"example_inputs is a {type(example_inputs).__name__}: pass a tensor, a tuple or a mapping")
