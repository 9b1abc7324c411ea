"""Apply a plan to parameters, buffers, optimizer state, module attributes: all or nothing."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from autowidth.channels import ChannelMap, ParamAxis, ResizePlan, Role

Fill = Literal["zero", "one", "mean", "normal", "weight"]
"""What a fresh position holds: 0, 1, the mean of its surviving siblings along the axis, a normal draw with the
standard deviation of the surviving elements, or (optimizer state only) what the parameter itself holds there."""


@dataclass(frozen=True, slots=True)
class _State:
    """One key of an optimizer's state: how fresh entries are filled, which dim of the parameter it holds averaged."""

    fill: Fill
    collapsed: int | None = None


# First moments start at rest: a newborn has no past direction. RMSprop's grad_avg is one too: the centred second
# moment `square_avg - grad_avg^2` then stays positive. Rprop's prev = 0 means "no sign seen yet".
_REST = _State("zero")
# Second moments, their running maxima and step sizes divide or scale the update. At a high step count a zero would make
# the first update explode (bias correction is long over), or freeze it (Rprop, Adadelta): take what the siblings have.
_SCALE = _State("mean")
# An average of past weights: of a newborn the only weight there has ever been is the one it is born with.
_AVERAGE = _State("weight")
# Counters and products of constants, the same for all channels.
_COUNTER = None

_ADAM: dict[str, _State | None] = {"step": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE, "max_exp_avg_sq": _SCALE}

OPTIMIZER_STATE: dict[type[Optimizer], dict[str, _State | None]] = {
    torch.optim.SGD: {"momentum_buffer": _REST},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: {"step": _COUNTER, "mu_product": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE},
    torch.optim.RAdam: {"step": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE},
    torch.optim.SparseAdam: {"step": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE},
    torch.optim.Adamax: {"step": _COUNTER, "exp_avg": _REST, "exp_inf": _SCALE},
    torch.optim.Adadelta: {"step": _COUNTER, "square_avg": _SCALE, "acc_delta": _SCALE},
    torch.optim.Adagrad: {"step": _COUNTER, "sum": _SCALE},
    torch.optim.RMSprop: {"step": _COUNTER, "square_avg": _SCALE, "momentum_buffer": _REST, "grad_avg": _REST},
    torch.optim.Rprop: {"step": _COUNTER, "prev": _REST, "step_size": _SCALE},
    torch.optim.ASGD: {"step": _COUNTER, "eta": _COUNTER, "mu": _COUNTER, "ax": _AVERAGE},
    # row_var and col_var are means over the last and the last but one dim: along that dim there is nothing to move.
    torch.optim.Adafactor: {
        "step": _COUNTER,
        "variance": _SCALE,
        "row_var": _State("mean", collapsed=-1),
        "col_var": _State("mean", collapsed=-2),
    },
}
"""Exact optimizer class -> state key -> what to do with it; None: not per channel, stays."""
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZER_STATE[torch.optim.Muon] = {"momentum_buffer": _REST}


class UnsupportedOptimizerError(TypeError):
    """An optimizer whose state nobody has told us how to resize."""


class StaleMapError(ValueError):
    """A model, follower or optimizer state that does not have the names or shapes of the channel map."""


def apply_(
    model: nn.Module,
    channel_map: ChannelMap,
    plan: ResizePlan,
    *,
    optimizers: Sequence[Optimizer] = (),
    followers: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> ChannelMap:
    """Resizes the live model, its optimizers and its followers, and returns the channel map of the result.

    Parameters, buffers and state tensors stay the same Python objects and keep dtype, device, requires_grad and memory
    format; only their data changes shape. Gradients of resized parameters become None. A fresh channel has weights
    drawn with the standard deviation of the surviving ones (`generator`, or torch's default one) and zero fan-out, so
    that in eval mode the function of the network is unchanged unless a norm averages over channels. `followers` are
    copies with the same names (`AveragedModel`: its `.module`), which get the same fresh content.

    A failure at any point leaves everything as it was, bit for bit, random state included, and is raised again. Memory
    beyond the old and the new model: one tensor, and the removed slices until the end.

    A plan without effect warns (UserWarning) and returns `channel_map`. Raises UnknownGroupError or ValueError where
    the plan does not fit the map, StaleMapError where the map does not fit the model, a follower or an optimizer state,
    ValueError for an optimizer without a resized parameter, for a DistributedDataParallel wrapper, for tensors that
    share memory and for a conv or norm group that is torn apart, UnsupportedOptimizerError for an optimizer outside
    `OPTIMIZER_STATE`.
    """
    gathers, resized = channel_map.gathers_and_resized(plan)
    if not gathers:
        warnings.warn(
            "the resize plan changes nothing: give at least one channel group an index map that is not the identity",
            stacklevel=2,
        )
        return channel_map
    edits = _edits(channel_map, plan, gathers)
    patient = _patient(model, channel_map, edits, tuple(dict.fromkeys(optimizers)), tuple(dict.fromkeys(followers)))
    with torch.no_grad(), _all_or_nothing(generator or torch.default_generator) as journal:
        for name, axis_edits in edits.items():
            _move(patient, name, axis_edits, generator, journal)
        for module in patient.modules:
            for attribute, value in _attributes(module).items():
                if getattr(module, attribute) != value:
                    _perform(_AttributeChange(module, attribute, getattr(module, attribute), value), journal)
    return resized


# ------------------------------------------------------------------------------------------------ what is to be done


@dataclass(frozen=True, slots=True)
class _Edit:
    """What happens to one axis of one tensor. `source` holds the old position per new one, or -1, int64."""

    dim: int
    source: np.ndarray
    role: Role

    @property
    def kept(self) -> np.ndarray:
        """Old positions that survive, each once, rising."""
        return np.unique(self.source[self.source >= 0])

    @property
    def fresh(self) -> np.ndarray:
        """New positions without an old one."""
        return np.flatnonzero(self.source < 0)

    def removed(self, length: int) -> np.ndarray:
        """Old positions that do not survive."""
        return np.setdiff1d(np.arange(length), self.kept)

    def first(self) -> np.ndarray:
        """For each kept old position the first new one that holds it."""
        values, first = np.unique(self.source, return_index=True)
        return first[values >= 0]


_Edits: TypeAlias = tuple[_Edit, ...]


def _edits(channel_map: ChannelMap, plan: ResizePlan, gathers: Mapping[ParamAxis, np.ndarray]) -> dict[str, _Edits]:
    """Tensor name -> the edits of its axes, by dim."""
    roles: dict[ParamAxis, set[Role]] = {}
    for name in plan:
        for place in channel_map.group(name).places:
            roles.setdefault(place.axis, set()).add(place.role)
    edits: dict[str, list[_Edit]] = {}
    for axis in sorted(gathers):
        # An axis that is read in one place and written in another gets the zeros that keep the function unchanged.
        role = next(role for role in ("read", "write", "carry") if role in roles[axis])
        edits.setdefault(axis.name, []).append(_Edit(axis.dim, gathers[axis].astype(np.int64), role))
    return {name: tuple(found) for name, found in edits.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Patient:
    """Everything that one surgery touches, found and checked before the first write."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    copies: tuple[Mapping[str, Tensor], ...]
    optimizers: tuple[Optimizer, ...]
    modules: tuple[nn.Module, ...]


def _patient(
    model: nn.Module,
    channel_map: ChannelMap,
    edits: Mapping[str, _Edits],
    optimizers: tuple[Optimizer, ...],
    followers: tuple[nn.Module, ...],
) -> _Patient:
    """Finds what the edits touch. Raises as `apply_` says."""
    bodies = [model, *(f.module if isinstance(f, AveragedModel) else f for f in followers)]
    found: list[dict[str, Tensor]] = []
    taken: set[int] = set()
    for place, body in enumerate(bodies):
        where = "the model" if place == 0 else f"follower {place - 1} ({type(followers[place - 1]).__name__})"
        tensors = _checked_tensors(body, where, channel_map, edits)
        if not taken.isdisjoint(map(id, tensors.values())):
            raise ValueError(f"{where} holds the very parameters of the model or of another follower: pass copies only")
        taken.update(map(id, tensors.values()))
        found.append(tensors)
    for optimizer in optimizers:
        _check_optimizer(optimizer, found[0], edits)
    modules = tuple(m for body in bodies for m in body.modules() if _owned_weights(m, taken))
    for module in modules:
        _check_groups(module, found, edits)
    return _Patient(model=model, tensors=found[0], copies=tuple(found[1:]), optimizers=optimizers, modules=modules)


# ------------------------------------------------------------------------------------------- checks before all writes


def _checked_tensors(
    body: nn.Module, where: str, channel_map: ChannelMap, edits: Mapping[str, _Edits]
) -> dict[str, Tensor]:
    """The tensors of `body` that the edits touch, by name. Raises StaleMapError or ValueError."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in body.modules()):
        raise ValueError(f"{where} is wrapped in DistributedDataParallel: resize its .module, then wrap it again")
    everything: dict[str, Tensor] = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    tensors = {}
    for name in edits:
        tensor = everything.get(name)
        if tensor is None:
            close = ", ".join(difflib.get_close_matches(name, everything, n=3)) or "none"
            raise StaleMapError(f"{where} has no parameter or buffer {name!r}; close names: {close}; trace it again")
        if tuple(tensor.shape) != channel_map.shapes[name]:
            raise StaleMapError(
                f"{name!r} of {where} has shape {tuple(tensor.shape)}, but the channel map was made for "
                f"{channel_map.shapes[name]}: trace the network again"
            )
        if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
            raise ValueError(
                f"{name!r} of {where} is a {type(tensor.data).__name__} with layout {tensor.layout}, and only plain "
                "dense tensors can be resized: resize before it is sharded or converted"
            )
        tensors[name] = tensor
    _check_memory(everything, tensors, where)
    return tensors


def _check_memory(everything: Mapping[str, Tensor], touched: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError where a touched tensor has the memory of another one: resizing would untie them unseen."""
    owners: dict[int, str] = {}
    for name, tensor in everything.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
            continue
        other = owners.setdefault(tensor.data_ptr(), name)
        if other != name and not touched.keys().isdisjoint((name, other)):
            raise ValueError(
                f"{other!r} and {name!r} of {where} share memory but are two objects, and a resize would untie them: "
                "tie them by assigning the same nn.Parameter to both"
            )


def _check_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], edits: Mapping[str, _Edits]) -> None:
    """Raises UnsupportedOptimizerError, StaleMapError or ValueError."""
    kind = type(optimizer).__name__
    table = OPTIMIZER_STATE.get(type(optimizer))
    if table is None:
        known = ", ".join(sorted(c.__name__ for c in OPTIMIZER_STATE))
        raise UnsupportedOptimizerError(
            f"the state of optimizer {type(optimizer).__module__}.{kind} cannot be resized, only that of exactly "
            f"{known}: use one of these (of a wrapper pass the inner optimizer), or enter the class with its state "
            "keys in autowidth.surgery.OPTIMIZER_STATE"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(id(tensors[name]) for name in edits):
        raise ValueError(
            f"optimizer {kind} holds none of the {len(edits)} tensors to be resized: pass the optimizer that trains "
            "this model, built from its own parameters"
        )
    for name in edits:
        for key, state, spec in _states(optimizer, tensors[name]):
            expected = list(tensors[name].shape)
            if spec.collapsed is not None:
                expected[spec.collapsed] = 1
            if list(state.shape) != expected:
                raise StaleMapError(
                    f"state {key!r} of {kind} for {name!r} has shape {tuple(state.shape)}, expected {tuple(expected)}: "
                    "rebuild the optimizer or load the state that belongs to this model"
                )


def _states(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, _State]]:
    """The state tensors of one parameter that are indexed by channel. Raises UnsupportedOptimizerError."""
    table = OPTIMIZER_STATE[type(optimizer)]
    if parameter not in optimizer.state:
        return
    for key, value in optimizer.state[parameter].items():
        if key not in table:
            raise UnsupportedOptimizerError(
                f"optimizer {type(optimizer).__name__} holds a state {key!r} that cannot be resized, known are "
                f"{', '.join(table)}: remove it from optimizer.state, or enter it in autowidth.surgery.OPTIMIZER_STATE"
            )
        spec = table[key]
        if spec is not None and isinstance(value, Tensor):
            yield key, value, spec


def _check_groups(module: nn.Module, found: Sequence[Mapping[str, Tensor]], edits: Mapping[str, _Edits]) -> None:
    """Raises ValueError where a conv or norm group would be torn apart."""
    if isinstance(module, _ConvNd):
        parts, what = module.groups, "conv"
    elif isinstance(module, nn.GroupNorm):
        parts, what = module.num_groups, "norm"
    else:
        return
    if parts == 1:
        return
    own = {id(tensor) for tensor in _own_tensors(module)}
    for name, axis_edits in edits.items():
        tensor = next((tensors[name] for tensors in found if id(tensors[name]) in own), None)
        for edit in () if tensor is None else axis_edits:
            assert tensor is not None
            # The bias of a transposed conv is longer or shorter than its weight's dim 0: each has blocks of its own.
            block = tensor.shape[0] // parts
            if edit.dim == 0 and not _whole_blocks(edit.source, block):
                raise ValueError(
                    f"the plan tears a {what} group of {module} apart along {name!r}: its {parts} groups of "
                    f"{block} channels can only be removed, inserted or moved as wholes"
                )


def _whole_blocks(source: np.ndarray, block: int) -> bool:
    """Whether each run of `block` new positions is one old run, in any order, or entirely fresh."""
    if len(source) % block:
        return False
    runs = np.sort(source.reshape(-1, block), axis=1)
    fresh = (runs < 0).all(axis=1)
    whole = (runs[:, :1] % block == 0) & (runs == runs[:, :1] + np.arange(block))
    return bool((fresh | ((runs[:, 0] >= 0) & whole.all(axis=1))).all())


# --------------------------------------------------------------------------------------------------------- all writes


def _move(
    patient: _Patient, name: str, edits: _Edits, generator: torch.Generator | None, journal: list[_Change]
) -> None:
    """Moves one parameter or buffer, its copies in the followers, its optimizer state."""
    target = patient.tensors[name]
    if target.is_meta and not patient.copies and not patient.optimizers:
        _perform(_ShapeChange(target, target.data, _resized_shape(target, edits)), journal)
        return
    new = _resized_content(target, edits, _fills(patient.model, name, target, edits), generator)
    _perform(_TensorChange.of(target, new, edits), journal)
    for copy in patient.copies:
        followed = _with_fresh_of(_gathered(copy[name].detach(), edits), new, edits)
        _perform(_TensorChange.of(copy[name], _formatted(followed, copy[name]), edits), journal)
    for optimizer in patient.optimizers:
        for _, state, spec in list(_states(optimizer, target)):
            collapsed = None if spec.collapsed is None else spec.collapsed % state.dim()
            moving = tuple(edit for edit in edits if edit.dim != collapsed)
            if spec.fill == "weight":
                content = _formatted(_with_fresh_of(_gathered(state.detach(), moving), new, moving), state)
            else:
                content = _resized_content(state, moving, (spec.fill,) * len(moving), generator)
            if moving:
                _perform(_TensorChange.of(state, content, moving), journal)


class _Change(Protocol):
    """One write, which can be undone."""

    def do(self) -> None: ...

    def undo(self) -> None: ...


def _perform(change: _Change, journal: list[_Change]) -> None:
    """Enters the change in the journal, then makes it: the only way in which surgery writes."""
    journal.append(change)
    change.do()


@contextmanager
def _all_or_nothing(generator: torch.Generator) -> Iterator[list[_Change]]:
    """A journal whose changes are undone, last first, when the block is left by an exception."""
    journal: list[_Change] = []
    random_state = generator.get_state()
    try:
        yield journal
    except BaseException:
        while journal:
            journal.pop().undo()
        generator.set_state(random_state)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _TensorChange:
    """New data for a tensor object. The old data is not kept but rebuilt from the new and the lost slices."""

    target: Tensor
    new: Tensor
    edits: _Edits
    lost: tuple[Tensor, ...]
    stride: tuple[int, ...]
    grad: Tensor | None

    @classmethod
    def of(cls, target: Tensor, new: Tensor, edits: _Edits) -> _TensorChange:
        lost = []
        for place, edit in enumerate(edits):  # what the edits before this one removed is in their own slices
            earlier = [(other.dim, other.kept) for other in edits[:place]]
            lost.append(_take(target.detach(), [*earlier, (edit.dim, edit.removed(target.shape[edit.dim]))]))
        grad = target.grad if target.is_leaf else None
        return cls(target=target, new=new, edits=edits, lost=tuple(lost), stride=target.stride(), grad=grad)

    def do(self) -> None:
        _set_data(self.target, self.new)

    def undo(self) -> None:
        old = self.new
        for edit in self.edits:
            old = _select(old, edit.dim, edit.first())
        for edit, lost in zip(reversed(self.edits), reversed(self.lost), strict=True):
            length = old.shape[edit.dim] + lost.shape[edit.dim]
            order = np.argsort(np.concatenate([edit.kept, edit.removed(length)]))
            old = _select(torch.cat([old, lost], dim=edit.dim), edit.dim, order)
        _set_data(self.target, _strided(old, self.stride))
        if self.target.is_leaf:
            self.target.grad = self.grad


@dataclass(frozen=True, slots=True)
class _ShapeChange:
    """A new shape for a meta tensor, which has no content: what tracing rehearses on."""

    target: Tensor
    old: Tensor
    new: Tensor

    def do(self) -> None:
        _set_data(self.target, self.new)

    def undo(self) -> None:
        _set_data(self.target, self.old)


@dataclass(frozen=True, slots=True)
class _AttributeChange:
    """A new value for an attribute of a module."""

    module: nn.Module
    name: str
    old: object
    new: object

    def do(self) -> None:
        setattr(self.module, self.name, self.new)

    def undo(self) -> None:
        setattr(self.module, self.name, self.old)


def _set_data(target: Tensor, data: Tensor) -> None:
    """Gives the tensor object other data and drops its gradient."""
    # The stop at another dtype makes autograd forget the gradient accumulator, which remembers the old shape.
    other = torch.float32 if target.dtype is torch.float16 else torch.float16
    target.data = torch.empty(0, dtype=other, device=data.device)
    target.data = data
    if target.is_leaf:
        target.grad = None


# ------------------------------------------------------------------------------------------------ contents of tensors


_BLOCK = 1 << 22
"""Elements above which no further copy of a tensor is made: it may be most of the network."""


def _select(tensor: Tensor, dim: int, positions: np.ndarray) -> Tensor:
    return tensor.index_select(dim, _index(positions, tensor))


def _take(tensor: Tensor, choices: Sequence[tuple[int, np.ndarray]]) -> Tensor:
    """A copy of the tensor with these positions of these dims, which rise; of a large one without copies in between."""
    dims = [dim for dim, _ in choices]
    adjacent = len(dims) > 1 and dims == list(range(dims[0], dims[0] + len(dims)))
    if tensor.numel() <= _BLOCK or not adjacent:
        for dim, positions in choices:
            tensor = _select(tensor, dim, positions)
        return tensor
    grid = np.ix_(*(positions for _, positions in choices))
    where = [_index(positions, tensor) for positions in grid]
    return tensor[(slice(None),) * dims[0] + tuple(where)]


def _index(positions: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.as_tensor(positions, dtype=torch.int64).to(tensor.device)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in a floating dtype of at least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _resized_content(tensor: Tensor, edits: _Edits, fills: Sequence[Fill], generator: torch.Generator | None) -> Tensor:
    """The tensor after the edits, fresh positions filled axis by axis; where two axes are fresh, zero wins."""
    old = tensor.detach()
    new = _gathered(old, edits, fills)
    for edit, fill in sorted(zip(edits, fills, strict=True), key=lambda pair: pair[1] == "zero"):
        if not edit.fresh.size or fill == "mean":
            continue
        fresh = _index(edit.fresh, new)
        if fill == "normal":
            shape = [*new.shape[: edit.dim], edit.fresh.size, *new.shape[edit.dim + 1 :]]
            new.index_copy_(edit.dim, fresh, (_draw(shape, new, generator) * _spread(old, edits)).to(new.dtype))
        else:
            new.index_fill_(edit.dim, fresh, 1.0 if fill == "one" else 0.0)
    return _formatted(new, tensor)


def _resized_shape(tensor: Tensor, edits: _Edits) -> Tensor:
    """An empty tensor of the shape after the edits."""
    shape = list(tensor.shape)
    for edit in edits:
        shape[edit.dim] = len(edit.source)
    return _formatted(tensor.detach().new_empty(shape), tensor)


def _gathered(tensor: Tensor, edits: _Edits, fills: Sequence[Fill] = ()) -> Tensor:
    """The tensor after the edits. With the fill "mean" fresh positions hold the mean of the survivors of their axis.

    Elsewhere they hold anything, for the caller to overwrite: a mean takes a copy of the survivors. Where no position
    of an axis survives, the mean is that of the old ones.
    """
    if "mean" not in fills:
        return _take(tensor, [(edit.dim, np.maximum(edit.source, 0)) for edit in edits])
    for edit, fill in zip(edits, fills, strict=True):
        moved = _select(tensor, edit.dim, np.maximum(edit.source, 0))
        if fill == "mean" and edit.fresh.size:
            siblings = edit.kept if edit.kept.size else np.arange(tensor.shape[edit.dim])
            mean = _wide(_select(tensor, edit.dim, siblings)).mean(edit.dim, keepdim=True).to(tensor.dtype)
            repeated = mean.expand([edit.fresh.size if d == edit.dim else n for d, n in enumerate(mean.shape)])
            moved.index_copy_(edit.dim, _index(edit.fresh, tensor), repeated.contiguous())
        tensor = moved
    return tensor


def _with_fresh_of(tensor: Tensor, donor: Tensor, edits: _Edits) -> Tensor:
    """The gathered tensor, which is changed, with the donor's content wherever a position is fresh."""
    for edit in edits:
        if edit.fresh.size:
            content = _select(donor, edit.dim, edit.fresh).to(tensor)
            tensor.index_copy_(edit.dim, _index(edit.fresh, tensor), content)
    return tensor


def _draw(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, drawn where the generator lives and moved: the same on every device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    home = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=home, dtype=dtype).to(like.device)


def _spread(old: Tensor, edits: _Edits) -> Tensor:
    """The standard deviation of the surviving elements, of all old ones if none survives; a scalar tensor."""
    lead, *others = edits
    if not all(edit.kept.size for edit in edits):
        return _wide(old).std(correction=0)
    blocks = np.array_split(lead.kept, min(lead.kept.size, 1 + old.numel() // _BLOCK))
    counts, means, variances = [], [], []
    for block in blocks:
        survivors = _select(old, lead.dim, block)
        for edit in others:
            survivors = _select(survivors, edit.dim, edit.kept)
        if len(blocks) == 1:
            return _wide(survivors).std(correction=0)
        variance, mean = torch.var_mean(_wide(survivors), correction=0)
        counts.append(survivors.numel())
        means.append(mean)
        variances.append(variance)
    mean, variance = torch.stack(means), torch.stack(variances)
    weights = torch.tensor(counts).to(mean) / sum(counts)
    return (weights * (variance + (mean - (weights * mean).sum()).square())).sum().sqrt()


def _formatted(new: Tensor, old: Tensor) -> Tensor:
    """The new tensor in the memory format of the old one."""
    shape = old.shape
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if old.is_contiguous() and old.stride() == torch.empty(shape, device="meta").stride():
        return new.contiguous()
    wanted = formats.get(old.dim())
    # Strides, not is_contiguous(): the latter holds for both formats where the kernel is 1 x 1 or one channel is read.
    if wanted is None or old.stride() != torch.empty(shape, device="meta", memory_format=wanted).stride():
        return new.contiguous()
    return torch.empty(new.shape, dtype=new.dtype, device=new.device, memory_format=wanted).copy_(new)


def _strided(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor with these strides; contiguous where elements would overlap (an expanded tensor)."""
    if any(step == 0 and n > 1 for step, n in zip(stride, tensor.shape, strict=True)):
        return tensor.contiguous()
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORM_FILLS: dict[str, Fill] = {"weight": "one", "bias": "zero", "running_mean": "zero", "running_var": "mean"}


def _fills(model: nn.Module, name: str, tensor: Tensor, edits: _Edits) -> tuple[Fill, ...]:
    """How the fresh positions of a parameter or buffer are filled, one entry per edit."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return tuple(_fill(owner, leaf, tensor, edit) for edit in edits)


def _fill(owner: nn.Module, leaf: str, tensor: Tensor, edit: _Edit) -> Fill:
    if edit.role == "read":
        return "zero"
    if isinstance(owner, _NORMS):
        return _NORM_FILLS.get(leaf, "mean")
    if leaf in owner._buffers:  # fixed by the user: a blur kernel that is the same in all channels stays the same
        return "mean"
    if isinstance(owner, (_ConvNd, nn.Linear)) and leaf in ("weight", "bias"):
        return "zero" if leaf == "bias" else "normal"
    # One number per channel: layer scale, PReLU slopes, the magnitudes of a weight norm.
    return "mean" if tensor.numel() == tensor.shape[edit.dim] else "normal"


# -------------------------------------------------------------------------------------------------- module attributes


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of the module itself, those behind its parametrizations included."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if is_parametrized(module):
        hidden = module.parametrizations
        assert isinstance(hidden, nn.Module)
        yield from hidden.parameters()
        yield from hidden.buffers()


def _owned_weights(module: nn.Module, touched: set[int]) -> bool:
    """Whether the module has attributes to keep right and a tensor that is touched."""
    return isinstance(module, tuple(_ATTRIBUTES)) and any(id(t) in touched for t in _own_tensors(module))


def _attributes(module: nn.Module) -> dict[str, object]:
    """The attributes that the module must have for the shape that its weight has now."""
    shape = _weight_shape(module)
    if shape is None:
        return {}
    return next(rule for kind, rule in _ATTRIBUTES.items() if isinstance(module, kind))(module, shape)


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight that the module works with; None where it has none of its own."""
    if is_parametrized(module, "weight"):
        with _at_rest(module.parametrizations):
            weight = module.weight
            assert isinstance(weight, Tensor)
            return tuple(weight.shape)
    own = {**module._parameters, **module._buffers}
    # weight_orig and weight_v: `torch.nn.utils.prune` and the old weight and spectral norms, computed in a pre-hook.
    names = ("weight", "weight_orig", "weight_v", "running_mean")
    return next((tuple(t.shape) for name in names if (t := own.get(name)) is not None), None)


@contextmanager
def _at_rest(parametrizations: Any) -> Iterator[None]:
    """Parametrizations in eval mode, for in training the spectral norm changes its buffers whenever one looks."""
    training = [module for module in parametrizations.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _scaled(module: nn.Module, parts: int, old: int, new: int) -> int:
    """The number of conv or norm groups after the width went from `old` to `new`. Raises ValueError for a part."""
    if parts == 1:
        return 1
    if parts * new % old:
        raise ValueError(f"{module} cannot have {new} channels: only whole groups of {old // parts} may come or go")
    return parts * new // old


def _conv_attributes(conv: Any, shape: tuple[int, ...]) -> dict[str, object]:
    lead, other = ("in_channels", "out_channels") if conv.transposed else ("out_channels", "in_channels")
    groups = _scaled(conv, conv.groups, getattr(conv, lead), shape[0])
    return {lead: shape[0], other: shape[1] * groups, "groups": groups}


def _group_norm_attributes(norm: Any, shape: tuple[int, ...]) -> dict[str, object]:
    groups = _scaled(norm, norm.num_groups, norm.num_channels, shape[0])
    return {"num_channels": shape[0], "num_groups": groups}


_ATTRIBUTES: dict[type[nn.Module], Callable[[Any, tuple[int, ...]], dict[str, object]]] = {
    _ConvNd: _conv_attributes,
    nn.Linear: lambda _, shape: {"out_features": shape[0], "in_features": shape[1]},
    _NormBase: lambda _, shape: {"num_features": shape[0]},
    nn.GroupNorm: _group_norm_attributes,
    nn.LayerNorm: lambda _, shape: {"normalized_shape": shape},
    nn.RMSNorm: lambda _, shape: {"normalized_shape": shape},
    nn.PReLU: lambda _, shape: {"num_parameters": shape[0]},
}
"""Module type -> from the module (old attributes) and the shape of its weight to the attributes it must have."""
