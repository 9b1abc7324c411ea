"""Follow channel labels through eager forward passes: the channel map, frozen axes with reasons."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from autowidth.channels import ChannelGroup, ChannelMap, FrozenAxis, IndexMap, ParamAxis, Place, ResizePlan, Role
from autowidth.rules import Call, Dyes, Ledger, outputs, rule_for, spread
from autowidth.surgery import apply_

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class TraceError(ValueError):
    """The model cannot be traced with these example inputs."""


def trace(model: nn.Module, example_inputs: Inputs, *, rehearse: bool = True) -> ChannelMap:
    """Returns the channel map of a model: which channels live where, what is frozen and why.

    Runs scratch copies of the model, never the model itself: first without data (meta tensors), and with the data
    where the forward pass needs values. Training and evaluation mode are both followed, and what they say is united.
    `example_inputs` is what the model is called with: a tensor, a tuple of arguments, or a mapping of keyword
    arguments. Only the branch of the code that these inputs take is seen. With `rehearse`, every channel group is
    resized for trial on a scratch copy, and frozen if the network does not survive it.

    Raises TraceError if the model cannot be run on the inputs, or returns tensors that cannot be found.
    """
    args, kwargs = _arguments(model, example_inputs)
    with _undisturbed(model):
        studio, channel_map = _looked(model, args, kwargs)
        return _rehearsed(studio, channel_map) if rehearse else channel_map


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Keeps the caller's inference mode and autocast and the garbage collector out; puts random states back."""
    states = random.getstate(), np.random.get_state()
    homes = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    devices = [home.index for home in homes if home.type == "cuda"]
    collecting = gc.isenabled()
    gc.disable()  # a map is millions of small tuples without cycles: looking through them again and again costs a third
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))  # dropout and trial insertions draw from it
            stack.enter_context(torch.inference_mode(False))  # there ops arrive whole that have no rules
            for kind in {home.type for home in homes} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))  # its cached weights carry no labels
            yield
    finally:
        if collecting:
            gc.enable()
        random.setstate(states[0])
        np.random.set_state(states[1])


# ---- scratch copies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Studio:
    """A scratch copy of the model with inputs that fit it, and the modes (training or not) to look at."""

    make: Callable[[], nn.Module]
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: tuple[bool, ...] = (False, True)
    notes: tuple[str, ...] = ()

    def look(self, model: nn.Module) -> ChannelMap:
        """The channel map of this copy, without rehearsal. Raises what the forward pass raises."""
        dyer = _Dyer(model, self.args, self.kwargs)
        for training in self.modes:
            dyer.follow(model.train(training), self.args, self.kwargs)
        return replace(_read_off(dyer.ledger, _shapes(model)), notes=self.notes)

    def first_look(self) -> tuple[_Studio, ChannelMap] | Exception:
        """The map, and this studio with the modes that work. The error of evaluation mode if none does."""
        dyer = _Dyer(self.model, self.args, self.kwargs)
        failures: dict[bool, Exception] = {}
        for training in self.modes:
            try:
                dyer.follow(self.model.train(training), self.args, self.kwargs)
            except TraceError:
                raise
            except Exception as error:
                failures[training] = error
        if len(failures) == len(self.modes):
            return failures[False]
        lost = [f"{'training' if t else 'evaluation'} mode was not followed: {_told(e)}" for t, e in failures.items()]
        modes = tuple(t for t in self.modes if t not in failures)
        modes = modes[:1] if dyer.modes_agree and not failures else modes  # the other one would show nothing new
        studio = replace(self, modes=modes, notes=(*self.notes, *lost))
        return studio, replace(_read_off(dyer.ledger, _shapes(self.model)), notes=studio.notes)

    def scratches(self) -> Iterator[nn.Module]:
        """Copies to spoil, as many as are asked for: first the one that has been looked at, then fresh ones."""
        yield self.model
        while True:
            yield self.make()


def _looked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Studio, ChannelMap]:
    """A first look at a scratch copy on the meta device if the forward pass needs no values, else at a real one."""
    on_meta = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
    make = partial(_meta_copy, model)
    found = _Studio(make, make(), *on_meta).first_look()
    if isinstance(found, Exception):
        note = "the forward pass depends on values: only the branch taken by the example inputs was followed"
        make = partial(_copied, model)
        found = _Studio(make, make(), args, kwargs, notes=(note,)).first_look()
    if isinstance(found, Exception):
        shapes = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs of shape {shapes}: {_told(found)}; "
            "pass inputs that the model accepts, on its device and of its dtype"
        ) from found
    return found


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device: shapes without memory."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. Raises TraceError where torch cannot make one."""
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({_told(error)}): where hooks compute weights, use "
            "torch.nn.utils.parametrizations (weight_norm, spectral_norm) instead, and keep no results as attributes"
        ) from error


def _arguments(model: nn.Module, example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors:
        raise TraceError("example_inputs hold no tensor: pass what the model is called with, such as one batch")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise TraceError(f"{type(model).__name__} has no parameters, so it has no channels to resize")
    for tensor in tensors:
        if tensor.device != weight.device:
            raise TraceError(
                f"example inputs are on {tensor.device}, the model is on {weight.device}: move them to {weight.device}"
            )
        if tensor.is_floating_point() and tensor.dtype != weight.dtype:
            raise TraceError(f"example inputs are {tensor.dtype}, the model is {weight.dtype}: convert the inputs")
    return args, kwargs


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def _told(error: BaseException | None) -> str:
    """An error in one line, with the line of the user's code where it arose."""
    if error is None:
        return ""
    text = " ".join(str(error).split()) or type(error).__name__
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    return f"{text[:200]}{_line(reversed(frames))}"


def _line(frames: Iterator[tuple[str, int]]) -> str:
    """` (file.py:12)` of the first frame that is neither torch nor autowidth, or nothing."""
    for filename, number in frames:
        if not filename.startswith(_OWN) and not filename.startswith("<"):
            return f" ({os.path.basename(filename)}:{number})"
    return ""


_OWN = (
    os.path.dirname(torch.__file__) + os.sep,  # not torchvision, which lies beside it
    *(os.path.join(os.path.dirname(__file__), f) for f in ("trace.py", "rules.py")),
)


# ---- the dye ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One op of the first pass: what was called on which tensors, and what came out."""

    signature: tuple[Any, ...]
    dyes: list[Dyes]
    serials: list[int]


class _Dyer(TorchDispatchMode):
    """Runs under the forward pass, below autograd, and lets every ATen op pass its labels on.

    A second pass, in the other mode, mostly repeats the first one: as long as it calls the same ops on the same
    tensors, the labels are taken from the script of the first.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.ledger = Ledger(batch=max(tensors[0].size(0), 1) if tensors[0].dim() else 1, where=_where)
        self._dyes: MutableMapping[Tensor, Dyes] = WeakIdKeyDictionary()
        self._serial: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._serials = itertools.count()
        self._script: list[_Step] = []
        self._repeats: Iterator[_Step] | None = None
        self.modes_agree = True
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            dims = [(d, n) for d, n in enumerate(tensor.shape) if n > 1 or d < 2]
            self._label(tensor, tuple(spread(self.ledger.slots(name, d, n), tensor.shape, d) for d, n in dims))
        for tensor in tensors:
            self._label(tensor, self.ledger.frozen_dyes(tensor.shape, "model input"))

    def follow(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One forward pass. Only the first one counts the uses of weights."""
        first, uses = not self._script, list(self.ledger.uses)
        self._repeats = None if first else iter(self._script)
        with torch.no_grad(), self:
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # a model may write into its inputs
            result = model(*args, **kwargs)
        for tensor in _found(result):
            self.ledger.freeze(self._dyes.get(tensor, ()), "model output")
        if not first:
            self.ledger.uses = uses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bound = _bound(func, args, kwargs or {})
        out = _shape_only(func, bound)
        if out is None:
            out = func(*args, **(kwargs or {}))
        call = Call(func, bound, out, self._dyes_of, self.ledger)
        tensors = list(call.tensors())
        if any(self._dyes_of(t) for t in tensors):
            step = self._step(call, tensors)
            for tensor, dyes, serial in zip(outputs(out), step.dyes, step.serials, strict=False):
                self._label(tensor, dyes, serial)
        return out

    def _step(self, call: Call, tensors: list[Tensor]) -> _Step:
        """What the call does to labels: from the script while it holds, else by its rule."""
        signature = (call.op, [self._serial.get(t, tuple(t.shape)) for t in tensors], _settings(call.args))
        if self._repeats is not None:
            step = next(self._repeats, None)
            if step is not None and step.signature == signature:
                return step
            self._repeats, self.modes_agree = iter(()), False
        dyes = rule_for(call.op)(call)
        step = _Step(signature, dyes, [next(self._serials) for _ in dyes])
        if self._repeats is None:
            self._script.append(step)
        return step

    def _label(self, tensor: Tensor, dyes: Dyes, serial: int | None = None) -> None:
        self._dyes[tensor] = dyes
        self._serial[tensor] = next(self._serials) if serial is None else serial

    def _dyes_of(self, tensor: Tensor) -> Dyes:
        return self._dyes.get(tensor, ())


def _where() -> str:
    """The line of the user's code that is being run."""
    frame = sys._getframe(1)
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return _line(iter(frames))


def _settings(args: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments that are no tensors, without those that tell training from evaluation."""
    modal = ("training", "train", "momentum", "eps", "cudnn_enabled")
    flat = {name: value for name, value in args.items() if name not in modal and not isinstance(value, Tensor)}
    return [(name, value) for name, value in flat.items() if not (isinstance(value, list) and _holds_tensor(value))]


def _holds_tensor(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values)


_UNARY = ("relu", "hardtanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "leaky_relu", "elu")
_SAME_SHAPE = {f"aten.{name}{tail}" for name in (*_UNARY, "add", "mul") for tail in ("", "_")}


def _shape_only(func: Any, bound: Mapping[str, Any]) -> Any:
    """The result of a common op on meta tensors; None for every other op.

    Torch has no quick way for these: on meta tensors it decomposes each into a dozen Python calls.
    """
    image = bound.get("input", bound.get("self"))
    if not isinstance(image, Tensor) or not image.is_meta:
        return None
    if func is torch.ops.aten.native_batch_norm.default:
        return torch.empty_like(image), image.new_empty(image.size(1)), image.new_empty(image.size(1))
    other = bound.get("other")
    name = str(func.overloadpacket)
    if name not in _SAME_SHAPE or not image.is_floating_point():
        return None
    if other is not None and not (
        isinstance(other, Tensor) and other.shape == image.shape and other.dtype == image.dtype
    ):
        return None
    return image if name.endswith("_") else torch.empty_like(image)


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op call by schema name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _found(result: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returned: nested tuples, lists, mappings and dataclasses."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _found(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf):
            yield from _found([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        elif leaf is not None and not isinstance(leaf, str | int | float | bool | torch.Size):
            raise TraceError(
                f"the model returns a {type(leaf).__name__}, whose tensors cannot be found: "
                "return tensors, tuples, lists, dicts or dataclasses"
            )


# ---- from labels to channel groups -----------------------------------------------------------------------------------


def _read_off(ledger: Ledger, shapes: dict[str, tuple[int, ...]]) -> ChannelMap:
    """Classes of united slots become channels; channels with the same places become channel groups."""
    classes = _classes(ledger)
    slots = _Slots.of(ledger, classes)
    reasons = {int(classes[i]): reason for i, reason in reversed(ledger.marks.items())}
    alike: dict[bytes, list[int]] = {}
    for channel, key in enumerate(slots.keys):
        alike.setdefault(key, []).append(channel)
    groups: list[tuple[Place, ...]] = []
    frozen: dict[tuple[ParamAxis, str], list[int]] = {}
    for members in alike.values():
        unfit = _unfit(ledger, slots.axes_of(members[0]))
        if unfit == _NO_CHANNEL:
            continue  # kernel windows, tokens and the like: nobody reads or writes channels there
        free = []
        for channel in members:
            reason = reasons.get(slots.label(channel)) or unfit
            if reason is None:
                free.append(channel)
            else:
                for axis, position in slots.places_of(channel):
                    frozen.setdefault((axis, reason), []).append(position)
        if free:
            groups.append(_group(ledger, slots, free))
    return ChannelMap(
        groups=_named(sorted(groups, key=lambda places: slots.rank[places[0].axis])),
        frozen=tuple(FrozenAxis(axis, tuple(index), reason) for (axis, reason), index in frozen.items()),
        uses=tuple(ledger.uses),
        shapes=shapes,
    )


@dataclass(frozen=True, slots=True)
class _Slots:
    """All slots sorted by class, then by the order in which their axes were met, then by position.

    first[i] to first[i + 1] are the slots of channel i; keys[i] says on which axes it has how many.
    """

    axes: tuple[ParamAxis, ...]
    rank: dict[ParamAxis, int]
    owner: np.ndarray
    position: np.ndarray
    classes: np.ndarray
    first: np.ndarray
    keys: list[bytes]

    @classmethod
    def of(cls, ledger: Ledger, classes: np.ndarray) -> _Slots:
        """Sorts the slots of a ledger whose ids have these classes."""
        met = {axis: i for i, axis in enumerate(ledger.roles)}
        axes = tuple(sorted(ledger.axes, key=lambda axis: met.get(axis, len(met))))
        rank = {axis: i for i, axis in enumerate(axes)}
        owner = np.repeat([rank[axis] for axis in ledger.axes], ledger.lengths)
        position = np.concatenate([np.arange(length) for length in ledger.lengths])
        ids = np.concatenate([np.arange(s, s + n) for s, n in zip(ledger.starts, ledger.lengths, strict=True)])
        order = np.lexsort((position, owner, classes[ids]))
        owner, position, of_slot = owner[order], position[order], classes[ids][order]
        first = np.flatnonzero(np.diff(of_slot, prepend=-1))
        bounds = [*first.tolist(), len(order)]
        raw = owner.tobytes()
        width = owner.itemsize
        keys = [raw[a * width : b * width] for a, b in itertools.pairwise(bounds)]
        return cls(axes, rank, owner, position, of_slot, np.array(bounds), keys)

    def label(self, channel: int) -> int:
        """The number of the channel's class."""
        return int(self.classes[self.first[channel]])

    def axes_of(self, channel: int) -> list[ParamAxis]:
        """The axes on which a channel lives, each as often as it has positions there."""
        return [self.axes[i] for i in self.owner[self.first[channel] : self.first[channel + 1]].tolist()]

    def places_of(self, channel: int) -> list[tuple[ParamAxis, int]]:
        """The axes and positions of a channel."""
        positions = self.position[self.first[channel] : self.first[channel + 1]].tolist()
        return list(zip(self.axes_of(channel), positions, strict=True))


def _classes(ledger: Ledger) -> np.ndarray:
    """For every id the number of its class: one class is one channel and every place where it lives."""
    if not ledger.edges:
        return np.arange(ledger.ids)
    a, b = (np.concatenate(side) for side in zip(*ledger.edges, strict=True))
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(ledger.ids, ledger.ids))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


_NO_CHANNEL = "no layer reads or writes channels here"


def _unfit(ledger: Ledger, axes: Sequence[ParamAxis]) -> str | None:
    """Why a class that met no frozen mark still cannot be resized."""
    roles = [ledger.roles.get(axis, set()) for axis in axes]
    if not any(roles):
        return _NO_CHANNEL
    if any({"read", "write"} <= role for role in roles):
        return "one axis both reads and writes channels"
    if not any("write" in role for role in roles):
        return "no layer writes these channels"
    if not any("read" in role for role in roles):
        return "no layer reads these channels"
    return None


def _group(ledger: Ledger, slots: _Slots, channels: list[int]) -> tuple[Place, ...]:
    """The places of one channel group; channels in the order in which the first layer writes them."""
    axes = slots.axes_of(channels[0])
    table = slots.position[slots.first[channels][:, None] + np.arange(len(axes))]
    writer = next(i for i, axis in enumerate(axes) if "write" in ledger.roles.get(axis, set()))
    table = table[np.argsort(table[:, writer], kind="stable")]
    columns = np.ascontiguousarray(table.T)
    places: list[Place] = []
    shared: dict[tuple[int, bytes], tuple[tuple[int, ...], ...]] = {}
    for axis, run in itertools.groupby(range(len(axes)), key=axes.__getitem__):
        roles = ledger.roles.get(axis, set())
        role: Role = "read" if "read" in roles else "write" if "write" in roles else "carry"
        part = columns[list(run)]
        key = (len(part), part.tobytes())  # a layer's weight, bias and norm have the same index: one object for all
        if key not in shared:
            shared[key] = tuple(zip(*part.tolist(), strict=True))
        places.append(Place(axis, role, shared[key]))
    return tuple(places)


def _named(groups: Sequence[tuple[Place, ...]]) -> tuple[ChannelGroup, ...]:
    """Names each group after the layer that first writes it; several groups of one layer are numbered."""
    used: dict[str, int] = {}
    named = []
    for places in groups:
        writer = next(place.axis.name for place in places if place.role == "write")
        name = writer.split(".parametrizations.")[0].removesuffix(".weight")
        used[name] = used.get(name, 0) + 1
        named.append(ChannelGroup(name if used[name] == 1 else f"{name}#{used[name]}", places))
    return tuple(named)


# ---- rehearsal -------------------------------------------------------------------------------------------------------


def _rehearsed(studio: _Studio, channel_map: ChannelMap) -> ChannelMap:
    """Freezes, with the reason, every channel group that does not survive a trial resize on a scratch copy."""
    groups = list(channel_map.groups)
    scratches = studio.scratches()
    unfit: dict[str, str] = {}
    while groups:
        found = _failing(studio, channel_map, groups, scratches)
        if not found:
            break
        unfit |= found
        groups = [group for group in groups if group.name not in unfit]
    frozen = [
        FrozenAxis(place.axis, tuple(p for row in place.index for p in row), unfit[group.name])
        for group in channel_map.groups
        if group.name in unfit
        for place in group.places
    ]
    return replace(channel_map, groups=tuple(groups), frozen=(*channel_map.frozen, *frozen))


def _failing(
    studio: _Studio, channel_map: ChannelMap, groups: list[ChannelGroup], scratches: Iterator[nn.Module]
) -> dict[str, str]:
    """Group name -> why it cannot be resized; empty if all these groups survive together.

    One trial does for all where nothing is wrong: every group loses a channel and gains others. Differing gains tell
    groups apart that only survive when they are resized alike; even differences, because `chunk` forgives one channel.
    What fails is halved until it is found; a single group is tried by removal and by insertion apart.
    """
    together = {g.name: _exchange(g, 1 + 2 * (i % 16)) for i, g in enumerate(groups)}
    removal = {g.name: IndexMap.removing([0], g.width) for g in groups if g.width > 2}
    trials = [("resizing", together)]
    if len(groups) == 1:  # three as well as one, for `chunk` into halves of n + 1 and n channels forgives one
        gains = [{g.name: IndexMap.identity(g.width).inserting(n) for g in groups} for n in (1, 3)]
        trials = [("removing", removal), *(("inserting", gain) for gain in gains)]
    results = ((act, *_trial(studio, channel_map, plan, scratches)) for act, plan in trials)
    act, broken, trouble = next((result for result in results if result[2]), ("", [], ""))
    if not trouble:
        return {}
    if broken or len(groups) == 1:
        return dict.fromkeys(broken or [groups[0].name], f"{act} a channel {trouble}")
    half = len(groups) // 2
    found: dict[str, str] = {}
    for part in (groups[:half], groups[half:]):
        found |= _failing(studio, channel_map, part, scratches)
    return found or {group.name: f"resized together with others, a channel {trouble}" for group in groups}


def _exchange(group: ChannelGroup, gain: int) -> IndexMap:
    """The first channel leaves, if there are others, and so many come that the group grows by `gain`."""
    leaving = 1 if group.width > 2 else 0
    return IndexMap.removing(range(leaving), group.width).inserting(gain + leaving)


def _trial(
    studio: _Studio, channel_map: ChannelMap, plan: ResizePlan, scratches: Iterator[nn.Module]
) -> tuple[list[str], str]:
    """Resizes a scratch copy and looks at it again. Returns (names of broken groups, what went wrong)."""
    if not plan:
        return [], ""
    scratch = next(scratches)
    try:
        expected = apply_(scratch, channel_map, plan)
        seen = {group.places for group in studio.look(scratch).groups}
    except Exception as error:
        return [], f"fails: {_told(error)}"
    moved = [group.name for group in expected.groups if group.name in plan and group.places not in seen]
    return moved, "changes which channels belong together" if moved else ""
