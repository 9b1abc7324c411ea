"""The table of rules, which rule an op has, and what a rule is given: one call of the op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autowidth.rules.labels import Labels
from autowidth.rules.ledger import Ledger, merged


@dataclass(frozen=True)
class Call:
    """One op call: its bound arguments by schema name, its output(s), and the label tensors of every tensor."""

    op: Any
    args: dict[str, Any]
    out: Any
    labels_of: Callable[[Tensor], Labels]
    ledger: Ledger

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def name(self) -> str:
        return str(self.op.overloadpacket)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments, lists included."""
        for value in self.args.values():
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor):
                    yield item

    def along(self, name: str, dim: int) -> Tensor | None:
        """The ids of one argument along one dim (n,), or None where there are none."""
        tensor = self.args.get(name)
        return None if tensor is None else self.ledger.along(self.labels_of(tensor), dim)

    def merged(self) -> Labels:
        """The label tensors of all arguments, broadcast to the first output and united."""
        return merged(self.ledger, [self.labels_of(t) for t in self.tensors()], outputs(self.out)[0].shape)


Rule = Callable[[Call], list[Labels]]
"""What an op does to labels: from one call to the label tensors of each of its outputs."""
RULES: dict[str, Rule] = {}
"""Name of an op ("aten.mean") -> its rule."""
TAGGED: dict[torch.Tag, Rule] = {}
"""Torch's tag -> the rule of every op that bears it and has no rule of its own."""


def rule(*names: str, tag: torch.Tag | None = None) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of the ATen ops of these names ("convolution", "mean", ...).

    With a `tag` it is also the rule of all ops that torch has given this tag.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        if tag is not None:
            TAGGED[tag] = function
        return function

    return register


def rule_for(op: Any) -> Rule:
    """The rule of an op. Without one, everything that the op touches is frozen."""
    name = str(op.overloadpacket)
    for known in (name, name.removesuffix("_")):  # what an op does to labels in place it does out of place too
        if known in RULES:
            return RULES[known]
    twin = functional(op)
    for tag, function in TAGGED.items():
        if tag in op.tags or any(tag in getattr(twin, overload).tags for overload in twin.overloads()):
            return function
    return no_rule


def functional(op: Any) -> Any:
    """The op with all its overloads; of an in-place op the out-of-place twin, if there is one."""
    packet = op.overloadpacket
    return getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet) if op._schema.is_mutable else packet


def outputs(out: Any) -> list[Tensor]:
    """The tensors among an op's outputs, in order."""
    items = out if isinstance(out, list | tuple) else [out]
    return [item for item in items if isinstance(item, Tensor)]


def no_rule(call: Call) -> list[Labels]:
    """Freezes every channel that comes in, and every output: never guess."""
    return _frozen(call, f"{call.name} has no rule{call.ledger.where()}")


def frozen_by(call: Call, why: str) -> list[Labels]:
    """Freezes like `no_rule`, for a call that has a rule which does not cover this case."""
    return _frozen(call, f"{call.name}: {why}{call.ledger.where()}")


def _frozen(call: Call, reason: str) -> list[Labels]:
    for tensor in call.tensors():
        call.ledger.freeze(call.labels_of(tensor), reason)
    return [call.ledger.frozen_labels(out.shape, reason) for out in outputs(call.out)]
