"""The writes of surgery: new data for a tensor object, a new value for an attribute; each can be undone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autowidth.surgery.contents import select, strided, take
from autowidth.surgery.edits import Edits


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """New data for a tensor object. The old data is not kept but rebuilt from the new and the lost slices.

    A row a b c d with the source (3, 0, -1, 0) becomes d a * a, where * is fresh; b c are lost. To undo it: of the
    kept old positions 0 and 3 the first new ones are 1 and 0, which hold a d; with the lost ones behind them that is
    a d b c, the old positions 0 3 1 2; sorted by old position it is a b c d.

    With edits on two dims, the slices lost by the second are taken from what the first has left. They are put back in
    the reverse order.
    """

    target: Tensor
    new: Tensor
    edits: Edits
    lost: tuple[Tensor, ...]
    stride: tuple[int, ...]
    grad: Tensor | None

    @classmethod
    def of(cls, target: Tensor, new: Tensor, edits: Edits) -> TensorChange:
        """The change of `target` to the data `new`, which is what the edits make of it."""
        lost = []
        for place, edit in enumerate(edits):  # what the edits before this one removed is in their own slices
            earlier = [(other.dim, other.kept) for other in edits[:place]]
            lost.append(take(target.detach(), [*earlier, (edit.dim, edit.removed(target.shape[edit.dim]))]))
        grad = target.grad if target.is_leaf else None
        return cls(target=target, new=new, edits=edits, lost=tuple(lost), stride=target.stride(), grad=grad)

    def do(self) -> None:
        set_data(self.target, self.new)

    def undo(self) -> None:
        old = self.new
        for edit in self.edits:  # each kept position once, in the old order
            old = select(old, edit.dim, edit.first())
        for edit, lost in zip(reversed(self.edits), reversed(self.lost), strict=True):
            length = old.shape[edit.dim] + lost.shape[edit.dim]
            order = np.argsort(np.concatenate([edit.kept, edit.removed(length)]))
            old = select(torch.cat([old, lost], dim=edit.dim), edit.dim, order)
        set_data(self.target, strided(old, self.stride))
        if self.target.is_leaf:
            self.target.grad = self.grad


@dataclass(frozen=True, slots=True)
class ShapeChange:
    """A new shape for a meta tensor, which has no content: what tracing rehearses on."""

    target: Tensor
    old: Tensor
    new: Tensor

    def do(self) -> None:
        set_data(self.target, self.new)

    def undo(self) -> None:
        set_data(self.target, self.old)


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """A new value for an attribute of a module."""

    module: nn.Module
    name: str
    old: object
    new: object

    def do(self) -> None:
        setattr(self.module, self.name, self.new)

    def undo(self) -> None:
        setattr(self.module, self.name, self.old)


def set_data(target: Tensor, data: Tensor) -> None:
    """Gives the tensor object other data and drops its gradient."""
    # The stop at another dtype makes autograd forget the gradient accumulator, which remembers the old shape.
    other = torch.float32 if target.dtype is torch.float16 else torch.float16
    target.data = torch.empty(0, dtype=other, device=data.device)
    target.data = data
    if target.is_leaf:
        target.grad = None
