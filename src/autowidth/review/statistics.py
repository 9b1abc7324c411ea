"""One statistics pass over probe batches: sums of the profits and the reconstruction, each worked out once.

It hooks nothing permanently: a function mode watches the calls that read channels (convolutions and linear
layers) while it lasts, so ordinary training steps stay as they were.

Letters in shapes: n samples of a batch, c positions on an axis that reads, p pixels, k positions of a co-channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from autowidth.channels import ChannelMap, ParamAxis, Place
from autowidth.ranks import ALONE, Ranks
from autowidth.review.batches import Batches, DivergedProbeError, Loss, ProbeError, samples_in
from autowidth.review.profit import Sums
from autowidth.review.reconstruct import (
    Moments,
    Reconstruction,
    co_channel_positions,
    leftover,
    reconstruction,
    slices,
)
from autowidth.review.shares import add_moments, add_sums
from autowidth.review.state import full_precision

HALF_SCALE = 32.0
"""Factor on the loss of one sample while gradients go through float16, whose smallest number is 6e-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one probe found out: the sums behind the profits, and how co-channels stand in for each other."""

    sums: Sums
    known: Reconstruction

    @property
    def loss(self) -> float:
        """The mean loss over the samples, nats per sample."""
        return self.sums.loss / self.sums.samples


def probe(
    model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss, *, reconstruct: bool = True,
    ranks: Ranks = ALONE,
) -> Statistics:  # fmt: skip
    """The statistics over all batches; `loss(model, batch)` is a mean over samples.

    What co-channels can predict of a channel has to be known before the gradients are looked at: a first, forward pass
    over the batches finds it out, unless `reconstruct` says that nobody shall stand in. Where several ranks share
    the work, each of them calls `read_moments`, all add up what they got, each makes the `reconstruction` of the whole,
    calls `read_gates`, and all add up again. A number that is not finite counts for nothing.

    Neither gradients nor modes of the model are touched: the caller sets evaluation mode. Raises ProbeError without a
    single batch or where a weight reads channels otherwise than through a convolution or linear call that it enters
    unchanged, and DivergedProbeError if the loss is not finite.
    """
    if not batches:
        raise ProbeError("the probe has no data: pass a loader, or a list, with at least one batch")
    known: Reconstruction = {}
    if reconstruct:
        known = known_of(model, channel_map, batches, loss, ranks)
    sums = read_gates(model, channel_map, batches, loss, known)
    return Statistics(sums=add_sums(sums, channel_map, ranks), known=known)


def known_of(
    model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss, ranks: Ranks = ALONE
) -> Reconstruction:
    """What co-channels can predict of every channel, on the batches of all ranks."""
    moments, weights = read_moments(model, channel_map, batches, loss), effective_weights(model)
    device = next(iter(weights.values())).device
    return reconstruction(add_moments(moments, channel_map, device, ranks), channel_map, weights)


def read_moments(model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss) -> dict[ParamAxis, Moments]:
    """The moments of what every weight reads, from one forward pass."""
    total: dict[ParamAxis, Moments] = {}
    for batch in batches:
        with _watched(model, channel_map, batch, _MomentsWatch) as (watch, copy), _without_graph():
            loss(model, copy)
        for axis, moments in watch.found().items():
            if axis in total:
                total[axis].add(moments)
            else:
                total[axis] = moments
    return total


def read_gates(model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss, known: Reconstruction) -> Sums:
    """The sums of what leaves the readers x gradient, from one forward and backward pass."""
    sums = Sums()
    for batch in batches:
        sums.add(_gates(model, channel_map, batch, loss, known))
    return sums


def _gates(model: nn.Module, channel_map: ChannelMap, batch: Any, loss: Loss, known: Reconstruction) -> Sums:
    """The sums of one batch."""
    samples = samples_in(batch)
    with _watched(model, channel_map, batch, partial(_GatesWatch, known=known)) as (watch, copy):
        value = loss(model, copy)
        if not torch.isfinite(value):
            raise DivergedProbeError(
                f"the probe loss is {value.item()}: training has diverged; lower the learning rate or check the data"
            )
        watch.look_back(value)
    found = Sums(samples=samples, loss=value.item() * samples)
    for group in channel_map.groups:
        t, rest = (
            _taken(products, group.with_role("read"), samples, group.width, value.device)
            for products in (watch.products, watch.rests)
        )
        found.first[group.name], found.second[group.name] = t.sum(0), t.square().sum(0)
        found.rest_first[group.name], found.rest_second[group.name] = rest.sum(0), rest.square().sum(0)
    return found


def _taken(
    products: Mapping[ParamAxis, Tensor], places: tuple[Place, ...], samples: int, width: int, device: torch.device
) -> Tensor:
    """t (n, width): the products, summed over the readers of a group and their positions."""
    t = torch.zeros(samples, width, device=device)
    for place in places:
        if place.axis in products:
            t += products[place.axis][:, torch.tensor(place.index, device=device)].sum(-1)
    return torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0)


# ---- contexts of a pass ----------------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound="_Watch")


@contextmanager
def _watched(
    model: nn.Module, channel_map: ChannelMap, batch: Any, kind: Callable[..., Kind]
) -> Iterator[tuple[Kind, Any]]:
    """Watches what the model reads while it lasts. Yields the watch, and a copy of the batch to run with."""
    axes = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    with full_precision(model), torch.enable_grad(), parametrize.cached():
        weights = effective_weights(model)  # parametrized ones are computed once and held, so that their ids are known
        of_axis = {axis: weights[axis.name] for axis in axes}
        positions = {
            axis: torch.tensor(co_channel_positions(channel_map, axis), device=weight.device)
            for axis, weight in of_axis.items()
        }
        with kind(of_axis, positions, samples_in(batch), _names(model)) as watch:
            yield watch, tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), batch)


@contextmanager
def _without_graph() -> Iterator[None]:
    """While it lasts, a graph is built that keeps nothing: whether gradients are wanted can be seen, at no memory."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)):
        yield


def _names(model: nn.Module) -> dict[int, str]:
    """The names of parameters and buffers by the identity of the tensor."""
    return {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; behind a parametrization, the weight that the layer really uses."""
    weights: dict[str, Tensor] = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        owner, found, leaf = name.partition(".parametrizations.")
        weights[name] = getattr(model.get_submodule(owner), leaf.split(".")[0]) if found else parameter
    return weights


# ---- watching calls --------------------------------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Watches every call that reads channels; what to do with it, `_reads` says.

    A call counts where gradients are enabled: what a model works out under `torch.no_grad` is not part of its loss.
    """

    def __init__(
        self, weights: dict[ParamAxis, Tensor], positions: dict[ParamAxis, Tensor], samples: int, names: dict[int, str]
    ) -> None:
        super().__init__()
        self.weights = weights
        self.positions = positions
        self.samples = samples
        self.names = names
        self.axes = {id(weight): axis for axis, weight in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            self._normed(*[{**dict(zip(("input", "running_mean"), args, strict=False)), **kwargs}[k] for k in _NORM])
        if func not in _CHANNEL_DIM:
            return func(*args, **kwargs)
        named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        axis = self.axes.get(id(named["weight"]))
        if axis is None or not torch.is_grad_enabled():
            self._added(named.get("bias"))
            return func(*args, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight")}
        return self._reads(
            axis, named["input"], lambda x: func(x, named["weight"], *args[2:], **rest), _CHANNEL_DIM[func],
            named.get("bias"),
        )  # fmt: skip

    def _reads(
        self, axis: ParamAxis, source: Tensor, call: Callable[[Tensor], Tensor], dim: int, bias: Tensor | None
    ) -> Tensor:
        """The result of the call on the source, whose channels lie in `dim`."""
        raise NotImplementedError

    def _normed(self, source: Tensor, mean: Tensor | None) -> None:
        """A batch norm is about to be applied."""

    def _added(self, bias: Tensor | None) -> None:
        """A bias is added to something that is not watched."""


_NORM = ("input", "running_mean")


class _MomentsWatch(_Watch):
    """Adds up what is read, and finds out which tensors can take a constant."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.moments: dict[ParamAxis, Moments] = {}
        self.behind: list[tuple[ParamAxis | None, str | None]] = []
        self.last: Tensor | None = None

    def _reads(
        self, axis: ParamAxis, source: Tensor, call: Callable[[Tensor], Tensor], dim: int, bias: Tensor | None
    ) -> Tensor:
        x = _by_co_channel(_rows(source.detach().float(), dim, self.samples), self.positions[axis])
        flat = x.transpose(0, 1).flatten(1)
        moments = Moments(gram=flat @ flat.T, total=flat.sum(1), inputs=flat.size(1))
        if axis in self.moments:
            self.moments[axis].add(moments)
        else:
            self.moments[axis] = moments
        self.behind.append((axis, None if bias is None else self.names.get(id(bias))))
        out = call(source)
        self.last = out if bias is None else None
        return out

    def _normed(self, source: Tensor, mean: Tensor | None) -> None:
        name = self.names.get(id(mean))
        if source is self.last:
            self.behind[-1] = (self.behind[-1][0], name)
        else:
            self.behind.append((None, name))
        self.last = None

    def _added(self, bias: Tensor | None) -> None:
        self.behind.append((None, self.names.get(id(bias))))

    def found(self) -> dict[ParamAxis, Moments]:
        """The sums by axis. A tensor takes constants of one weight only, and after each of its calls."""
        for axis, moments in self.moments.items():
            mine = {name for other, name in self.behind if other == axis}
            moments.offset = mine.pop() if len(mine) == 1 else None
            if any(name == moments.offset for other, name in self.behind if other != axis):
                moments.offset = None
        return self.moments


class _Tap(torch.autograd.Function):
    """The identity, in front of a reader: tells the gradient that arrives there.

    The anchor, a leaf without content, makes sure that backward passes by, whatever else wants a gradient: frozen
    parameters, integer inputs and embeddings make no difference.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, arrived: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arrived = arrived
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        ctx.arrived(*ctx.saved_tensors, gradient)
        return (gradient if ctx.needs_input_grad[0] else None), gradient.new_zeros(()), None


class _GatesWatch(_Watch):
    """What leaves the readers x gradient, by sample: the channel itself, and what its co-channels cannot predict."""

    def __init__(self, *args: Any, known: Reconstruction) -> None:
        super().__init__(*args)
        self.known = known
        self.anchor = torch.zeros((), requires_grad=True)
        self.scale = 1.0
        self.seen: set[ParamAxis] = set()
        self.products: dict[ParamAxis, Tensor] = {}
        self.rests: dict[ParamAxis, Tensor] = {}

    def _reads(
        self, axis: ParamAxis, source: Tensor, call: Callable[[Tensor], Tensor], dim: int, bias: Tensor | None
    ) -> Tensor:
        self.seen.add(axis)
        if source.dtype is torch.float16:  # gradients of a mean over many samples would be rounded to zero
            self.scale = HALF_SCALE * self.samples
        sent: list[Tensor] = []  # the gradient at the output arrives first
        if self.anchor.device != source.device or self.anchor.dtype != source.dtype:
            anchor = self.anchor.to(source)
        else:
            anchor = self.anchor
        out = call(_Tap.apply(source, anchor, partial(self._arrived, axis, dim, sent)))  # type: ignore[no-untyped-call]
        if axis in self.known and self.known[axis].offset is not None:
            out.register_hook(lambda gradient: sent.append(_rows(gradient.float(), dim, self.samples).sum(-1)))
        return out

    def _arrived(self, axis: ParamAxis, dim: int, sent: list[Tensor], source: Tensor, gradient: Tensor) -> None:
        """Adds both products. `sent`: the gradient at the output, summed over positions, (n, o)."""
        x = _rows(source.detach().float(), dim, self.samples)
        g = _rows(gradient.float(), dim, self.samples)
        product = (x * g).sum(-1) * (self.samples / self.scale)
        rest = product
        if axis in self.known:
            rest = product.clone()
            rest[:, self.positions[axis]] = self._rest(axis, x, g, sent) * (self.samples / self.scale)
        for found, more in ((self.products, product), (self.rests, rest)):
            found[axis] = found[axis] + more if axis in found else more

    def _rest(self, axis: ParamAxis, x: Tensor, g: Tensor, sent: list[Tensor]) -> Tensor:
        """What is left of every channel x gradient, (n, c, k); an offset takes its constant part."""
        known, index = self.known[axis], self.positions[axis]
        mix = leftover(known.inverse)
        left = mix.float() @ _by_co_channel(x, index)
        rest: Tensor = (left * _by_co_channel(g, index)).unflatten(-1, (index.size(1), -1)).sum(-1)
        if known.offset is None:
            return rest
        window = slices(self.weights[axis].detach().float(), axis).sum(-1)[:, index]
        constant = (mix @ known.mean.double()).float()
        return rest - torch.einsum("no,ock,c->nck", sent[0], window, constant)

    def look_back(self, loss: Tensor) -> None:
        """Runs backward to the taps. Raises ProbeError for weights that took part in the loss unseen."""
        unseen = {a: w for a, w in self.weights.items() if a not in self.seen and w.requires_grad}
        if not loss.requires_grad:
            return
        scaled = loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.scale
        _, *found = torch.autograd.grad(scaled, [self.anchor, *unseen.values()], allow_unused=True)
        missed = [axis for axis, gradient in zip(unseen, found, strict=True) if gradient is not None]
        if missed:  # what they read would seem worthless
            raise ProbeError(
                f"the probe cannot see what is read through {missed[0]}: call F.linear or F.conv2d with the parameter "
                "itself, not x @ w and not with a weight computed from it; for that use torch.nn.utils.parametrize"
            )


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _rows(tensor: Tensor, dim: int, samples: int) -> Tensor:
    """A tensor with channels in `dim` as (n, c, p); windows folded into the batch are unfolded."""
    return tensor.movedim(dim, -1).reshape(samples, -1, tensor.size(dim)).transpose(1, 2)


def _by_co_channel(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (n, positions, p) as (n, c, k x p), by the index (c, k)."""
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
