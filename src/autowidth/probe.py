"""One statistics pass over probe batches: sums and counts, added up over batches and ranks.

It hooks nothing permanently: a function mode watches the calls that read channels (convolutions and linear
layers) while it lasts, so ordinary training steps stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from autowidth.channels import ChannelMap, ParamAxis
from autowidth.profit import Peers, Reader, Sums, fold, leftover, peers, slices

Loss = Callable[[Any, Any], Tensor]


class ProbeError(ValueError):
    """The probe has no usable data, or cannot see what a layer reads."""


def probe(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Iterable[tuple[Any, Any]],
    loss_fn: Loss,
    *,
    known: Mapping[ParamAxis, Peers] | None = None,
) -> Sums:
    """Returns the sums over all batches of (inputs, target). `loss_fn(model(inputs), target)` is a mean over samples.

    What peers can predict of a channel has to be known before the gradients are looked at: a first, forward pass over
    the batches finds it out. Where several processes share the work, each of them calls `moments`, all add up what they
    got, and then each calls this function with `known` = `profit.peers` of the whole; it then makes one pass, and
    `readers` stays empty. A number that is not finite counts for nothing.

    Neither gradients nor modes of the model are touched: the caller sets evaluation mode. Raises ProbeError without a
    single batch or where a weight reads channels otherwise than through a convolution or linear call that it enters
    unchanged, and FloatingPointError if the loss is not finite.
    """
    batches = list(batches)
    if not batches:
        raise ProbeError("the probe has no data: pass a loader, or a list, with at least one (inputs, target)")
    sums = moments(model, channel_map, batches) if known is None else Sums()
    if known is None:
        known = peers(sums, channel_map, effective_weights(model))
    for inputs, target in batches:
        sums.add(_gates(model, channel_map, inputs, target, loss_fn, known))
    return sums


def moments(model: nn.Module, channel_map: ChannelMap, batches: Iterable[tuple[Any, Any]]) -> Sums:
    """Returns sums with `readers` alone, the moments of what every weight reads, from one forward pass."""
    sums = Sums()
    for inputs, _ in batches:
        with _watched(model, channel_map, inputs, _Moments) as (watch, image):
            model(image)
        sums.add(Sums(readers=watch.found()))
    return sums


def _gates(
    model: nn.Module,
    channel_map: ChannelMap,
    inputs: Tensor,
    target: Any,
    loss_fn: Loss,
    known: Mapping[ParamAxis, Peers],
) -> Sums:
    """The sums of one batch without `readers`: what leaves the readers x gradient, by sample."""
    with _watched(model, channel_map, inputs, partial(_Gates, known=known)) as (watch, image):
        loss = loss_fn(model(image), target)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the probe loss is {loss.item()}: training has diverged; lower the learning rate or check the data"
            )
        unseen = {a: w for a, w in watch.weights.items() if a not in watch.seen and w.requires_grad}
        _, *found = torch.autograd.grad(loss, [image, *unseen.values()], allow_unused=bool(unseen))
        _refuse([axis for axis, gradient in zip(unseen, found, strict=True) if gradient is not None])
    batch = Sums(samples=len(inputs), loss=loss.item() * len(inputs))
    for group in channel_map.groups:
        t, rest = (
            _taken(products, group.with_role("read"), len(inputs), group.width, inputs.device)
            for products in (watch.products, watch.rests)
        )
        batch.first[group.name], batch.second[group.name] = t.sum(0), t.square().sum(0)
        batch.rest_first[group.name], batch.rest_second[group.name] = rest.sum(0), rest.square().sum(0)
    return batch


def _refuse(missed: list[ParamAxis]) -> None:
    """Raises ProbeError for weights that took part in the loss unseen: what they read would seem worthless."""
    if missed:
        raise ProbeError(
            f"the probe cannot see what is read through {missed[0]}: call F.linear or F.conv2d with the parameter "
            "itself, not x @ w and not with a weight computed from it; for the latter use torch.nn.utils.parametrize"
        )


def _taken(
    products: Mapping[ParamAxis, Tensor], places: tuple[Any, ...], samples: int, width: int, device: torch.device
) -> Tensor:
    """t (samples, width): the products, summed over the readers of a group and their positions."""
    t = torch.zeros(samples, width, device=device)
    for place in places:
        if place.axis in products:
            t += products[place.axis][:, torch.tensor(place.index, device=device)].sum(-1)
    return torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0)


Kind = TypeVar("Kind", bound="_Watch")


@contextmanager
def _watched(
    model: nn.Module, channel_map: ChannelMap, inputs: Tensor, kind: Callable[..., Kind]
) -> Iterator[tuple[Kind, Tensor]]:
    """Watches what the model reads while it lasts, without autocast. Yields the watch, and the inputs to run with."""
    readers = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    folds = {axis: torch.tensor(fold(channel_map, axis), device=inputs.device) for axis in readers}
    plain = torch.autocast(inputs.device.type, enabled=False)
    with (
        torch.enable_grad(),
        plain,
        _effective(model, channel_map) as weights,
        kind(weights, folds, len(inputs), _names(model)) as watch,
    ):
        yield watch, inputs.detach().clone().requires_grad_()


def _names(model: nn.Module) -> dict[int, str]:
    """The names of parameters and buffers by the identity of the tensor."""
    return {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}


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
    """Watches every call that reads channels; what to do with it, `_reads` says."""

    def __init__(
        self, weights: dict[ParamAxis, Tensor], folds: dict[ParamAxis, Tensor], samples: int, names: dict[int, str]
    ) -> None:
        super().__init__()
        self.weights = weights
        self.folds = folds
        self.samples = samples
        self.names = names
        self.axes = {id(weight): axis for axis, weight in weights.items()}
        self.seen: set[ParamAxis] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            self._normed(*[{**dict(zip(("input", "running_mean"), args, strict=False)), **kwargs}[k] for k in _NORM])
        if func not in _CHANNEL_DIM:
            return func(*args, **kwargs)
        named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        axis = self.axes.get(id(named["weight"]))
        if axis is None or not named["input"].requires_grad or not torch.is_grad_enabled():
            self._added(named.get("bias"))
            return func(*args, **kwargs)
        self.seen.add(axis)
        source = named["input"].view_as(named["input"])
        rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight")}
        out = func(source, named["weight"], *args[2:], **rest)
        self._reads(axis, source, out, _CHANNEL_DIM[func], named.get("bias"))
        return out

    def _reads(self, axis: ParamAxis, source: Tensor, out: Tensor, dim: int, bias: Tensor | None) -> None:
        raise NotImplementedError

    def _normed(self, source: Tensor, mean: Tensor | None) -> None:
        """A batch norm is about to be applied."""

    def _added(self, bias: Tensor | None) -> None:
        """A bias is added to something that is not watched."""


_NORM = ("input", "running_mean")


class _Moments(_Watch):
    """Adds up what is read, and finds out which tensors can take over a constant."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.readers: dict[ParamAxis, Reader] = {}
        self.behind: list[tuple[ParamAxis | None, str | None]] = []
        self.last: Tensor | None = None

    def _reads(self, axis: ParamAxis, source: Tensor, out: Tensor, dim: int, bias: Tensor | None) -> None:
        x = _folded(_rows(source.detach().float(), dim, self.samples), self.folds[axis])
        flat = x.transpose(0, 1).flatten(1)
        reader = Reader(gram=flat @ flat.T, total=flat.sum(1), inputs=flat.size(1))
        if axis in self.readers:
            self.readers[axis].add(reader)
        else:
            self.readers[axis] = reader
        self.behind.append((axis, None if bias is None else self.names.get(id(bias))))
        self.last = out if bias is None else None

    def _normed(self, source: Tensor, mean: Tensor | None) -> None:
        name = self.names.get(id(mean))
        if source is self.last:
            self.behind[-1] = (self.behind[-1][0], name)
        else:
            self.behind.append((None, name))
        self.last = None

    def _added(self, bias: Tensor | None) -> None:
        self.behind.append((None, self.names.get(id(bias))))

    def found(self) -> dict[ParamAxis, Reader]:
        """The sums by axis. A tensor takes over constants of one weight only, and after each of its calls."""
        for axis, reader in self.readers.items():
            mine = {name for other, name in self.behind if other == axis}
            reader.absorber = mine.pop() if len(mine) == 1 else None
            if any(name == reader.absorber for other, name in self.behind if other != axis):
                reader.absorber = None
        return self.readers


class _Gates(_Watch):
    """What leaves the readers x gradient, by sample: of the channel itself, and of what its peers cannot predict."""

    def __init__(self, *args: Any, known: Mapping[ParamAxis, Peers]) -> None:
        super().__init__(*args)
        self.known = known
        self.products: dict[ParamAxis, Tensor] = {}
        self.rests: dict[ParamAxis, Tensor] = {}

    def _reads(self, axis: ParamAxis, source: Tensor, out: Tensor, dim: int, bias: Tensor | None) -> None:
        sent: list[Tensor] = []  # the output's hook comes first
        source.register_hook(partial(self._came_in, axis, source.detach(), dim, sent))
        if axis in self.known and self.known[axis].absorber is not None:
            out.register_hook(lambda gradient: sent.append(_rows(gradient.float(), dim, self.samples).sum(-1)))

    def _came_in(self, axis: ParamAxis, source: Tensor, dim: int, sent: list[Tensor], gradient: Tensor) -> None:
        """Adds both products. `sent`: the gradient at the output, summed over positions, (n, o)."""
        x = _rows(source.float(), dim, self.samples)
        g = _rows(gradient.float(), dim, self.samples)
        product = (x * g).sum(-1) * self.samples
        rest = product
        if axis in self.known:
            rest = product.clone()
            rest[:, self.folds[axis]] = self._rest(axis, x, g, sent) * self.samples
        for found, more in ((self.products, product), (self.rests, rest)):
            found[axis] = found[axis] + more if axis in found else more

    def _rest(self, axis: ParamAxis, x: Tensor, g: Tensor, sent: list[Tensor]) -> Tensor:
        """What is left of every channel x gradient, (n, c, copies); an absorber takes over its constant part."""
        known, index = self.known[axis], self.folds[axis]
        mix = leftover(known.inverse)
        left = mix.float() @ _folded(x, index)
        rest: Tensor = (left * _folded(g, index)).unflatten(-1, (index.size(1), -1)).sum(-1)
        if known.absorber is None:
            return rest
        window = slices(self.weights[axis].detach().float(), axis).sum(-1)[:, index]
        constant = (mix @ known.mean.double()).float()
        return rest - torch.einsum("no,ock,c->nck", sent[0], window, constant)


def _rows(tensor: Tensor, dim: int, samples: int) -> Tensor:
    """A tensor with channels in `dim` as (samples, channels, positions); windows folded into the batch are unfolded."""
    return tensor.movedim(dim, -1).reshape(samples, -1, tensor.size(dim)).transpose(1, 2)


def _folded(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (samples, channels, positions) as (samples, peers, copies x positions), by the index (peers, copies)."""
    if index.size(1) == 1 and torch.equal(index[:, 0], torch.arange(rows.size(1), device=index.device)):
        return rows
    return rows[:, index].flatten(2)


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
