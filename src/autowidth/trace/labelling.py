"""Label tensors go through a forward pass: a dispatch mode lets the rule of every op pass them on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from autowidth.rules import Call, Labels, Ledger, outputs, rule_for, spread
from autowidth.trace.frames import running_line
from autowidth.trace.scratch import TraceError, tensors_in


@dataclass(frozen=True, slots=True)
class _Step:
    """One op of the first pass: what was called on which tensors, and what came out."""

    signature: tuple[Any, ...]
    labels: list[Labels]
    serials: list[int]


class Labeller(TorchDispatchMode):
    """Runs under the forward pass, below autograd, and lets every ATen op pass its labels on.

    A second pass, in the other mode, mostly repeats the first one: as long as it calls the same ops on the same
    tensors, the labels are taken from the script of the first. `modes_agree` says whether it did to the end.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = tensors_in((args, kwargs))
        self.ledger = Ledger(batch=max(tensors[0].size(0), 1) if tensors[0].dim() else 1, where=running_line)
        self._labels: MutableMapping[Tensor, Labels] = WeakIdKeyDictionary()
        self._serial: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._serials = itertools.count()
        self._script: list[_Step] = []
        self._repeats: Iterator[_Step] | None = None
        self.modes_agree = True
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            dims = [(d, n) for d, n in enumerate(tensor.shape) if n > 1 or d < 2]
            self._label(tensor, tuple(spread(self.ledger.slots(name, d, n), tensor.shape, d) for d, n in dims))
        for tensor in tensors:
            self._label(tensor, self.ledger.frozen_labels(tensor.shape, "model input"))

    def follow(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One forward pass. Only the first one counts the uses of weights."""
        first, uses = not self._script, list(self.ledger.uses)
        self._repeats = None if first else iter(self._script)
        with torch.no_grad(), self:
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # a model may write into its inputs
            result = model(*args, **kwargs)
        for tensor in _returned(result):
            self.ledger.freeze(self._labels.get(tensor, ()), "model output")
        if not first:
            self.ledger.uses = uses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bound = _bound(func, args, kwargs or {})
        out = _shape_only(func, bound)
        if out is None:
            out = func(*args, **(kwargs or {}))
        call = Call(func, bound, out, self._labels_of, self.ledger)
        tensors = list(call.tensors())
        if any(self._labels_of(t) for t in tensors):
            step = self._step(call, tensors)
            for tensor, labels, serial in zip(outputs(out), step.labels, step.serials, strict=False):
                self._label(tensor, labels, serial)
        return out

    def _step(self, call: Call, tensors: list[Tensor]) -> _Step:
        """What the call does to labels: from the script while it holds, else by its rule."""
        signature = (call.op, [self._serial.get(t, tuple(t.shape)) for t in tensors], _settings(call.args))
        if self._repeats is not None:
            step = next(self._repeats, None)
            if step is not None and step.signature == signature:
                return step
            self._repeats, self.modes_agree = iter(()), False
        labels = rule_for(call.op)(call)
        step = _Step(signature, labels, [next(self._serials) for _ in labels])
        if self._repeats is None:
            self._script.append(step)
        return step

    def _label(self, tensor: Tensor, labels: Labels, serial: int | None = None) -> None:
        self._labels[tensor] = labels
        self._serial[tensor] = next(self._serials) if serial is None else serial

    def _labels_of(self, tensor: Tensor) -> Labels:
        return self._labels.get(tensor, ())


# ---- op calls --------------------------------------------------------------------------------------------------------


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op call by schema name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


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


def _returned(result: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returned: nested tuples, lists, mappings and dataclasses."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _returned(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf):
            yield from _returned([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        elif leaf is not None and not isinstance(leaf, str | int | float | bool | torch.Size):
            raise TraceError(
                f"the model returns a {type(leaf).__name__}, whose tensors cannot be found: "
                "return tensors, tuples, lists, dicts or dataclasses"
            )
