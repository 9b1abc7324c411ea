"""One statistics pass over probe batches: sums and counts, added up over batches and ranks.

The pass hooks nothing permanently: a function mode watches the calls that read channels (convolutions and linear
layers) while it lasts, so ordinary training steps stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from autowidth.channels import ChannelMap, ParamAxis
from autowidth.profit import Reader, Sums, fold

Loss = Callable[[Any, Any], Tensor]


class ProbeError(ValueError):
    """The probe has no usable data, or cannot see what a layer reads."""


def probe(model: nn.Module, channel_map: ChannelMap, batches: Iterable[tuple[Any, Any]], loss_fn: Loss) -> Sums:
    """Returns the sums over all batches of (inputs, target). `loss_fn(model(inputs), target)` is a mean over samples.

    Neither gradients nor modes of the model are touched: the caller sets evaluation mode. Raises ProbeError without a
    single batch or where a weight reads channels otherwise than through a convolution or linear call that it enters
    unchanged, and FloatingPointError if the loss is not finite.
    """
    sums: Sums | None = None
    for inputs, target in batches:
        batch = _probe_batch(model, channel_map, inputs, target, loss_fn)
        if sums is None:
            sums = batch
        else:
            sums.add(batch)
    if sums is None:
        raise ProbeError("the probe has no data: pass a loader, or a list, with at least one (inputs, target)")
    return sums


def _probe_batch(model: nn.Module, channel_map: ChannelMap, inputs: Tensor, target: Any, loss_fn: Loss) -> Sums:
    samples = inputs.size(0)
    readers = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    folds = {axis: torch.tensor(fold(channel_map, axis), device=inputs.device) for axis in readers}
    plain = torch.autocast(inputs.device.type, enabled=False)
    with torch.enable_grad(), plain, _effective(model, channel_map) as weights:
        image = inputs.detach().clone().requires_grad_()
        watch = _Watch({id(weight): axis for axis, weight in weights.items()}, folds, samples)
        with watch:
            loss = loss_fn(model(image), target)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the probe loss is {loss.item()}: training has diverged; lower the learning rate or check the data"
            )
        unseen = {axis: weight for axis, weight in weights.items() if axis not in watch.seen and weight.requires_grad}
        _, *found = torch.autograd.grad(loss, [image, *unseen.values()], allow_unused=bool(unseen))
        _refuse([axis for axis, gradient in zip(unseen, found, strict=True) if gradient is not None])
    first, second = {}, {}
    for group in channel_map.groups:
        t = _taken(watch, group.with_role("read"), samples, group.width, inputs.device)
        first[group.name], second[group.name] = t.sum(0), t.square().sum(0)
    return Sums(samples=samples, loss=loss.item() * samples, first=first, second=second, readers=watch.readers)


def _refuse(missed: list[ParamAxis]) -> None:
    """Raises ProbeError for weights that took part in the loss unseen: what they read would seem worthless."""
    if missed:
        raise ProbeError(
            f"the probe cannot see what is read through {missed[0]}: call F.linear or F.conv2d with the parameter "
            "itself, not x @ w and not with a weight computed from it; for the latter use torch.nn.utils.parametrize"
        )


def _taken(watch: _Watch, places: tuple[Any, ...], samples: int, width: int, device: torch.device) -> Tensor:
    """t (samples, width): activation x gradient, summed over the readers of a group and their positions."""
    t = torch.zeros(samples, width, device=device)
    for place in places:
        if place.axis in watch.products:
            index = torch.tensor(place.index, device=device)
            t += watch.products[place.axis][:, index].sum(-1)
    return t


@contextmanager
def _effective(model: nn.Module, channel_map: ChannelMap) -> Iterator[dict[ParamAxis, Tensor]]:
    """Every axis that reads a channel -> the weight tensor that the layer really uses.

    Parametrized weights are computed once and held while the context lasts, so that their ids are known.
    """
    axes = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    with parametrize.cached():
        weights = effective_weights(model)
        yield {axis: weights[axis.name] for axis in axes}


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; behind a parametrization, the weight that the layer really uses."""
    weights: dict[str, Tensor] = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        owner, found, leaf = name.partition(".parametrizations.")
        weights[name] = getattr(model.get_submodule(owner), leaf.split(".")[0]) if found else parameter
    return weights


class _Watch(TorchFunctionMode):
    """Watches every call that reads channels: what comes in, and the gradients on both sides."""

    def __init__(self, axes: dict[int, ParamAxis], folds: dict[ParamAxis, Tensor], samples: int) -> None:
        super().__init__()
        self.axes = axes
        self.folds = folds
        self.samples = samples
        self.seen: set[ParamAxis] = set()
        self.products: dict[ParamAxis, Tensor] = {}
        self.readers: dict[ParamAxis, Reader] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CHANNEL_DIM:
            return func(*args, **kwargs)
        named = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
        axis = self.axes.get(id(named["weight"]))
        if axis is None or not named["input"].requires_grad or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.seen.add(axis)
        source = named["input"].view_as(named["input"])
        rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight")}
        out = func(source, named["weight"], *args[2:], **rest)
        dim = _CHANNEL_DIM[func]
        source.register_hook(partial(self._came_in, axis, source.detach(), dim))
        out.register_hook(partial(self._went_out, axis, dim))
        return out

    def _came_in(self, axis: ParamAxis, source: Tensor, dim: int, gradient: Tensor) -> None:
        """Adds activation x gradient per sample, and the moments of what was read."""
        x = _rows(source.float(), dim, self.samples)
        g = _rows(gradient.float(), dim, self.samples)
        product = torch.einsum("npc,npc->nc", x, g) * self.samples
        self.products[axis] = self.products[axis] + product if axis in self.products else product
        flat = x[..., self.folds[axis]].transpose(-1, -2).flatten(0, 2)
        reader = self._reader(axis, flat.size(1), 0, flat)
        reader.gram += flat.T @ flat
        reader.total += flat.sum(0)
        reader.inputs += len(flat)

    def _went_out(self, axis: ParamAxis, dim: int, gradient: Tensor) -> None:
        """Adds the second moments of the gradient of each sample's loss at the output."""
        g = _rows(gradient.float(), dim, self.samples).flatten(0, 1) * self.samples
        reader = self._reader(axis, 0, g.size(1), g)
        reader.force += g.T @ g
        reader.outputs += len(g)

    def _reader(self, axis: ParamAxis, c: int, o: int, like: Tensor) -> Reader:
        """The sums of this axis. The output's hook comes first, so the side not yet seen is still empty."""
        if axis not in self.readers:
            self.readers[axis] = Reader(gram=like.new_zeros(0, 0), total=like.new_zeros(0), force=like.new_zeros(0, 0))
        reader = self.readers[axis]
        if c and not reader.inputs:
            reader.gram, reader.total = like.new_zeros(c, c), like.new_zeros(c)
        if o and not reader.outputs:
            reader.force = like.new_zeros(o, o)
        return reader


def _rows(tensor: Tensor, dim: int, samples: int) -> Tensor:
    """A tensor with channels in `dim` as (samples, positions, channels); windows folded into the batch are unfolded."""
    return tensor.movedim(dim, -1).reshape(samples, -1, tensor.size(dim))


_CHANNEL_DIM: dict[Any, int] = {
    F.linear: -1,
    F.conv1d: -2,
    F.conv2d: -3,
    F.conv3d: -4,
    F.conv_transpose1d: -2,
    F.conv_transpose2d: -3,
    F.conv_transpose3d: -4,
}
"""The calls that read channels, and the dim of their input (and output) in which channels lie."""
