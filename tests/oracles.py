"""Slow and obviously right references: which channels belong together, found by probing instead of by rules."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from autowidth.channels import ChannelMap
from nets import Inputs, run

Slot = tuple[str, int, int]
"""A param slot: parameter or buffer name, dim, position."""

Coupling = frozenset[frozenset[Slot]]
"""Every channel that can be resized, as the set of the param slots in which it lives."""

SAMPLES = 24
"""Samples of noise per probe: a ReLU that hides a channel from all of them is one in millions."""


def traced_coupling(channel_map: ChannelMap) -> Coupling:
    """The channels of a channel map in the words of the oracle."""
    return frozenset(
        frozenset((p.axis.name, p.axis.dim, i) for p in group.places for i in p.index[c])
        for group in channel_map.groups
        for c in range(group.width)
    )


def brute_coupling(model: nn.Module, inputs: Inputs) -> Coupling:
    """Which param slots live and die together, found by taking the network apart at its mixing layers.

    A mixing layer is a convolution or linear layer with one conv group. In a copy of the model in evaluation mode
    the output of every such layer is replaced by noise, which cuts the network into pieces that do not mix. Then, with
    gradients as the only instrument:

    - a writer's output channel that is felt in a reader's input channel is the same channel;
    - a param slot belongs to a channel if, wherever the slot is felt at all, it is felt in this channel alone;
    - a slot of a weight reads an input channel if, with the slot zeroed, the layer is deaf for this channel alone.

    Channels that the inputs reach, that reach the outputs, that nobody writes or nobody reads are left out. Norms over
    all channels are taken at fixed statistics. Raises ValueError for a mixing layer with a single channel on a side.
    """
    dissection = _dissect(model, inputs)
    channels = _Classes()
    _join_writers_to_readers(dissection, channels)
    outer = frozenset(_outer_channels(dissection))
    found = [*_felt_slots(dissection, channels), *_reading_slots(dissection)]
    for slot, channel in found:
        channels.unite(slot, channel)
    return frozenset(
        frozenset(m for m in members if isinstance(m[0], str))
        for members in channels.all()
        if {"wrote", "read"} <= {m[1] for m in members if not isinstance(m[0], str)} and not members & outer
    )


# ---- the network, cut at its mixing layers ---------------------------------------------------------------------------

Channel = tuple[int, str, int]
"""A channel as one layer sees it: number of the layer's call, "read" or "wrote", position."""


@dataclass(frozen=True)
class _Layer:
    """One call of a mixing layer: the function of (input, weight), and the tensors that met it."""

    call: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    read: Tensor
    wrote: Tensor
    noise: Tensor
    dim: int

    def side(self, side: str) -> Tensor:
        return self.read if side == "read" else self.wrote


class _Cut(TorchFunctionMode):
    """Replaces the output of every mixing layer by noise, and writes the layer down."""

    mixing = frozenset({
        torch.conv1d, torch.conv2d, torch.conv3d, F.linear,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[_Layer] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            return _NORMS[func](**inspect.signature(func).bind(*args, **kwargs).arguments)
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        if func not in self.mixing or groups > 1:
            return func(*args, **kwargs)
        read, weight, *rest = args
        wrote = func(read.detach(), weight, *rest, **kwargs)
        noise = (2 * torch.randn_like(wrote)).requires_grad_()
        dim = read.dim() - 1 if func is F.linear else 1
        if min(read.size(dim), wrote.size(dim)) < 2:
            raise ValueError("a layer with a single channel on one side: nothing can be felt in one channel alone")
        self.layers.append(_Layer(lambda x, w: func(x, w, *rest, **kwargs), weight, read, wrote, noise, dim))
        return noise.clone()  # what follows may write in place


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (input.dim() - 2)
    out = input if weight is None else input * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, **_: Any
) -> Tensor:
    """With running statistics, written out: torch gives no gradients for them."""
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, training=True)
    scale = (running_var + 1e-5).rsqrt()
    return _affine(_affine(input, scale, -running_mean * scale), weight, bias)


def _instance_norm(input: Tensor, running_mean: Any = None, running_var: Any = None, **rest: Any) -> Tensor:
    if rest.pop("use_input_stats", True):
        return F.instance_norm(input, running_mean, running_var, **rest)
    return _batch_norm(input, running_mean, running_var, **rest)


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, **_: Any) -> Tensor:
    if num_groups > 1:
        return F.group_norm(input, num_groups, weight, bias)
    return _affine(input, weight, bias)


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, **_: Any) -> Tensor:
    return input * weight + bias


_NORMS: Mapping[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
}
"""Norms that the probe replaces: by their formula, and without statistics over all channels."""


@dataclass(frozen=True)
class _Dissection:
    """The cut network after one run, and the means for another one."""

    model: nn.Module
    inputs: Inputs
    layers: list[_Layer]
    outputs: list[Tensor]
    tensors: dict[str, Tensor]

    def nodes(self) -> Iterator[tuple[Channel, Tensor]]:
        """Every channel that a mixing layer reads or writes, with its values."""
        for number, layer in enumerate(self.layers):
            for side in ("read", "wrote"):
                for position, values in enumerate(layer.side(side).unbind(layer.dim)):
                    yield (number, side, position), values


def _dissect(model: nn.Module, inputs: Inputs) -> _Dissection:
    model = copy.deepcopy(model).eval()
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    for name, tensor in tensors.items():  # which channels meet depends on no value; these values keep ReLUs open
        tensor.detach().abs_().add_(0.1).mul_(-1 if name.endswith("running_mean") else 1)
        tensor.requires_grad_()
    noise = tree_map_only(Tensor, lambda t: torch.randn(SAMPLES, *t.shape[1:]).requires_grad_(), inputs)
    return _rerun(model, noise, tensors)


def _rerun(model: nn.Module, inputs: Inputs, tensors: dict[str, Tensor]) -> _Dissection:
    with _Cut() as cut:
        result = run(model, inputs)
    leaves = [vars(leaf) if hasattr(leaf, "__dataclass_fields__") else leaf for leaf in tree_leaves(result)]
    outputs = [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
    return _Dissection(model, inputs, cut.layers, outputs, tensors)


# ---- what is felt where ----------------------------------------------------------------------------------------------


def _felt(values: Tensor, sources: Iterable[Tensor]) -> list[Tensor]:
    """For each source its gradient by the values, which are weighted at random so that nothing cancels."""
    sources = list(sources)
    if not values.requires_grad or not sources:
        return [torch.zeros_like(s) for s in sources]
    total = (values * torch.rand_like(values)).sum()
    gradients = torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, gradients, strict=True)]


def _positions(gradient: Tensor, dim: int) -> list[int]:
    """Where along this dim anything was felt."""
    rows = gradient.movedim(dim, 0).reshape(gradient.size(dim), -1)
    return (rows != 0).any(1).nonzero().flatten().tolist()


def _join_writers_to_readers(dissection: _Dissection, channels: _Classes) -> None:
    noises = [layer.noise for layer in dissection.layers]
    for channel, values in dissection.nodes():
        channels.add(channel)
        if channel[1] == "read":
            for number, gradient in enumerate(_felt(values, noises)):
                for position in _positions(gradient, dissection.layers[number].dim):
                    channels.unite(channel, (number, "wrote", position))


def _outer_channels(dissection: _Dissection) -> Iterator[Channel]:
    """Channels that the model's inputs reach, and those that reach its outputs."""
    images = [t for t in tree_leaves(dissection.inputs) if isinstance(t, Tensor)]
    for channel, values in dissection.nodes():
        if channel[1] == "read" and any(bool(g.any()) for g in _felt(values, images)):
            yield channel
    for output in dissection.outputs:
        for number, gradient in enumerate(_felt(output, [layer.noise for layer in dissection.layers])):
            yield from ((number, "wrote", p) for p in _positions(gradient, dissection.layers[number].dim))


def _felt_slots(dissection: _Dissection, channels: _Classes) -> Iterator[tuple[Slot, Channel]]:
    """Slots that are felt in one channel alone, wherever they are felt."""
    felt: dict[Slot, dict[tuple[int, str], set[Channel]]] = {}
    tensors = dissection.tensors
    for channel, values in dissection.nodes():
        for (name, tensor), gradient in zip(tensors.items(), _felt(values, tensors.values()), strict=True):
            for dim in range(tensor.dim()) if gradient.any() else ():
                for position in _positions(gradient, dim):
                    felt.setdefault((name, dim, position), {}).setdefault(channel[:2], set()).add(channel)
    for slot, sites in felt.items():
        if all(len({channels.root(c) for c in found}) == 1 for found in sites.values()):
            yield from ((slot, c) for found in sites.values() for c in found)


def _reading_slots(dissection: _Dissection) -> Iterator[tuple[Slot, Channel]]:
    """Slots without which a layer is deaf for one input channel alone."""
    for number, layer in enumerate(dissection.layers):
        feeding = _felt(layer.weight, dissection.tensors.values())
        for (name, tensor), gradient in zip(dissection.tensors.items(), feeding, strict=True):
            for dim in range(tensor.dim()) if gradient.any() else ():
                for position in range(tensor.size(dim)):
                    deaf = _deaf(layer, _weight_without(dissection, number, name, dim, position))
                    if len(deaf) == 1:
                        yield (name, dim, position), (number, "read", deaf[0])


def _weight_without(dissection: _Dissection, number: int, name: str, dim: int, position: int) -> Tensor:
    """The weight that the layer would work with if this slot were zero."""
    layer, tensor = dissection.layers[number], dissection.tensors[name]
    if tensor is layer.weight:
        weight = tensor.detach().clone()
        weight.select(dim, position).zero_()
        return weight
    kept = tensor.detach().clone()
    try:
        tensor.detach().select(dim, position).zero_()
        return _rerun(dissection.model, dissection.inputs, dissection.tensors).layers[number].weight.detach()
    finally:
        tensor.detach().copy_(kept)


def _deaf(layer: _Layer, weight: Tensor) -> list[int]:
    """The input channels whose values do not matter to the layer with this weight."""
    count = layer.read.size(layer.dim)
    sample = torch.randn_like(layer.read[:1].detach())
    shape = [count] + [1] * (sample.dim() - 1)
    shape[layer.dim] = count
    alone = sample * torch.eye(count, dtype=sample.dtype).view(shape)
    with torch.no_grad():
        change = layer.call(alone, weight) - layer.call(torch.zeros_like(sample), weight)
    return (change.reshape(count, -1) == 0).all(1).nonzero().flatten().tolist()


@dataclass
class _Classes:
    """Disjoint sets."""

    parent: dict[Any, Any] = field(default_factory=dict)

    def add(self, member: Any) -> None:
        self.parent.setdefault(member, member)

    def root(self, member: Any) -> Any:
        self.add(member)
        while self.parent[member] != member:
            member = self.parent[member]
        return member

    def unite(self, a: Any, b: Any) -> None:
        self.parent[self.root(a)] = self.root(b)

    def all(self) -> list[set[Any]]:
        sets: dict[Any, set[Any]] = {}
        for member in self.parent:
            sets.setdefault(self.root(member), set()).add(member)
        return list(sets.values())
