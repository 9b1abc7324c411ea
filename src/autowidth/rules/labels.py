"""Label tensors: which channel stands at which position of a tensor, and small functions on them.

A *label tensor* (variables named `label`) belongs to a tensor of the user's network, has its shape, and holds an int64
id for every position: that of a param slot (parameter, dim, index), that of a frozen mark, or NEUTRAL. It varies along
the dims in which channels lie and has stride 0 along all others, so that it costs next to no memory.

A tensor carries several (`Labels`): a weight one per dim, an activation, as a rule, one in all. For an image of shape
(2, 4, 8, 8) whose four channels have the ids 10 to 13:

>>> label = spread(torch.arange(10, 14), (2, 4, 8, 8), 1)
>>> label.shape, label.stride(), sorted(lies_along(label))
(torch.Size([2, 4, 8, 8]), (0, 1, 0, 0), [1])
>>> label[0, :, 3, 3].tolist(), tuple(shrunk(label).shape)
([10, 11, 12, 13], (1, 4, 1, 1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

NEUTRAL = -1
"""The id of a position that has no channel identity."""
NOBODY = torch.tensor(NEUTRAL)
Labels = tuple[Tensor, ...]
"""The label tensors of one tensor."""


def spread(ids: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The label tensor of this shape that lays `ids` (n,) along `dim` and is constant elsewhere."""
    view = [1] * len(shape)
    view[dim] = len(ids)
    return ids.view(view).expand(tuple(shape))


def lies_along(label: Tensor) -> frozenset[int]:
    """The dims in which a label tensor varies."""
    return frozenset(d for d in range(label.dim()) if label.size(d) > 1 and label.stride(d) != 0)


def shrunk(label: Tensor) -> Tensor:
    """The label tensor with size 1 in every dim in which it does not vary: same ids, next to no elements."""
    for d in range(label.dim()):
        if label.size(d) > 1 and label.stride(d) == 0:
            label = label.narrow(d, 0, 1)
    return label


def tidy(label: Tensor) -> Tensor | None:
    """The label tensor with stride 0 wherever its values are constant, or None if no position has an identity."""
    small = shrunk(label)
    for d in range(small.dim()):
        if small.size(d) > 1 and bool((small == small.narrow(d, 0, 1)).all()):
            small = small.narrow(d, 0, 1)
    if small.numel() == 0 or bool((small == NEUTRAL).all()):
        return None
    if small.untyped_storage().nbytes() > 2 * small.numel() * small.element_size():
        small = small.clone()  # a view would keep alive all that was laid out on the way
    return small.expand(label.shape)


def moved(labels: Iterable[Tensor], how: Callable[[Tensor], Tensor]) -> Labels:
    """What `how` makes of each label tensor, tidied; those without an identity are left out."""
    return tuple(clean for label in labels if (clean := tidy(how(label))) is not None)


def overlay(vectors: Sequence[Tensor]) -> Tensor:
    """The first id that is not neutral, position by position."""
    top = vectors[0]
    for other in vectors[1:]:
        top = torch.where(top == NEUTRAL, other, top)
    return top
