"""One row per kind of op: what an op call on labelled tensors does to the labels."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autowidth import rules
from autowidth.channels import ParamAxis
from autowidth.rules import (
    NEUTRAL,
    RULES,
    TAGGED,
    Call,
    Labels,
    Ledger,
    labels,
    lies_along,
    movement,
    no_rule,
    outputs,
    rule,
    rule_for,
    shrunk,
    spread,
)

Op = Callable[..., Any]
FROZEN, NONE = -2, -1


# ---- a bench for single ops ------------------------------------------------------------------------------------------


class Bench(TorchDispatchMode):
    """Applies rules to the ops under it and keeps the label tensors of every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(batch=2)
        self.labels: dict[int, Labels] = {}
        self.alive: list[Tensor] = []
        self.used: set[Any] = set()

    def label(self, name: str, tensor: Tensor, *dims: int) -> Tensor:
        """Gives the tensor slots of its own along these dims."""
        return self.put(tensor, *(spread(self.ledger.slots(name, d, tensor.size(d)), tensor.shape, d) for d in dims))

    def put(self, tensor: Tensor, *labels: Tensor) -> Tensor:
        self.labels[id(tensor)] = labels
        self.alive.append(tensor)  # an id must not be used again
        return tensor

    def of(self, tensor: Tensor) -> Labels:
        return self.labels.get(id(tensor), ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        call = Call(func, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, out, self.of, self.ledger)
        if any(self.of(t) for t in call.tensors()):
            self.used.add(rule_for(func))
            for tensor, labels in zip(outputs(out), rule_for(func)(call), strict=False):
                self.put(tensor, *labels)
        return out

    def names(self) -> dict[int, int]:
        """For every id the least slot that it is united with, FROZEN if it is united with a mark."""
        parent = list(range(self.ledger.ids))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for a, b in self.ledger.edges:
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                low, high = sorted((root(x), root(y)))
                parent[high] = low
        frozen = {root(mark) for mark in self.ledger.marks}
        return {i: FROZEN if root(i) in frozen else root(i) for i in range(self.ledger.ids)} | {NEUTRAL: NONE}

    def seen(self, tensor: Tensor) -> dict[int, list[Any]]:
        """Dim(s) -> labels along them, for each label tensor of a tensor; what varies along two dims is nested."""
        names, found = self.names(), {}
        for label in self.of(tensor):
            dims = sorted(lies_along(label))
            small = shrunk(label)
            flat = torch.tensor([names[i] for i in small.reshape(-1).tolist()]).view(small.shape)
            squeezed = flat.squeeze() if dims else flat.reshape(-1)[:1]
            found[dims[0] if len(dims) == 1 else tuple(dims)] = squeezed.tolist()
        return found


@dataclass(frozen=True)
class Row:
    """Tensors, labelled along one dim each, an op on them, and the labels expected.

    Slots count through: four channels of the first tensor are 0 to 3, the next tensor goes on from 4.
    out: for each labelled output dim the labels. ties: slots that the op unites.
    """

    op: Op
    out: dict[Any, Any]
    shapes: Sequence[tuple[int, ...]] = ((2, 4, 3, 3),)
    dims: Sequence[Any] = (1,)
    ties: Sequence[set[int]] = ()
    frozen: Sequence[int] = ()


X, V = (2, 4, 3, 3), (4,)
SAME = {1: [0, 1, 2, 3]}
PAIRED = [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
ALL_FROZEN = {1: [FROZEN] * 4, 2: [FROZEN] * 3, 3: [FROZEN] * 3}

ROWS: dict[str, Row] = {
    # elementwise
    "relu": Row(torch.relu, SAME),
    "relu in place": Row(torch.relu_, SAME),
    "hardswish": Row(F.hardswish, SAME),
    "hardswish in place": Row(lambda x: F.hardswish(x, inplace=True), SAME),
    "mish in place": Row(lambda x: F.mish(x, inplace=True), SAME),
    "to another dtype": Row(lambda x: x.to(torch.float64), SAME),
    "dropout": Row(lambda x: F.dropout(x, 0.5), SAME),
    "dropout of channels": Row(lambda x: F.dropout2d(x, 0.5), SAME),
    "add": Row(torch.add, SAME, (X, X), (1, 1), PAIRED),
    "add a neutral one": Row(torch.add, SAME, (X, X), (1, None)),
    "add in place": Row(lambda x, y: x.add_(y), SAME, (X, X), (1, 1), PAIRED),
    "scale": Row(lambda x, s: x * s, SAME, (X, (4, 1, 1)), (1, 0), PAIRED),
    "where": Row(lambda x, y: torch.where(x > 0, x, y), SAME, (X, X), (1, 1), PAIRED),
    "prelu": Row(F.prelu, SAME, (X, V), (1, 0), PAIRED),
    "one channel over many": Row(lambda x, g: x * g, SAME, (X, (2, 1, 3, 3)), (1, 1)),
    "along another dim": Row(torch.add, {1: [0, 1, 2, 3], 3: [4, 5, 6]}, (X, X), (1, 3)),
    "write into a view": Row(
        lambda x: torch.zeros(2, 8, 3, 3)[:, :4].copy_(x), {1: [FROZEN] * 4}, frozen=(0, 1, 2, 3)
    ),
    # gated, softmax, nameless
    "glu": Row(lambda x: F.glu(x, 1), {1: [0, 1]}, ties=[{0, 2}, {1, 3}]),
    "glu along another dim": Row(lambda x: F.glu(x, 0), SAME),
    "softmax": Row(lambda x: x.softmax(1), SAME),
    "softmax of rows that may be empty": Row(lambda x: torch.ops.aten._safe_softmax(x, 1), SAME),
    "cumsum": Row(lambda x: x.cumsum(1), {1: [FROZEN] * 4}, frozen=(0, 1, 2, 3)),
    "cumsum of pixels": Row(lambda x: x.cumsum(3), SAME),
    "cummax of channels": Row(lambda x: x.cummax(1)[0], {1: [FROZEN] * 4}, frozen=(0, 1, 2, 3)),
    "zeros_like": Row(torch.zeros_like, {}),
    "argmax": Row(lambda x: x.argmax(1), {}),
    "zero in place": Row(lambda x: x.zero_(), SAME),
    # data movement
    "view": Row(lambda x: x.view(2, 2, 2, 3, 3), {(1, 2): [[0, 1], [2, 3]]}),
    "shuffle": Row(lambda x: x.view(2, 2, 2, 3, 3).transpose(1, 2).reshape(2, 4, 3, 3), {1: [0, 2, 1, 3]}),
    "flatten": Row(lambda x: x.flatten(1), {1: [0, 0, 0, 0, 1, 1, 1, 1]}, ((2, 2, 2, 2),)),
    "flatten a kernel window": Row(
        lambda w: w.flatten(1), {0: [0, 1], 1: [2, 2, 3, 3, 4, 4]}, ((2, 3, 1, 2),), ((0, 1, 3),)
    ),
    "flatten two kinds of channels": Row(
        lambda w: w.flatten(), {0: [FROZEN] * 6}, ((2, 3),), ((0, 1),), frozen=range(5)
    ),
    "permute and flatten": Row(
        lambda x: x.permute(0, 2, 3, 1).flatten(1), {1: [0, 1, 0, 1, 0, 1, 0, 1]}, ((2, 2, 2, 2),)
    ),
    "transpose": Row(lambda x: x.transpose(1, 3), {3: [0, 1, 2, 3]}),
    "transpose in place": Row(lambda x: x.transpose_(1, 3), {3: [0, 1, 2, 3]}),
    "slice": Row(lambda x: x[:, 1:3], {1: [1, 2]}),
    "slice another dim": Row(lambda x: x[..., ::2], SAME),
    "select": Row(lambda x: x[:, 2], {(): [2]}),
    "flip": Row(lambda x: x.flip(1), {1: [3, 2, 1, 0]}),
    "roll": Row(lambda x: x.roll(1, 1), {1: [3, 0, 1, 2]}),
    "expand": Row(lambda x: x.expand(2, 4, 3, 3), SAME, ((2, 4, 1, 1),)),
    "repeat": Row(lambda x: x.repeat(1, 2, 1, 1), {1: [0, 1, 2, 3, 0, 1, 2, 3]}),
    "unsqueeze": Row(lambda x: x.unsqueeze(1), {2: [0, 1, 2, 3]}),
    "clone": Row(torch.clone, SAME),
    "contiguous in another format": Row(lambda x: x.contiguous(memory_format=torch.channels_last), SAME),
    "detach": Row(lambda x: x.detach(), SAME),
    "pixel_shuffle": Row(lambda x: F.pixel_shuffle(x, 2), {(2, 3): [[0, 1, 0, 1], [2, 3, 2, 3]] * 2}, ((2, 4, 2, 2),)),
    "chunk": Row(lambda x: x.chunk(2, 1)[1], {1: [2, 3]}),
    "split": Row(lambda x: x.split([1, 3], 1)[1], {1: [1, 2, 3]}),
    "unbind": Row(lambda x: x.unbind(2)[0], SAME),
    "cat": Row(lambda x, y: torch.cat([x, y], 1), {1: [0, 1, 2, 3, 4, 5]}, (X, (2, 2, 3, 3)), (1, 1)),
    "cat with a neutral one": Row(
        lambda x, y: torch.cat([x, y], 1), {1: [0, 1, 2, 3, NONE, NONE]}, (X, (2, 2, 3, 3)), (1, None)
    ),
    "cat along another dim": Row(
        lambda x, y: torch.cat([x, y], 3), {1: [0, 1]}, ((2, 2, 1, 1), (2, 2, 1, 1)), (1, 1), [{0, 2}, {1, 3}]
    ),
    "cat along another dim with a neutral one": Row(
        lambda x, y: torch.cat([y, x], 3), SAME, (X, X), (1, None)
    ),
    "cat of one that lies along two dims": Row(
        lambda x, y: torch.cat([x, y], 1),
        {1: [0, 1, 4, 5], 2: [2, 3]},
        ((2, 2, 2, 3), (2, 2, 2, 3)),
        ((1, 2), 1),
    ),
    "cat of one with a label on a dim of one": Row(
        lambda x, y: torch.cat([x, y], 1), {1: [0, 0, 0, 0, 5, 6]}, ((2, 4, 1, 1), (2, 2, 1, 1)), ((1, 2), 1),
        [{0, 1, 2, 3, 4}],
    ),
    "cat with an empty one": Row(lambda x: torch.cat([torch.zeros(0), x], 1), SAME),
    "index_select": Row(lambda x: x.index_select(1, torch.tensor([2, 0, 0])), {1: [2, 0, 0]}),
    "index_select of pixels": Row(lambda x: x.index_select(2, torch.tensor([2, 0])), SAME),
    "index": Row(lambda x: x[:, torch.tensor([-1, 0])], {1: [3, 0]}),
    "index by a mask": Row(lambda x: x[:, torch.tensor([True, False, True, False])], {1: [0, 2]}),
    "index from a buffer": Row(
        lambda x, i: x.index_select(1, i.long()), {1: [FROZEN] * 2}, (X, (2,)), (1, 0), frozen=(0, 1, 2, 3)
    ),
    "index of several dims": Row(
        lambda x: x[torch.tensor([0]), torch.tensor([1])], {1: [FROZEN] * 3, 2: [FROZEN] * 3}, frozen=(0, 1, 2, 3)
    ),
    "stack": Row(lambda x, y: torch.stack([x, y], 1), {(1, 2): [[0, 1], [2, 3]]}, ((2, 2), (2, 2)), (1, 1)),
    "as_strided that changes nothing": Row(lambda x: x.as_strided((2, 4, 1, 1), (4, 1, 4, 4)), SAME, ((2, 4, 1, 1),)),
    "as_strided that does": Row(
        lambda x: x.as_strided((3, 3), (1, 3)), {1: [FROZEN] * 3}, ((3, 3),), frozen=(0, 1, 2)
    ),
    "as_strided in place that does": Row(
        lambda x: x.as_strided_((3, 3), (1, 3)), {1: [FROZEN] * 3}, ((3, 3),), frozen=(0, 1, 2)
    ),
    "pad pixels": Row(lambda x: F.pad(x, (1, 2)), SAME),
    "pad channels": Row(
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), {1: [FROZEN, 0, 1, 2, 3, FROZEN, FROZEN]}
    ),
    # pooling and reductions
    "max_pool2d": Row(lambda x: F.max_pool2d(x, 3), SAME),
    "adaptive_avg_pool2d": Row(lambda x: F.adaptive_avg_pool2d(x, 2), SAME),
    "interpolate": Row(lambda x: F.interpolate(x, scale_factor=2.0), SAME),
    "pooling along channels": Row(
        lambda x: F.avg_pool1d(x, 2), {2: [FROZEN, FROZEN]}, ((2, 3, 4),), (2,), frozen=(0, 1, 2, 3)
    ),
    "max_unpool2d": Row(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), SAME, ((2, 4, 4, 4),)),
    "grid_sample": Row(
        lambda x, g: F.grid_sample(x, g, align_corners=False), SAME, (X, (2, 3, 3, 2)), (1, 3), frozen=(4, 5)
    ),
    "mean of pixels": Row(lambda x: x.mean((2, 3)), SAME),
    "mean of pixels, dims kept": Row(lambda x: x.mean((2, 3), keepdim=True), SAME),
    "mean of channels": Row(lambda x: x.mean(1), {}),
    "mean of everything": Row(lambda x: x.mean(), {}),
    "max with indices": Row(lambda x: x.max(3)[0], SAME),
    "max of two": Row(torch.max, SAME, (X, X), (1, 1), PAIRED),
    "var": Row(lambda x: x.var((0, 2, 3)), {0: [0, 1, 2, 3]}),
    "sum over a part of a channel's dims": Row(
        lambda x: x.view(2, 2, 2, 3, 3).sum(2), {1: [0, 2]}, ties=[{0, 1}, {2, 3}]
    ),
    # norms
    "batch_norm": Row(
        lambda x, w, m: F.batch_norm(x, m, torch.ones(4), w), SAME, (X, V, V), (1, 0, 0),
        [{0, 4, 8}, {1, 5, 9}, {2, 6, 10}, {3, 7, 11}],
    ),
    "batch_norm in training": Row(
        lambda x, w: F.batch_norm(x, None, None, w, None, True), SAME, (X, V), (1, 0), PAIRED
    ),
    "batch_norm of a neutral input": Row(
        lambda x, w: F.batch_norm(x, None, None, w, None, True), SAME, (X, V), (None, 0)
    ),
    "group_norm": Row(
        lambda x, w: F.group_norm(x, 2, w), {1: [0, 0, 2, 2]}, (X, V), (1, 0), [{0, 1, 4, 5}, {2, 3, 6, 7}]
    ),
    "group_norm with one group": Row(lambda x, w: F.group_norm(x, 1, w), SAME, (X, V), (1, 0), PAIRED),
    "layer_norm": Row(lambda x, w: F.layer_norm(x, (4,), w), {2: [0, 1, 2, 3]}, ((2, 3, 4), V), (2, 0), PAIRED),
    # weights
    "conv": Row(
        lambda x, w: F.conv2d(x, w), {1: [8, 9]}, (X, (2, 4, 1, 1)), (1, (1, 0)), PAIRED
    ),
    "conv with bias": Row(
        lambda x, w, b: F.conv2d(x, w, b), {1: [8, 9]}, (X, (2, 4, 1, 1), (2,)), (1, (1, 0), 0),
        [*PAIRED, {8, 10}, {9, 11}],
    ),
    "transposed conv": Row(
        lambda x, w: F.conv_transpose2d(x, w), {1: [8, 9]}, (X, (4, 2, 1, 1)), (1, (0, 1)), PAIRED
    ),
    "depthwise conv": Row(
        lambda x, w: F.conv2d(x, w, groups=4), SAME, (X, (4, 1, 1, 1)), (1, (0, 1)), PAIRED
    ),
    "grouped conv": Row(
        lambda x, w: F.conv2d(x, w, groups=2), {1: [0, 0, 0, 2, 2, 2]}, (X, (6, 2, 1, 1)), (1, (0, 1)),
        [{0, 1, 4, 5, 6}, {2, 3, 7, 8, 9}],
    ),
    "grouped transposed conv": Row(
        lambda x, w: F.conv_transpose2d(x, w, groups=2), {1: [0, 0, 0, 2, 2, 2]}, (X, (4, 3, 1, 1)), (1, (0, 1)),
        [{0, 1, 4, 5}, {2, 3, 6, 7}],
    ),
    "conv with one fixed kernel for all channels": Row(
        lambda x, w: F.conv2d(x, w, groups=4), SAME, (X, (4, 1, 1, 1)), (1, None)
    ),
    "conv of channels in the batch": Row(
        lambda x, w: F.conv2d(x, w), {0: [0, 1, 2, 3], 1: [6, 7]}, ((4, 2, 3, 3), (2, 2, 1, 1)), (0, (1, 0))
    ),
    "conv along channels": Row(
        lambda x, w: F.conv1d(x, w), {1: [6, 7]}, ((2, 2, 4), (2, 2, 1)), (2, (1, 0)), frozen=(0, 1, 2, 3)
    ),
    "conv with a weight that is none": Row(
        lambda x, w: F.conv2d(x, w), {1: [FROZEN] * 2, 2: [FROZEN] * 3, 3: [FROZEN] * 3}, (X, (2, 4, 1, 1)), (1, None),
        frozen=(0, 1, 2, 3),
    ),
    "linear": Row(lambda x, w: F.linear(x, w), {1: [8, 9]}, ((2, 4), (2, 4)), (1, (1, 0)), PAIRED),
    "linear with bias": Row(
        lambda x, w, b: F.linear(x, w, b), {1: [8, 9]}, ((2, 4), (2, 4), (2,)), (1, (1, 0), 0),
        [*PAIRED, {8, 10}, {9, 11}],
    ),
    "linear of a sequence": Row(
        lambda x, w: F.linear(x, w), {2: [8, 9]}, ((2, 3, 4), (2, 4)), (2, (1, 0)), PAIRED
    ),
    "linear, whole": Row(
        torch.inference_mode()(F.linear), {1: [8, 9]}, ((2, 4), (2, 4)), (1, (1, 0)), PAIRED
    ),
    "linear of what has channels in its rows": Row(
        F.linear, {0: [0, 1], 1: [8, 9]}, ((2, 3), (2, 3)), ((0, 1), (1, 0)), [{2, 5}, {3, 6}, {4, 7}]
    ),
    "mm with the weight on the left": Row(
        torch.mm, {0: [4, 5]}, ((2, 4), (4, 3)), ((1, 0), 0), [{0, 6}, {1, 7}, {2, 8}, {3, 9}]
    ),
    "mm of two activations": Row(torch.mm, {}, ((2, 4), (4, 3)), (1, None), frozen=(0, 1, 2, 3)),
    "mm of two activations with rows and columns": Row(torch.mm, {0: [0, 1], 1: [2, 3, 4]}, ((2, 4), (4, 3)), (0, 1)),
    "einsum with a weight": Row(
        lambda x, w: torch.einsum("nchw,kc->nkhw", x, w), {1: [8, 9]}, (X, (2, 4)), (1, (1, 0)), PAIRED
    ),
    "linear without a weight": Row(
        torch.inference_mode()(F.linear), {1: [FROZEN] * 2}, ((2, 4), (2, 4)), (1, None), frozen=(0, 1, 2, 3)
    ),
    "mv": Row(torch.mv, {0: [0, 1]}, ((2, 4), (4,)), ((0, 1), 0), [{2, 6}, {3, 7}, {4, 8}, {5, 9}]),
    "dot": Row(torch.dot, {}, (V, V), (0, 0), PAIRED),
    "attention": Row(
        F.scaled_dot_product_attention, {3: [8, 9, 10, 11]}, ((2, 2, 3, 4),) * 3, (3, 3, 3), frozen=range(8)
    ),
    "attention with heads": Row(
        F.scaled_dot_product_attention, {1: [0, 1]}, ((2, 2, 3, 4),) * 3, (None, (1, 3), 1), [{0, 6}, {1, 7}],
        range(2, 6),
    ),
    "unfold": Row(lambda x: F.unfold(x, (1, 2)), {1: [0, 0, 1, 1, 2, 2, 3, 3]}),
    "fold": Row(
        lambda x: F.fold(x, (1, 3), (1, 2)), {1: [0, 2]}, ((2, 4, 2),), (1,), [{0, 1}, {2, 3}]
    ),
    "embedding": Row(
        lambda w: F.embedding(torch.tensor([[0, 1]]), w), {2: [5, 6, 7, 8]}, ((5, 4),), ((0, 1),), frozen=range(5)
    ),
    "weight_norm": Row(
        lambda v, g: torch._weight_norm(v, g, 0), {0: [0, 1], 1: [2, 3, 4]}, ((2, 3), (2, 1)), ((0, 1), 0),
        [{0, 5}, {1, 6}],
    ),
    # unknown
    "gather": Row(
        lambda x: x.gather(1, torch.zeros(2, 4, 3, 3, dtype=torch.int64)), ALL_FROZEN, frozen=(0, 1, 2, 3)
    ),
    "fft": Row(lambda x: torch.fft.fft(x, dim=1), ALL_FROZEN, frozen=(0, 1, 2, 3)),
    "sort": Row(lambda x: x.sort(1)[0], ALL_FROZEN, frozen=(0, 1, 2, 3)),
}  # fmt: skip


def perform(row: Row) -> tuple[Bench, Any]:
    bench, tensors = Bench(), []
    for i, (shape, dims) in enumerate(zip(row.shapes, row.dims, strict=True)):
        tensor = torch.rand(shape) + 0.1
        along = () if dims is None else dims if isinstance(dims, tuple) else (dims,)
        tensors.append(bench.label(f"t{i}", tensor, *along))
    with torch.no_grad(), bench:
        out = row.op(*tensors)
    return bench, out


@pytest.mark.parametrize("name", ROWS)
def test_labels_after_an_op(name: str) -> None:
    row = ROWS[name]
    bench, out = perform(row)
    assert bench.seen(out) == row.out
    names = bench.names()
    slots = range(sum(bench.ledger.lengths))
    expected = {i: i for i in slots}
    for tie in row.ties:
        expected |= dict.fromkeys(tie, min(tie))
    expected |= dict.fromkeys(row.frozen, FROZEN)
    assert {i: names[i] for i in slots} == expected


def test_every_rule_has_a_row() -> None:
    used: set[Any] = set()
    for row in ROWS.values():
        used |= perform(row)[0].used
    assert {f.__name__ for f in {*RULES.values(), *TAGGED.values(), no_rule}} == {f.__name__ for f in used}


@pytest.mark.parametrize("name", ["gather", "fft", "sort"])
def test_frozen_labels_say_which_op_had_no_rule(name: str) -> None:
    reasons = set(perform(ROWS[name])[0].ledger.marks.values())
    assert len(reasons) == 1  # one reason, whoever is frozen by it
    assert "has no rule" in reasons.pop()


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("conv with bias", {("t1", 0): {"write"}, ("t1", 1): {"read"}, ("t2", 0): {"carry"}}),
        ("transposed conv", {("t1", 1): {"write"}, ("t1", 0): {"read"}}),
        ("depthwise conv", {("t1", 0): {"carry"}}),
        ("grouped conv", {("t1", 0): {"carry"}}),
        ("linear with bias", {("t1", 0): {"write"}, ("t1", 1): {"read"}, ("t2", 0): {"carry"}}),
        ("batch_norm", {("t1", 0): {"carry"}, ("t2", 0): {"carry"}}),
        ("embedding", {("t0", 1): {"write"}}),
    ],
)
def test_roles(name: str, roles: dict[tuple[str, int], set[str]]) -> None:
    assert perform(ROWS[name])[0].ledger.roles == {ParamAxis(*axis): role for axis, role in roles.items()}


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("conv", 9.0),  # pixels of the output, per sample
        ("transposed conv", 9.0),  # pixels of the input
        ("depthwise conv", 9.0),
        ("linear", 1.0),
        ("linear of a sequence", 3.0),
    ],
)
def test_uses_count_multiplications_per_weight_and_sample(name: str, macs: float) -> None:
    assert [(u.name, u.macs_per_weight) for u in perform(ROWS[name])[0].ledger.uses] == [("t1", macs)]


# ---- the table of rules ----------------------------------------------------------------------------------------------


def test_a_rule_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autowidth.rules.registry.RULES", dict(RULES))
    assert rule_for(torch.ops.aten.gather.default) is no_rule

    @rule("gather")
    def gathered(call: Call) -> list[Labels]:
        return [()]

    assert rule_for(torch.ops.aten.gather.default) is gathered
    assert "aten.gather" not in RULES


def test_a_tag_gives_a_rule_to_all_ops_that_bear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autowidth.rules.registry.TAGGED", dict(TAGGED))
    rand = torch.ops.aten.rand.default
    assert rule_for(rand) is no_rule

    @rule(tag=torch.Tag.nondeterministic_seeded)
    def drawn(call: Call) -> list[Labels]:
        return [()]

    assert rule_for(rand) is drawn
    assert rule_for(torch.ops.aten.native_dropout.default) is not drawn  # a rule of its own comes first


def test_every_file_with_rules_is_imported_by_the_package() -> None:
    files = [path for path in Path(rules.__path__[0]).glob("*.py") if "\n@rule(" in path.read_text()]
    assert {path.stem for path in files} == {
        name for name in rules.__all__ if isinstance(getattr(rules, name), ModuleType)
    }


def test_examples_in_docstrings_hold() -> None:
    found = [doctest.testmod(module) for module in (labels, movement)]
    assert [result.failed for result in found] == [0, 0]
    assert all(result.attempted for result in found)


def test_an_op_in_place_has_the_rule_of_its_twin() -> None:
    aten = torch.ops.aten
    for name in ("hardswish", "gelu", "mish", "threshold", "masked_fill", "relu", "cumsum", "transpose"):
        ours = [rule_for(getattr(getattr(aten, n), getattr(aten, n).overloads()[0])) for n in (name, f"{name}_")]
        assert ours[0] is ours[1], name
