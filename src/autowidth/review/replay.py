"""Forward passes that differ in a few weights: what comes before the first of them is worked out once.

    with torch.no_grad(), Recording(weights) as recorded:
        loss(model, batch)                        # every call is noted: function, arguments, result
    for others in trials:
        with others in place of some weights, recorded.again(those weights):
            loss(model, batch)                    # calls on the same tensors return what they returned

A call is spared where function and arguments are those of the recorded call at its place: the same tensors, not merely
equal ones, none of which is among the changed. So whatever the changed weights touch is worked out anew, by itself, and
whatever a model does differently the second time too. It is right for calls that depend on their arguments alone;
random ones repeat what they drew. Arguments and results are held until the recording is dropped.

What is done in place would spoil what is held: `x += y` and `inplace=True` make new tensors while this lasts. A model
that reads the old name afterwards gets another loss by it: compare that of the recorded pass with a plain one. Other
writes count a tensor's version up, and what was written to is not returned again; those to the weights, running
statistics among them, are the caller's business. A function mode sees no calls inside scripted or compiled code, which
run as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autowidth.ranks import ALONE, Ranks
from autowidth.review.batches import Batches, Loss, means
from autowidth.review.state import named_tensors, swapped

WORTH_IT = 3
"""Trials for which a recording pays: it takes a pass of its own, and spares half of each."""

_NEW: dict[Any, Any] = {
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
}
"""What `x += y` and its like call, which writes into x, and what makes a new tensor of the same content."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What was called with which arguments, as leaves, what it returned, and how often that had been written to."""

    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    out: Any
    versions: tuple[int, ...]


_PLAIN = (int, float, complex, str, bytes, slice, torch.device)
"""What equals another of its kind without being the same object."""


def _same(a: object, b: object) -> bool:
    """The same object, or an equal one that is no tensor."""
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b))


class _Known:
    """The calls of a recorded pass. weights: the identities of tensors that are not told by their versions."""

    def __init__(self, weights: Collection[Tensor]) -> None:
        self.calls: list[_Call] = []
        self.weights = frozenset(map(id, weights))

    def versions(self, leaves: Iterable[Any], out: Any = None) -> tuple[int, ...]:
        """How often each tensor has been written to that is no weight."""
        tensors = (leaf for leaf in (*leaves, *tree_leaves(out)) if isinstance(leaf, Tensor))
        return tuple(tensor._version for tensor in tensors if id(tensor) not in self.weights)

    def found(self, place: int, func: Any, leaves: list[Any], changed: Collection[int]) -> _Call | None:
        """The call at this place, if this one is the same, on tensors that are as they were; None if not."""
        if place >= len(self.calls):
            return None
        call = self.calls[place]
        if func is not call.func or len(leaves) != len(call.leaves):
            return None
        same = all(_same(a, b) and id(a) not in changed for a, b in zip(leaves, call.leaves, strict=True))
        return call if same and self.versions(call.leaves, call.out) == call.versions else None


class Recording(TorchFunctionMode):
    """Notes the calls of a forward pass while it is entered. `weights`: all tensors that trials may change."""

    def __init__(self, weights: Collection[Tensor]) -> None:
        super().__init__()
        self.known = _Known(weights)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = _in_new_place(func, args, kwargs or {})
        leaves = tree_leaves((args, kwargs))
        before = self.known.versions(leaves)
        out = func(*args, **kwargs)
        if before == self.known.versions(leaves):
            call = _Call(func, tuple(leaves), out, self.known.versions(leaves, out))
        else:
            call = _Call(_never, (), None, ())  # what writes to its arguments has to be done every time
        self.known.calls.append(call)
        return out

    def again(self, changed: Collection[Tensor]) -> AbstractContextManager[object]:
        """A mode for the same pass with other content in these tensors."""
        return _Again(self.known, frozenset(map(id, changed)))


class _Again(TorchFunctionMode):
    """Returns what is known of calls that are the same."""

    def __init__(self, known: _Known, changed: frozenset[int]) -> None:
        super().__init__()
        self.known, self.changed, self.place = known, changed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = _in_new_place(func, args, kwargs or {})
        call = self.known.found(self.place, func, tree_leaves((args, kwargs)), self.changed)
        self.place += 1
        return func(*args, **kwargs) if call is None else call.out


def _never() -> None:
    """Nobody calls it."""


def _in_new_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same call, making a new tensor where it is known how; counters and the like are written to as ever."""
    if kwargs.get("inplace") is True:
        return func, {**kwargs, "inplace": False}
    if func in _NEW and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return _NEW[func], kwargs
    return func, kwargs


# ---- losses ----------------------------------------------------------------------------------------------------------


def mean_losses(
    model: nn.Module, batches: Batches, loss: Loss, others: Sequence[Mapping[str, Tensor]], ranks: Ranks = ALONE
) -> list[float]:
    """`mean_loss` with each of these contents of parameters and buffers, by name, in the place of the model's own.

    An empty one stands for the model as it is. The caller sets evaluation mode; no gradients.
    """
    return means(batches, lambda batch: _losses(model, batch, loss, others), len(others), ranks)


def _losses(model: nn.Module, batch: Any, loss: Loss, others: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """The losses of a batch, spared what all passes share."""
    named, plain = named_tensors(model), float(loss(model, batch))
    recorded = _recorded(model, batch, loss, plain) if sum(map(bool, others)) >= WORTH_IT else None
    found = []
    for other in others:
        spared = nullcontext() if recorded is None else recorded.again([named[name] for name in other])
        with swapped(model, other), spared:
            found.append(float(loss(model, batch)) if other else plain)
    return found


def _recorded(model: nn.Module, batch: Any, loss: Loss, plain: float) -> Recording | None:
    """The recorded pass of a batch; None for a model that does not bear it, and has another loss than the plain one."""
    recorded = Recording(named_tensors(model).values())
    with recorded:
        bears = math.isclose(plain, float(loss(model, batch)), rel_tol=1e-4)
    return recorded if bears else None
