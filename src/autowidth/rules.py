"""What each ATen op does to channel labels: one decorated function per kind of op.

A tensor carries *dyes*: int64 label tensors of its own shape. A label is the id of a param slot (parameter, dim,
index), the id of a frozen mark, or NEUTRAL. A dye lies along the dims in which it varies and has stride 0 along the
others, so that labels cost no memory. A weight carries one dye per dim; an activation, as a rule, one in all.

To add an op: write one function, decorate it with the op's names, add one row to the table in tests/test_rules.py.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autowidth.channels import ParamAxis, Role, WeightUse

NEUTRAL = -1
_NOBODY = torch.tensor(NEUTRAL)
_MANY = 10_000
Dyes = tuple[Tensor, ...]


# ---- dyes: small functions on label tensors -------------------------------------------------------------------------


def spread(vector: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The dye of this shape that lays `vector` (n,) along `dim` and is constant elsewhere."""
    view = [1] * len(shape)
    view[dim] = len(vector)
    return vector.view(view).expand(tuple(shape))


def lies_along(dye: Tensor) -> frozenset[int]:
    """The dims in which a dye varies."""
    return frozenset(d for d in range(dye.dim()) if dye.size(d) > 1 and dye.stride(d) != 0)


def shrunk(dye: Tensor) -> Tensor:
    """The dye with size 1 in every dim in which it does not vary: same labels, next to no elements."""
    for d in range(dye.dim()):
        if dye.size(d) > 1 and dye.stride(d) == 0:
            dye = dye.narrow(d, 0, 1)
    return dye


def tidy(dye: Tensor) -> Tensor | None:
    """The dye with stride 0 wherever its values are constant, or None if no position has an identity."""
    small = shrunk(dye)
    for d in range(small.dim()):
        if small.size(d) > 1 and bool((small == small.narrow(d, 0, 1)).all()):
            small = small.narrow(d, 0, 1)
    if small.numel() == 0 or bool((small == NEUTRAL).all()):
        return None
    if small.untyped_storage().nbytes() > 2 * small.numel() * small.element_size():
        small = small.clone()  # a view would keep alive all that was laid out on the way
    return small.expand(dye.shape)


# ---- the ledger ------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What a trace writes down: slots, which of them are one channel, roles, weights in use, frozen marks."""

    batch: int
    where: Callable[[], str] = str
    axes: list[ParamAxis] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    marks: dict[int, str] = field(default_factory=dict)
    edges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    roles: dict[ParamAxis, set[Role]] = field(default_factory=dict)
    uses: list[WeightUse] = field(default_factory=list)
    elements: dict[str, int] = field(default_factory=dict)
    ids: int = 0

    def slots(self, name: str, dim: int, length: int) -> Tensor:
        """New slot ids (length,) for one param axis."""
        self.axes.append(ParamAxis(name, dim))
        self.starts.append(self.ids)
        self.lengths.append(length)
        self.elements[name] = self.elements.get(name, 1) * length
        return self._take(length)

    def mark(self, reason: str, count: int = 1) -> Tensor:
        """New frozen marks (count,): whatever is united with them must not be resized."""
        marks = self._take(count)
        self.marks.update(dict.fromkeys(marks.tolist(), reason))
        return marks

    def _take(self, count: int) -> Tensor:
        taken = torch.arange(self.ids, self.ids + count)
        self.ids += count
        return taken

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Says that labels a and b (broadcast against each other) name the same channels."""
        if a is b:
            return
        a, b = torch.broadcast_tensors(a, b)
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (x != NEUTRAL) & (y != NEUTRAL)
        x, y = x[both], y[both]
        if len(x) > _MANY:  # the same pairs again and again, as where heads and tokens are folded into one dim
            x, y = np.divmod(np.unique(x * self.ids + y), self.ids)
        self.edges.append((x, y))

    def freeze(self, dyes: Dyes, reason: str) -> None:
        """Freezes every label in the dyes, and notes the reason and the line of the user's code."""
        for dye in dyes:
            labels = shrunk(dye).unique()
            self.unite(labels, self.mark(reason, len(labels)))  # a mark each: who is frozen is not thereby the same

    def frozen_dyes(self, shape: Sequence[int], reason: str) -> Dyes:
        """Dyes for a tensor that must not be resized in any dim but the first (the batch)."""
        dims = [d for d in range(1, len(shape)) if shape[d] > 0]
        return tuple(spread(self.mark(reason, shape[d]), shape, d) for d in dims)

    def axis_of(self, label: int) -> ParamAxis | None:
        """The param axis that a label belongs to; None for neutral labels and frozen marks."""
        if label == NEUTRAL or label in self.marks:
            return None
        return self.axes[bisect_right(self.starts, label) - 1]

    def play(self, vector: Tensor, role: Role) -> None:
        """Gives the axes of these slots a role."""
        slots = vector.numpy()[vector.numpy() < self.starts[-1] + self.lengths[-1]]  # frozen marks come after the slots
        owners = np.unique(np.searchsorted(self.starts, slots, side="right"))
        for owner in owners.tolist():
            axis = self.axis_of(self.starts[owner - 1]) if owner else None
            if axis is not None:
                self.roles.setdefault(axis, set()).add(role)

    def rank(self, dye: Tensor) -> int:
        """How surely the labels of a dye are channels: 2 if a layer reads, writes or carries what they are united
        with, 1 if that is a position of a weight's first two dims, 0 if it is a kernel window, a token or a mark."""
        known = np.zeros(self.ids, dtype=bool)
        known[[label for label in shrunk(dye).unique().tolist() if label != NEUTRAL]] = True
        none = np.empty(0, dtype=np.int64)
        a, b = (np.concatenate(side) for side in zip((none, none), *self.edges, strict=True))
        self.edges = [(a, b)]  # who asks once asks again
        count = 0
        while count < (count := int(known.sum())):
            known[b[known[a]]] = True
            known[a[known[b]]] = True
        axes = {self.axis_of(label) for label in known.nonzero()[0].tolist()} - {None}
        if axes & self.roles.keys():
            return 2
        return int(any(axis.dim < 2 for axis in axes if axis is not None))

    def use(self, weight: Tensor, vector: Tensor, macs: float) -> None:
        """Notes that the weight behind these slots does `macs` multiply-accumulates per element on the whole batch.

        A weight that was mixed from another number of elements is none of the parameter's.
        """
        axis = self.axis_of(int(vector.reshape(-1)[0]))
        if axis is not None and self.elements[axis.name] == weight.numel():
            self.uses.append(WeightUse(axis.name, macs / self.batch))

    def along(self, dyes: Dyes, dim: int) -> Tensor | None:
        """The labels along one dim as a vector (n,): what differs in other dims is united. None without a label."""
        vectors = []
        for dye in dyes:
            dims = lies_along(dye)
            if dim % dye.dim() in dims:
                vectors.append(self._collapse(dye, dim % dye.dim()))
        if not vectors and dyes and dyes[0].size(dim) == 1:
            vectors = [shrunk(dye).reshape(-1) for dye in dyes if not lies_along(dye)][:1]
        for other in vectors[1:]:
            self.unite(vectors[0], other)
        return _overlay(vectors) if vectors else None

    def _collapse(self, dye: Tensor, dim: int) -> Tensor:
        rows = shrunk(dye).movedim(dim, 0).reshape(dye.size(dim), -1)
        if rows.size(1) > 1:
            self.unite(rows[:, :1], rows[:, 1:])
        return _overlay(list(rows.unbind(1)))


def _overlay(vectors: list[Tensor]) -> Tensor:
    """The first label that is not neutral, position by position."""
    top = vectors[0]
    for other in vectors[1:]:
        top = torch.where(top == NEUTRAL, other, top)
    return top


# ---- calls and rules -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One op call: its bound arguments by schema name, its output(s), and the dyes of every tensor."""

    op: Any
    args: dict[str, Any]
    out: Any
    dyes_of: Callable[[Tensor], Dyes]
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

    def labels(self, name: str, dim: int) -> Tensor | None:
        """The label vector of one argument along one dim, or None."""
        tensor = self.args.get(name)
        return None if tensor is None else self.ledger.along(self.dyes_of(tensor), dim)


Rule = Callable[[Call], list[Dyes]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of the ATen ops of these names ("convolution", "mean", ...)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return register


def rule_for(op: Any) -> Rule:
    """The rule of an op. Without one, everything that the op touches is frozen."""
    name = str(op.overloadpacket)
    for known in (name, name.removesuffix("_")):  # what an op does to labels in place it does out of place too
        if known in RULES:
            return RULES[known]
    twin = _functional(op)
    if torch.Tag.pointwise in op.tags or any(torch.Tag.pointwise in getattr(twin, o).tags for o in twin.overloads()):
        return pointwise
    return no_rule


def no_rule(call: Call) -> list[Dyes]:
    """Freezes every label that comes in, and every output: never guess."""
    reason = f"{call.name} has no rule{call.ledger.where()}"
    for tensor in call.tensors():
        call.ledger.freeze(call.dyes_of(tensor), reason)
    return [call.ledger.frozen_dyes(out.shape, reason) for out in outputs(call.out)]


def outputs(out: Any) -> list[Tensor]:
    """The tensors among an op's outputs, in order."""
    items = out if isinstance(out, list | tuple) else [out]
    return [item for item in items if isinstance(item, Tensor)]


def _frozen_by(call: Call, why: str) -> list[Dyes]:
    """Freezes like `no_rule`, for a call that has a rule which does not cover this case."""
    reason = f"{call.name}: {why}{call.ledger.where()}"
    for tensor in call.tensors():
        call.ledger.freeze(call.dyes_of(tensor), reason)
    return [call.ledger.frozen_dyes(out.shape, reason) for out in outputs(call.out)]


# ---- elementwise -----------------------------------------------------------------------------------------------------


@rule("_prelu_kernel", "copy_", "_to_copy", "native_dropout", "rrelu_with_noise", "masked_fill", "lerp", "layer_norm",
      "hardswish", "log_sigmoid_forward")  # fmt: skip
def pointwise(call: Call) -> list[Dyes]:
    """Elementwise ops: labels are broadcast to the output and united where they lie along the same dim."""
    out = outputs(call.out)[0]
    dyes = merged(call.ledger, [call.dyes_of(t) for t in call.tensors()], out.shape)
    if call.op._schema.is_mutable and out._is_view() and len(dyes) > len(call.dyes_of(out)):
        call.ledger.freeze(dyes, f"{call.name} writes channels into a view of another tensor{call.ledger.where()}")
    return [dyes]


def merged(ledger: Ledger, operands: Sequence[Dyes], shape: Sequence[int]) -> Dyes:
    """The dyes of an elementwise result of this shape."""
    result: list[Tensor] = []
    for dye in (d for dyes in operands for d in dyes):
        grown = dye.numel() != math.prod(shape)
        if grown and not lies_along(dye):
            continue  # one channel broadcast over many, as a spatial attention map is: not the same channel
        wide = dye.expand(tuple(shape))
        for i, other in enumerate(result):
            if lies_along(wide) & lies_along(other) or not (lies_along(wide) or lies_along(other)):
                result[i] = _join(ledger, other, wide)
                break
        else:
            result.append(wide)
    return tuple(result)


def _join(ledger: Ledger, a: Tensor, b: Tensor) -> Tensor:
    """Unites two dyes of equal shape; the first wins where both have a label."""
    if a is b:
        return a
    small_a, small_b = torch.broadcast_tensors(shrunk(a), shrunk(b))
    ledger.unite(small_a, small_b)
    if not bool((small_a == NEUTRAL).any()) and lies_along(a) >= lies_along(b):
        return a
    return torch.where(small_a == NEUTRAL, small_b, small_a).expand(a.shape)


@rule("glu")
def gated(call: Call) -> list[Dyes]:
    """One half of a dim times a function of the other half: a channel is a pair."""
    halves = [dye.chunk(2, call.args.get("dim", -1)) for dye in call.dyes_of(call["self"])]
    pairs = [_moved(tuple(pair[i] for pair in halves), lambda dye: dye) for i in (0, 1)]
    return [merged(call.ledger, pairs, call.out.shape)]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def same_shape(call: Call) -> list[Dyes]:
    """Ops along one dim that keep the shape and treat all its positions alike: everybody keeps the label."""
    return [call.dyes_of(call["self"])]


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(call: Call) -> list[Dyes]:
    """Running sums and the like: along channels each one depends on its place among the others, so they are frozen."""
    dyes, dim = call.dyes_of(call["self"]), call["dim"] % max(call["self"].dim(), 1)
    tangled = tuple(dye for dye in dyes if dim in lies_along(dye))
    call.ledger.freeze(tangled, f"{call.name} runs along channels{call.ledger.where()}")
    return [dyes for _ in outputs(call.out)]


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
      "new_empty", "new_full", "bernoulli", "argmax", "argmin", "argsort", "_local_scalar_dense", "is_same_size",
      "lift_fresh", "sym_size", "zero_", "fill_", "bernoulli_", "uniform_", "normal_")  # fmt: skip
def nameless(call: Call) -> list[Dyes]:
    """Ops whose result has no channel identity of its own."""
    return [call.dyes_of(t) if call.op._schema.is_mutable else () for t in outputs(call.out)]


# ---- data movement: the same op on the labels ------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def reshape(call: Call) -> list[Dyes]:
    """Reshapes: labels are reshaped alike, so that flatten, shuffle and split of a dim are exact."""
    dyes = call.dyes_of(call["self"])
    moved = [(lies_along(dye), tidy(_reshaped(dye, call.out.shape))) for dye in dyes]
    return [_untangled(call, [(dims, dye) for dims, dye in moved if dye is not None])]


def _reshaped(dye: Tensor, shape: Sequence[int]) -> Tensor:
    """The dye in another shape; only those blocks of dims in which it varies take memory."""
    if dye.numel() == 0:
        return dye.reshape(shape)
    lying, target = lies_along(dye), list(shape)
    for before, after in _blocks(dye.shape, shape):
        if not lying & set(before):
            for d in before:
                dye = dye.narrow(d, 0, 1)
            for d in after:
                target[d] = 1
    return dye.reshape(target).expand(tuple(shape))


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of dims that a reshape maps onto each other: equal products, nothing crosses."""
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


def _untangled(call: Call, moved: list[tuple[frozenset[int], Tensor]]) -> Dyes:
    """The dyes after a reshape. Where it folds dims of several dyes into one, a position has a label of each.

    The label of a channel is kept, that of a token or of a kernel window, which is none, is dropped. Two channels in
    one position are frozen. `moved` holds for each dye the dims in which it lay before, and the dye after.
    """
    tangled = [
        any(not (dims & others) and lies_along(dye) & lies_along(other) for others, other in moved)
        for dims, dye in moved
    ]
    if not any(tangled):
        return tuple(dye for _, dye in moved)
    ranks = [call.ledger.rank(dye) if knot else -1 for (_, dye), knot in zip(moved, tangled, strict=True)]
    best = [i for i, rank in enumerate(ranks) if rank == max(ranks)]
    if len(best) > 1 and max(ranks) > 0:
        reason = f"{call.name} folds channels of two kinds into one dim{call.ledger.where()}"
        call.ledger.freeze(tuple(moved[i][1] for i in best), reason)
    return tuple(dye for i, (_, dye) in enumerate(moved) if not tangled[i] or i in best)


@rule("permute", "transpose", "t", "slice", "select", "narrow", "expand", "squeeze", "unsqueeze", "squeeze_",
      "unsqueeze_", "flip", "roll", "repeat", "unfold", "alias", "detach", "detach_", "clone", "contiguous", "movedim",
      "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "rot90", "numpy_T",
      "repeat_interleave")  # fmt: skip
def move(call: Call) -> list[Dyes]:
    """Data movement with one input and one output."""
    rest = {k: v for k, v in call.args.items() if k not in ("self", "memory_format")}
    op = _functional(call.op)
    return [_moved(call.dyes_of(call["self"]), lambda dye: op(dye, **rest))]


@rule("split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes",
      "split_copy", "unbind_copy")  # fmt: skip
def move_apart(call: Call) -> list[Dyes]:
    """Data movement with one input and a list of outputs."""
    rest = {k: v for k, v in call.args.items() if k != "self"}
    parts: list[list[Tensor]] = [[] for _ in call.out]
    for dye in call.dyes_of(call["self"]):
        for part, piece in zip(parts, call.op(dye, **rest), strict=True):
            if (clean := tidy(piece)) is not None:
                part.append(clean)
    return [tuple(part) for part in parts]


@rule("index_select", "index")
def indexed(call: Call) -> list[Dyes]:
    """Positions of one dim, chosen by an index: exact where it is a constant that is known here, else frozen."""
    places = [(d, i) for d, i in enumerate(call.args.get("indices", ())) if i is not None]
    dim, index = (call["dim"], call["index"]) if "index" in call.args else places[0]
    if len(places) > 1 or index.dim() != 1:
        return _frozen_by(call, "several dims are indexed at once")
    dim, length = dim % max(call["self"].dim(), 1), call["self"].size(dim)
    known = not index.is_meta and not call.dyes_of(index)
    if known:
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.cpu()
        index = torch.where(index < 0, index + length, index)
    reason = f"{call.name}: which channels are chosen is not known{call.ledger.where()}"
    result: list[Tensor] = []
    for dye in call.dyes_of(call["self"]):
        if dim not in lies_along(dye):
            result.append(dye.narrow(dim, 0, 1).expand(call.out.shape))
        elif known:
            result.extend(_moved((shrunk(dye).index_select(dim, index),), lambda dye: dye.expand(call.out.shape)))
        else:
            call.ledger.freeze((dye,), reason)
            result.append(spread(call.ledger.mark(reason, call.out.size(dim)), call.out.shape, dim))
    return [tuple(result)]


@rule("cat", "concatenate", "stack")
def join(call: Call) -> list[Dyes]:
    """Concatenation: the labels are concatenated, what lies along the same dims with its like.

    Along another dim than that of the channels, the channels of all operands must remain as many: they are united.
    """
    dim = call.args.get("dim", 0) % call.out.dim()
    stacked = call.name == "aten.stack"
    tensors = [t for t in call["tensors"] if stacked or t.dim() == call.out.dim()]  # cat skips empty 1-D tensors
    by_dims: dict[frozenset[int], list[Tensor]] = {}
    for i, tensor in enumerate(tensors):
        for dye in call.dyes_of(tensor):
            dims = lies_along(dye) - (set() if stacked else {dim})
            if dims not in by_dims:
                by_dims[dims] = [_NOBODY.expand(t.shape) for t in tensors]
            fill = by_dims[dims]
            fill[i] = dye if lies_along(fill[i]) < lies_along(dye) else _join(call.ledger, fill[i], dye)
    result: list[Tensor] = []
    for dims, fill in by_dims.items():
        if not stacked and dims and not any(dim in lies_along(dye) for dye in fill):
            across = [dye.narrow(dim, 0, 1) for dye in fill if dye.size(dim)]
            result.append(functools.reduce(functools.partial(_join, call.ledger), across).expand(call.out.shape))
            continue
        for d in set(range(fill[0].dim())) - dims - (set() if stacked else {dim}):
            fill = [dye.narrow(d, 0, 1) for dye in fill]
        joined = torch.stack(fill, dim) if stacked else torch.cat(fill, dim)
        result.extend(_moved((joined,), lambda dye: dye.expand(call.out.shape)))
    return [tuple(result)]


@rule("as_strided", "as_strided_")
def restride(call: Call) -> list[Dyes]:
    """Only a change of strides in dims of size 1 is understood (adaptive pooling under channels_last does it)."""
    source, size, dyes = call["self"], list(call["size"]), call.dyes_of(call["self"])
    if any(list(dye.shape) != size for dye in dyes) or call.args.get("storage_offset") not in (None, 0):
        return _frozen_by(call, "changes what is stored where")
    # In place the old strides are gone by now: pooling asks for those of a fresh tensor, and has a fresh one.
    old = [math.prod(size[d + 1 :]) for d in range(len(size))] if source is call.out else source.stride()
    if any(n > 1 and new != before for n, new, before in zip(size, call["stride"], old, strict=True)):
        return _frozen_by(call, "changes what is stored where")
    return [dyes]


@rule("constant_pad_nd")
def pad(call: Call) -> list[Dyes]:
    """Zero padding: padded positions of a channel dim are frozen, padded pixels take their channel's label."""
    amounts, padded = list(call["pad"]), call.out.dim() - len(call["pad"]) // 2
    result = []
    for dye in call.dyes_of(call["self"]):
        touched = [d for d in lies_along(dye) if d >= padded and any(_amount(amounts, call.out.dim(), d))]
        for d in range(dye.dim()):
            if d in touched:
                before, after = _amount(amounts, call.out.dim(), d)
                edge = [0] * (2 * (dye.dim() - d))
                edge[-2:] = before, after
                mark = int(call.ledger.mark(f"{call.name} fills this channel{call.ledger.where()}"))
                dye = torch.nn.functional.pad(shrunk(dye), edge, value=mark)
            elif dye.size(d) != call.out.size(d):
                dye = dye.narrow(d, 0, 1)
        result.append(shrunk(dye).expand(call.out.shape))
    return [tuple(result)]


def _amount(amounts: list[int], dims: int, d: int) -> tuple[int, int]:
    """The padding before and after dim d, from torch's last-dim-first list."""
    at = 2 * (dims - 1 - d)
    return (amounts[at], amounts[at + 1]) if at + 1 < len(amounts) else (0, 0)


def _moved(dyes: Dyes, how: Callable[[Tensor], Tensor]) -> Dyes:
    return tuple(clean for dye in dyes if (clean := tidy(how(dye))) is not None)


def _functional(op: Any) -> Any:
    """The op with all its overloads; of an in-place op the out-of-place twin, if there is one."""
    packet = op.overloadpacket
    return getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet) if op._schema.is_mutable else packet


# ---- pooling, interpolation, reductions ------------------------------------------------------------------------------


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_max_pool1d", "adaptive_avg_pool2d", "mkldnn_max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
      "_upsample_nearest_exact1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_linear1d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d",
      "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
      "grid_sampler_3d", "_upsample_nearest_exact3d", "fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d",
      "max_unpool3d")  # fmt: skip
def spatial(call: Call) -> list[Dyes]:
    """Ops that change the trailing, spatial dims only: channels keep their labels."""
    source = call["self"] if "self" in call.args else call["input"]
    if isinstance(grid := call.args.get("grid"), Tensor):
        call.ledger.freeze(call.dyes_of(grid), f"{call.name}: these are coordinates{call.ledger.where()}")
    spots = [out.shape for out in outputs(call.out)]
    changed = {d for d in range(source.dim()) if source.size(d) != spots[0][d]} | set(range(2, source.dim()))
    if source.dim() == 3 and len(spots[0]) == 3 and call.name.endswith("2d"):
        changed -= {0}
    reason = f"{call.name}: channels lie along a spatial dim{call.ledger.where()}"
    kept: list[Tensor] = []
    lost: set[int] = set()
    for dye in call.dyes_of(source):
        lying = lies_along(dye) & changed
        if lying:
            call.ledger.freeze((dye,), reason)
            lost |= lying
        if not lying or lies_along(dye) - changed:
            for d in changed:
                dye = dye.narrow(d, 0, 1)
            kept.append(dye)
    marks = {d: call.ledger.mark(reason, spots[0][d]) for d in sorted(lost)}
    return [(*(dye.expand(spot) for dye in kept), *(spread(marks[d], spot, d) for d in marks)) for spot in spots]


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
      "logsumexp", "prod", "any", "all", "median", "nansum", "aminmax")  # fmt: skip
def reduction(call: Call) -> list[Dyes]:
    """Reductions keep labels on the dims that they keep; over a channel dim the identity ends."""
    source = call["self"]
    if isinstance(call.args.get("other"), Tensor):
        return pointwise(call)
    dims = call.args.get("dim")
    dims = list(range(source.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    gone = {d % max(source.dim(), 1) for d in dims}
    spots = [out.shape for out in outputs(call.out)]
    kept = []
    for dye in call.dyes_of(source):
        if lies_along(dye) and not lies_along(dye) - gone:
            continue
        for d in sorted(gone & lies_along(dye)):
            call.ledger.unite(shrunk(dye).narrow(d, 0, 1), shrunk(dye))
        for d in sorted(gone):
            dye = dye.narrow(d, 0, 1)
        kept.append(dye)
    small = [dye if len(spots[0]) == source.dim() else _drop(dye, gone) for dye in kept]
    return [tuple(dye.expand(spot) for dye in small) for spot in spots]


def _drop(dye: Tensor, dims: set[int]) -> Tensor:
    for d in sorted(dims, reverse=True):
        dye = dye.select(d, 0)
    return dye


# ---- norms -----------------------------------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")  # fmt: skip
def batch_norm(call: Call) -> list[Dyes]:
    """Per-channel norms: scale, shift and running statistics carry the channel."""
    channel = call.labels("input", 1)
    partners = ["weight", "bias", "running_mean", "running_var"]
    vectors = [v for v in (call.labels(name, 0) for name in partners) if v is not None]
    channel = channel if channel is not None else (vectors[0] if vectors else None)
    if channel is None:
        return [()]
    for vector in vectors:
        call.ledger.unite(channel, vector)
        call.ledger.play(vector, "carry")
    return [call.dyes_of(call["input"]) or (spread(channel, call["input"].shape, 1),)]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Dyes]:
    """Channels normalised together leave together, norm group by norm group, unless there is only one group."""
    channel, groups = call.labels("input", 1), call["group"]
    for name in ("weight", "bias"):
        vector = call.labels(name, 0)
        if vector is not None and channel is not None:
            call.ledger.unite(channel, vector)
            call.ledger.play(vector, "carry")
    if channel is not None and groups > 1:
        rows = channel.view(groups, -1)
        call.ledger.unite(rows[:, :1], rows)
    return [call.dyes_of(call["input"])]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> list[Dyes]:
    """Norms across channels: scale and shift carry the channel, every channel keeps its label."""
    out = outputs(call.out)[0]
    return [merged(call.ledger, [call.dyes_of(t) for t in call.tensors()], out.shape)]


# ---- weights ---------------------------------------------------------------------------------------------------------


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(call: Call) -> list[Dyes]:
    """Convolutions read the input's channels with one dim of the weight and write new ones with the other."""
    transposed, groups = call.args.get("transposed", False), call["groups"]
    image = call["input"] if "input" in call.args else call["self"]
    reads, writes = call.labels("weight", 0 if transposed else 1), call.labels("weight", 1 if transposed else 0)
    channel_dim = image.dim() - (call["weight"].dim() - 1)
    kept = _beside(call, image, channel_dim)
    channel = call.ledger.along(call.dyes_of(image), channel_dim)
    if groups == 1 and (reads is None or writes is None):
        return _frozen_by(call, "the weight is no parameter")
    if writes is not None:
        pixels = math.prod((image if transposed else call.out).shape[channel_dim + 1 :])
        call.ledger.use(call["weight"], writes, pixels * (image.size(0) if channel_dim else 1))
    if groups == 1:
        _mixed(call, channel, reads, writes)
        result = writes
    else:
        result = _grouped(call, channel, groups, reads if transposed else writes, call.out.size(channel_dim))
    bias = call.labels("bias", 0)
    if bias is not None and result is not None:
        call.ledger.unite(result, bias)
        call.ledger.play(bias, "carry")
    fresh = () if result is None else (spread(result, call.out.shape, channel_dim),)
    return [(*fresh, *(dye.expand(call.out.shape) for dye in kept))]


def _beside(call: Call, image: Tensor, channel_dim: int) -> Dyes:
    """What of an image's labels a convolution keeps: those along the batch. Those along pixels are frozen."""
    kept = []
    for dye in call.dyes_of(image):
        lying = lies_along(dye)
        if any(d > channel_dim for d in lying):
            call.ledger.freeze((dye,), f"{call.name} slides along channels{call.ledger.where()}")
        if lying == {0} and channel_dim:
            kept.append(shrunk(dye))
    return tuple(kept)


def _mixed(call: Call, channel: Tensor | None, reads: Tensor | None, writes: Tensor | None) -> None:
    """Every output of a layer depends on every input: two axes of the weight, two kinds of channels."""
    if reads is not None:
        if channel is not None:
            call.ledger.unite(channel, reads)
        call.ledger.play(reads, "read")
    if writes is not None:
        call.ledger.play(writes, "write")


def _grouped(call: Call, channel: Tensor | None, groups: int, first: Tensor | None, width: int) -> Tensor | None:
    """Grouped convolutions: a whole conv-group, in and out, is one channel. Returns the labels of the output.

    `first` (n,) are the slots of the weight's first dim; they are carried, whichever side of the layer they are on.
    A kernel that is the same for all channels, such as a blur, has none.
    """
    sides = [side.view(groups, -1) for side in (first, channel) if side is not None]
    for side in sides:
        call.ledger.unite(sides[0][:, :1], side)
    if first is not None:
        call.ledger.play(first, "carry")
    return sides[0][:, 0].repeat_interleave(width // groups) if sides else None


_FACTORS = {"aten.mm": ("self", "mat2"), "aten.addmm": ("mat1", "mat2"), "aten.bmm": ("self", "mat2"),
            "aten.baddbmm": ("batch1", "batch2")}  # fmt: skip


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul(call: Call) -> list[Dyes]:
    """Linear layers arrive as input @ weight.t(): the summed dim reads, the other one writes.

    Of a product of two activations the rows and columns keep their labels; the dim that is summed over is frozen.
    """
    left, right = (call[name] for name in _FACTORS[call.name])
    bias = call.labels("self", -1) if call.name in ("aten.addmm", "aten.baddbmm") else None
    if _is_matrix(call, right):
        return _linear(call, left, -1, (right, -2, -1), bias)
    if _is_matrix(call, left):
        return _linear(call, right, -2, (left, -1, -2), bias)
    if bias is not None:
        return _frozen_by(call, "no operand is a parameter")
    kept: list[Dyes] = []
    for factor, summed in ((left, -1), (right, -2)):
        dyes = call.dyes_of(factor)
        lost = tuple(dye for dye in dyes if summed % factor.dim() in lies_along(dye))
        call.ledger.freeze(lost, f"{call.name} sums over channels of two activations{call.ledger.where()}")
        kept.append(_rows(dyes, summed))
    return [merged(call.ledger, kept, call.out.shape)]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math")  # fmt: skip
def attention(call: Call) -> list[Dyes]:
    """Attention that arrives whole: queries and keys are summed over and frozen, values keep their channels."""
    kept: list[Dyes] = []
    for name, summed in (("query", (-1,)), ("key", (-1, -2)), ("value", (-2,))):
        dyes = call.dyes_of(call[name])
        lost = tuple(dye for dye in dyes if any(d % dye.dim() in lies_along(dye) for d in summed))
        call.ledger.freeze(lost, f"{call.name} sums over channels of two activations{call.ledger.where()}")
        for d in summed:
            dyes = _rows(dyes, d)
        kept.append(dyes)
    out, *others = outputs(call.out)
    return [merged(call.ledger, kept, out.shape), *(() for _ in others)]


@rule("linear")
def linear(call: Call) -> list[Dyes]:
    """Linear layers that arrive whole."""
    if not _is_matrix(call, call["weight"]):
        return _frozen_by(call, "the weight is no parameter")
    return _linear(call, call["input"], -1, (call["weight"], 1, 0), call.labels("bias", 0))


def _is_matrix(call: Call, factor: Tensor) -> bool:
    """Whether a factor is one weight, the same for the whole batch: with labels on both of its dims."""
    if factor.dim() > 2 and factor.size(0) > 1 and factor.stride(0) != 0:
        return False
    dyes = call.dyes_of(factor)
    return all(call.ledger.along(dyes, d) is not None for d in (-1, -2))


def _rows(dyes: Dyes, summed: int) -> Dyes:
    """What is left of a factor's dyes when one of its dims is summed over: those that lie along the other ones."""
    left = (dye.narrow(summed, 0, 1) for dye in dyes)
    return tuple(dye for dye in left if lies_along(dye))


def _linear(call: Call, image: Tensor, summed: int, weight: tuple[Tensor, int, int], bias: Tensor | None) -> list[Dyes]:
    """A linear layer that sums over one dim of the image: `weight` is the matrix, its reading and its writing dim."""
    matrix, reading, writing = weight
    dyes, matrix_dyes = call.dyes_of(image), call.dyes_of(matrix)
    reads, writes = call.ledger.along(matrix_dyes, reading), call.ledger.along(matrix_dyes, writing)
    assert reads is not None and writes is not None
    call.ledger.use(matrix[0] if matrix.dim() > 2 else matrix, writes, image.numel() // max(image.size(summed), 1))
    _mixed(call, call.ledger.along(dyes, summed), reads, writes)
    if bias is not None:
        call.ledger.unite(writes, bias)
        call.ledger.play(bias, "carry")
    fresh = spread(writes, call.out.shape, call.out.dim() + summed)
    return [merged(call.ledger, [(fresh,), _rows(dyes, summed)], call.out.shape)]


@rule("mv")
def matrix_vector(call: Call) -> list[Dyes]:
    """A matrix times a vector: what is summed over is one kind of channel, the rows keep their labels."""
    summed, vector = call.labels("self", 1), call.labels("vec", 0)
    if summed is not None and vector is not None:
        call.ledger.unite(summed, vector)
    return [_moved(_rows(call.dyes_of(call["self"]), 1), lambda dye: dye.select(1, 0).expand(call.out.shape))]


@rule("dot", "vdot")
def inner(call: Call) -> list[Dyes]:
    """An inner product: its two vectors have the same channels, the result has none."""
    a, b = call.labels("self", 0), call.labels("other" if "other" in call.args else "tensor", 0)
    if a is not None and b is not None:
        call.ledger.unite(a, b)
    return [()]


@rule("im2col")
def windows(call: Call) -> list[Dyes]:
    """Sliding windows: each channel becomes as many neighbouring rows as the window has pixels."""
    image, pixels = call["self"], math.prod(call["kernel_size"])
    at = image.dim() - 3
    _beside(call, image, at)
    channel = call.ledger.along(call.dyes_of(image), at)
    return [() if channel is None else (spread(channel.repeat_interleave(pixels), call.out.shape, at),)]


@rule("col2im")
def folded(call: Call) -> list[Dyes]:
    """Sliding windows put back: the rows of a window are one channel."""
    at = call["self"].dim() - 2
    _beside(call, call["self"], at)
    rows = call.labels("self", at)
    if rows is None:
        return [()]
    rows = rows.view(-1, math.prod(call["kernel_size"]))
    call.ledger.unite(rows[:, :1], rows)
    return [(spread(rows[:, 0], call.out.shape, at),)]


@rule("embedding")
def embedding(call: Call) -> list[Dyes]:
    """Embedding tables write channels with their second dim; the vocabulary is frozen."""
    call.ledger.freeze(tuple(v for v in [call.labels("weight", 0)] if v is not None), "a vocabulary, not channels")
    writes = call.labels("weight", 1)
    if writes is None:
        return _frozen_by(call, "the table is no parameter")
    call.ledger.play(writes, "write")
    return [(spread(writes, call.out.shape, call.out.dim() - 1),)]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> list[Dyes]:
    """The weight g v / |v| has the channels of v; g has those of the dim that it keeps."""
    direction, gain = call["v"], call["g"]
    dyes = merged(call.ledger, [call.dyes_of(direction), call.dyes_of(gain)], direction.shape)
    return [dyes, call.dyes_of(gain)]
