"""Forward passes that differ in a few weights: what comes before the first of them is worked out once.

    with torch.no_grad(), Recording(weights, trials=[[a], [b, c]]) as recorded:
        loss(model, batch)                        # every call is noted: function, arguments, result
    with other content in b and c, recorded.again(1):
        loss(model, batch)                        # calls on the same tensors are not made again

A call is spared where function and arguments are those of the recorded call at its place: the same tensors, not merely
equal ones, none of which the trial changes. So whatever the changed weights touch is worked out anew, by itself, and
whatever a model does differently the second time too. It is right for calls that depend on their arguments alone;
random ones repeat what they drew.

What a spared call returns is held only where a call that some trial makes anew reads it: the last tensors before the
changes, and what goes around them. All else is dropped as the pass drops it, and where a trial passes it by, a tensor
of its form without its content stands for it. A pass that wants that content after all, because it went another way
than the recorded one, ends in LostError: work it out plainly.

What is done in place would spoil what is held: `x += y` and `inplace=True` make new tensors while this lasts. A model
that reads the old name afterwards gets another loss by it: compare that of the recorded pass with a plain one. Other
writes count a tensor's version up, and a pass with one of them `is_spoilt`: it cannot be taken up again. Those to the
weights, running statistics among them, are the caller's business. A function mode sees no calls inside scripted or
compiled code, which run as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

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


class LostError(LookupError):
    """A pass went another way than the recorded one, and wants what is no longer held."""


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A tensor that a recorded call made. trials: the bits of those in which it is another one."""

    trials: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> Tensor:
        """A tensor of this form, of a single element in memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


@dataclass(frozen=True, slots=True)
class _Call:
    """What was called with which arguments, as leaves, and what it returned, with `_Made` for what calls made."""

    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    out: Any


_PLAIN = (int, float, complex, str, bytes, slice, torch.device)
"""What equals another of its kind without being the same object."""


def _same(a: object, b: object) -> bool:
    """The same object, or an equal one that is no tensor."""
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b))


class Recording(TorchFunctionMode):
    """Notes the calls of a forward pass while it is entered.

    weights: all tensors whose writes do not count; trials: the weights that each of the later passes changes.
    """

    def __init__(self, weights: Collection[Tensor], trials: Sequence[Collection[Tensor]]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.held: dict[_Made, tuple[Tensor, int]] = {}
        self.is_spoilt = False
        self.changed = [frozenset(map(id, trial)) for trial in trials]
        self._weights = frozenset(map(id, weights))
        self._trials: dict[int, int] = {}
        for number, trial in enumerate(self.changed):
            for identity in trial:
                self._trials[identity] = self._trials.get(identity, 0) | 1 << number
        self._made: MutableMapping[Tensor, _Made] = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = _in_new_place(func, args, kwargs or {})
        leaves = tree_leaves((args, kwargs))
        before = self._versions(leaves)
        out = func(*args, **kwargs)
        self.is_spoilt |= before != self._versions(leaves)
        trials = self._touched(leaves)
        named = tuple(self._named(leaf) for leaf in leaves)
        self.calls.append(_Call(func, named, tree_map_only(Tensor, lambda t: self._entered(t, trials), out)))
        return out

    def again(self, trial: int) -> AbstractContextManager[object]:
        """A mode for the same pass with other content in the weights of this trial; it raises LostError."""
        return _Again(self, self.changed[trial])

    def _versions(self, leaves: Iterable[Any]) -> list[int]:
        """How often each tensor has been written to that is no weight."""
        return [t._version for t in leaves if isinstance(t, Tensor) and id(t) not in self._weights]

    def _touched(self, leaves: Sequence[Any]) -> int:
        """The bits of the trials that make a call of these arguments anew; what they read, and do not make, is held."""
        read = {made: t for t in leaves if isinstance(t, Tensor) and (made := self._made.get(t)) is not None}
        trials = 0
        for leaf in leaves:
            trials |= self._trials.get(id(leaf), 0)
        for made in read:
            trials |= made.trials
        for made, tensor in read.items():
            if trials & ~made.trials:
                self.held[made] = (tensor, tensor._version)
        return trials

    def _named(self, leaf: Any) -> Any:
        """What stands for an argument in a record."""
        made = self._made.get(leaf) if isinstance(leaf, Tensor) else None
        return leaf if made is None else made

    def _entered(self, tensor: Tensor, trials: int) -> Any:
        """What stands for a result; other kinds of tensors than the usual are held as they are."""
        if id(tensor) in self._weights or tensor in self._made:
            return self._named(tensor)
        made = _Made(trials, tensor.shape, tensor.dtype, tensor.device)
        self._made[tensor] = made
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            self.held[made] = (tensor, tensor._version)
        return made


class _Again(TorchFunctionMode):
    """Returns what is known of calls that are the same."""

    def __init__(self, recorded: Recording, changed: frozenset[int]) -> None:
        super().__init__()
        self.recorded, self.changed, self.place = recorded, changed, 0
        self.tensors = {made: tensor for made, (tensor, _) in recorded.held.items()}
        self.known = {id(tensor): made for made, tensor in self.tensors.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = _in_new_place(func, args, kwargs or {})
        leaves = tree_leaves((args, kwargs))
        call = self._found(func, leaves)
        self.place += 1
        if call is not None:
            return tree_map_only(_Made, self._tensor, call.out)
        if any(self._is_lost(leaf) for leaf in leaves):
            raise LostError(f"the pass calls {getattr(func, '__name__', func)} where the recorded one did not")
        return func(*args, **kwargs)

    def _found(self, func: Any, leaves: list[Any]) -> _Call | None:
        """The call at this place, if this one is the same; None if not."""
        if self.place >= len(self.recorded.calls):
            return None
        call = self.recorded.calls[self.place]
        if func != call.func or len(leaves) != len(call.leaves):  # what reads `x.shape` is another object each time
            return None
        return call if all(self._is(a, b) for a, b in zip(leaves, call.leaves, strict=True)) else None

    def _is(self, leaf: Any, recorded: Any) -> bool:
        """Whether an argument is the recorded one, as it was."""
        if isinstance(recorded, _Made):
            return self.known.get(id(leaf)) is recorded
        return _same(leaf, recorded) and id(leaf) not in self.changed

    def _tensor(self, made: _Made) -> Tensor:
        """The tensor that a recorded call returned, or what stands for it. Raises LostError where it was written to."""
        if made not in self.tensors:
            self.tensors[made] = made.stand_in()
            self.known[id(self.tensors[made])] = made
        tensor, version = self.recorded.held.get(made, (self.tensors[made], None))
        if version is not None and tensor._version != version:
            raise LostError("what was held has been written to")
        return tensor

    def _is_lost(self, leaf: Any) -> bool:
        """Whether this is a tensor without its content."""
        made = self.known.get(id(leaf)) if isinstance(leaf, Tensor) else None
        return made is not None and made not in self.recorded.held


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
    plain = float(loss(model, batch))
    recorded = _recorded(model, batch, loss, others, plain) if sum(map(bool, others)) >= WORTH_IT else None
    found = []
    for number, other in enumerate(others):
        with swapped(model, other):
            found.append(_again(model, batch, loss, recorded, number) if other else plain)
    return found


def _again(model: nn.Module, batch: Any, loss: Loss, recorded: Recording | None, trial: int) -> float:
    """The loss with what the model now holds, spared what was recorded where that goes."""
    if recorded is not None:
        try:
            with recorded.again(trial):
                return float(loss(model, batch))
        except LostError:
            pass
    return float(loss(model, batch))


def _recorded(
    model: nn.Module, batch: Any, loss: Loss, others: Sequence[Mapping[str, Tensor]], plain: float
) -> Recording | None:
    """The recorded pass of a batch; None for a model that does not bear it: that writes, or has another loss by it."""
    named = named_tensors(model)
    recorded = Recording(named.values(), [[named[name] for name in other] for other in others])
    with recorded:
        bears = math.isclose(plain, float(loss(model, batch)), rel_tol=1e-4)
    return recorded if bears and not recorded.is_spoilt else None
