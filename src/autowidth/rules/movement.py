"""Rules of data movement: the same op is run on the labels, so that shuffle, flatten, split and concat are exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autowidth.rules.labels import NOBODY, Labels, lies_along, moved, shrunk, spread, tidy
from autowidth.rules.ledger import joined
from autowidth.rules.registry import Call, frozen_by, functional, rule

# ---- one input, one output -------------------------------------------------------------------------------------------


@rule("permute", "transpose", "t", "slice", "select", "narrow", "expand", "squeeze", "unsqueeze", "squeeze_",
      "unsqueeze_", "flip", "roll", "repeat", "unfold", "alias", "detach", "detach_", "clone", "contiguous", "movedim",
      "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "rot90", "numpy_T",
      "repeat_interleave")  # fmt: skip
def move(call: Call) -> list[Labels]:
    """Data movement with one input and one output."""
    rest = {k: v for k, v in call.args.items() if k not in ("self", "memory_format")}
    op = functional(call.op)
    return [moved(call.labels_of(call["self"]), lambda label: op(label, **rest))]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def reshape(call: Call) -> list[Labels]:
    """Reshapes: labels are reshaped alike, so that flatten, shuffle and split of a dim are exact."""
    labels = call.labels_of(call["self"])
    after = [(lies_along(label), tidy(reshaped(label, call.out.shape))) for label in labels]
    return [_untangled(call, [(dims, label) for dims, label in after if label is not None])]


def reshaped(label: Tensor, shape: Sequence[int]) -> Tensor:
    """The label tensor in another shape; only those runs of dims in which it varies take memory."""
    if label.numel() == 0:
        return label.reshape(shape)
    lying, target = lies_along(label), list(shape)
    for before, after in _runs(label.shape, shape):
        if not lying & set(before):
            for d in before:
                label = label.narrow(d, 0, 1)
            for d in after:
                target[d] = 1
    return label.reshape(target).expand(tuple(shape))


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The shortest runs of dims that a reshape maps onto each other: equal products, nothing crosses.

    Flattening (2, 4, 3, 3) to (2, 36) maps dim 0 onto dim 0, and dims 1 to 3 onto dim 1:

    >>> [(list(before), list(after)) for before, after in _runs((2, 4, 3, 3), (2, 36))]
    [([0], [0]), ([1, 2, 3], [1]), ([], [])]
    """
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield range(first_i, i), range(first_j, j)
    yield range(i, len(old)), range(j, len(new))  # what is left has size 1


def _untangled(call: Call, after: list[tuple[frozenset[int], Tensor]]) -> Labels:
    """The label tensors after a reshape, where two that lay along different dims may have come to lie along one.

    `after` holds for each label tensor the dims along which it lay before, and itself after the reshape.

    A weight of shape (1, 2, 1, 3) with the channels 5, 6 along dim 1 and the window columns 7, 8, 9 along dim 3 is
    flattened to (1, 6). Now both lie along dim 1, the channels as 5 5 5 6 6 6, the columns as 7 8 9 7 8 9, and each
    position has an id of each. Those that most surely are channels (`Ledger.rank`) stay, the window is dropped. Where
    two kinds of channels are equally sure, which one a position belongs to cannot be said, and both are frozen.
    """
    tangled = [
        any(not (before & others) and lies_along(label) & lies_along(other) for others, other in after)
        for before, label in after
    ]
    if not any(tangled):
        return tuple(label for _, label in after)
    ranks = [call.ledger.rank(label) if knot else -1 for (_, label), knot in zip(after, tangled, strict=True)]
    best = [i for i, rank in enumerate(ranks) if rank == max(ranks)]
    if len(best) > 1 and max(ranks) > 0:
        reason = f"{call.name} folds channels of two kinds into one dim{call.ledger.where()}"
        call.ledger.freeze(tuple(after[i][1] for i in best), reason)
    return tuple(label for i, (_, label) in enumerate(after) if not tangled[i] or i in best)


@rule("as_strided", "as_strided_")
def restride(call: Call) -> list[Labels]:
    """Only a change of strides in dims of size 1 is understood (adaptive pooling under channels_last does it)."""
    source, size, labels = call["self"], list(call["size"]), call.labels_of(call["self"])
    if any(list(label.shape) != size for label in labels) or call.args.get("storage_offset") not in (None, 0):
        return frozen_by(call, "changes what is stored where")
    # In place the old strides are gone by now: pooling asks for those of a fresh tensor, and has a fresh one.
    old = [math.prod(size[d + 1 :]) for d in range(len(size))] if source is call.out else source.stride()
    if any(n > 1 and new != before for n, new, before in zip(size, call["stride"], old, strict=True)):
        return frozen_by(call, "changes what is stored where")
    return [labels]


@rule("constant_pad_nd")
def pad(call: Call) -> list[Labels]:
    """Zero padding: padded positions of a channel dim are frozen, padded pixels take their channel's label."""
    amounts, padded = list(call["pad"]), call.out.dim() - len(call["pad"]) // 2
    result = []
    for label in call.labels_of(call["self"]):
        touched = [d for d in lies_along(label) if d >= padded and any(_amount(amounts, call.out.dim(), d))]
        for d in range(label.dim()):
            if d in touched:
                before, after = _amount(amounts, call.out.dim(), d)
                edge = [0] * (2 * (label.dim() - d))
                edge[-2:] = before, after
                mark = int(call.ledger.mark(f"{call.name} fills this channel{call.ledger.where()}"))
                label = torch.nn.functional.pad(shrunk(label), edge, value=mark)
            elif label.size(d) != call.out.size(d):
                label = label.narrow(d, 0, 1)
        result.append(shrunk(label).expand(call.out.shape))
    return [tuple(result)]


def _amount(amounts: list[int], dims: int, d: int) -> tuple[int, int]:
    """The padding before and after dim d, from torch's last-dim-first list."""
    at = 2 * (dims - 1 - d)
    return (amounts[at], amounts[at + 1]) if at + 1 < len(amounts) else (0, 0)


# ---- some positions of a dim -----------------------------------------------------------------------------------------


@rule("index_select", "index")
def indexed(call: Call) -> list[Labels]:
    """Positions of one dim, chosen by an index: exact where it is a constant that is known here, else frozen."""
    places = [(d, i) for d, i in enumerate(call.args.get("indices", ())) if i is not None]
    dim, index = (call["dim"], call["index"]) if "index" in call.args else places[0]
    if len(places) > 1 or index.dim() != 1:
        return frozen_by(call, "several dims are indexed at once")
    dim, length = dim % max(call["self"].dim(), 1), call["self"].size(dim)
    known = not index.is_meta and not call.labels_of(index)
    if known:
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.cpu()
        index = torch.where(index < 0, index + length, index)
    reason = f"{call.name}: which channels are chosen is not known{call.ledger.where()}"
    result: list[Tensor] = []
    for label in call.labels_of(call["self"]):
        if dim not in lies_along(label):
            result.append(label.narrow(dim, 0, 1).expand(call.out.shape))
        elif known:
            chosen = shrunk(label).index_select(dim, index)
            result.extend(moved([chosen], lambda label: label.expand(call.out.shape)))
        else:
            call.ledger.freeze((label,), reason)
            result.append(spread(call.ledger.mark(reason, call.out.size(dim)), call.out.shape, dim))
    return [tuple(result)]


# ---- several outputs or inputs ---------------------------------------------------------------------------------------


@rule("split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes",
      "split_copy", "unbind_copy")  # fmt: skip
def move_apart(call: Call) -> list[Labels]:
    """Data movement with one input and a list of outputs."""
    rest = {k: v for k, v in call.args.items() if k != "self"}
    parts: list[list[Tensor]] = [[] for _ in call.out]
    for label in call.labels_of(call["self"]):
        for part, piece in zip(parts, call.op(label, **rest), strict=True):
            if (clean := tidy(piece)) is not None:
                part.append(clean)
    return [tuple(part) for part in parts]


@rule("cat", "concatenate", "stack")
def join(call: Call) -> list[Labels]:
    """Concatenation: the labels are concatenated, those that lie along the same dims with each other.

    Two images with the channels 0 1 2 and 3 4 along dim 1 have, concatenated along dim 1, the channels 0 1 2 3 4.
    Along dim 3, side by side, both must remain as many: channels 0 1 and 2 3 become 0 1, with 0 = 2 and 1 = 3 united.
    """
    dim = call.args.get("dim", 0) % call.out.dim()
    stacked = call.name == "aten.stack"
    tensors = [t for t in call["tensors"] if stacked or t.dim() == call.out.dim()]  # cat skips empty 1-D tensors
    new = set() if stacked else {dim}  # the dim along which the operands may differ
    result: list[Tensor] = []
    for dims, row in _matched(call, tensors, new).items():
        if not stacked and dims and not any(dim in lies_along(label) for label in row):
            across = [label.narrow(dim, 0, 1) for label in row if label.size(dim)]
            result.append(functools.reduce(functools.partial(joined, call.ledger), across).expand(call.out.shape))
            continue
        for d in set(range(row[0].dim())) - dims - new:  # nothing lies along these dims: one position says all
            row = [label.narrow(d, 0, 1) for label in row]
        whole = torch.stack(row, dim) if stacked else torch.cat(row, dim)
        result.extend(moved([whole], lambda label: label.expand(call.out.shape)))
    return [tuple(result)]


def _matched(call: Call, tensors: Sequence[Tensor], new: set[int]) -> dict[frozenset[int], list[Tensor]]:
    """Dims (those in `new` aside) -> for every operand the label tensor that lies along them, or a neutral one."""
    rows: dict[frozenset[int], list[Tensor]] = {}
    for i, tensor in enumerate(tensors):
        for label in call.labels_of(tensor):
            dims = lies_along(label) - new
            if dims not in rows:
                rows[dims] = [NOBODY.expand(t.shape) for t in tensors]
            row = rows[dims]
            row[i] = label if lies_along(row[i]) < lies_along(label) else joined(call.ledger, row[i], label)
    return rows
