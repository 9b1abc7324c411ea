"""Rules of ops that mix channels: convolutions, sliding windows, linear layers, matrix products, attention, tables."""

from __future__ import annotations

import math

from torch import Tensor

from autowidth.rules.labels import Labels, lies_along, moved, shrunk, spread
from autowidth.rules.ledger import merged
from autowidth.rules.registry import Call, frozen_by, outputs, rule

# ---- convolutions and sliding windows --------------------------------------------------------------------------------


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(call: Call) -> list[Labels]:
    """Convolutions read the input's channels with one dim of the weight and write new ones with the other."""
    transposed, groups = call.args.get("transposed", False), call["groups"]
    image = call["input"] if "input" in call.args else call["self"]
    reads, writes = call.along("weight", 0 if transposed else 1), call.along("weight", 1 if transposed else 0)
    channel_dim = image.dim() - (call["weight"].dim() - 1)
    kept = _beside(call, image, channel_dim)
    channel = call.ledger.along(call.labels_of(image), channel_dim)
    if groups == 1 and (reads is None or writes is None):
        return frozen_by(call, "the weight is no parameter")
    if writes is not None:
        pixels = math.prod((image if transposed else call.out).shape[channel_dim + 1 :])
        call.ledger.use(call["weight"], writes, pixels * (image.size(0) if channel_dim else 1))
    if groups == 1:
        _mixed(call, channel, reads, writes)
        result = writes
    else:
        result = _grouped(call, channel, groups, reads if transposed else writes, call.out.size(channel_dim))
    bias = call.along("bias", 0)
    if bias is not None and result is not None:
        call.ledger.unite(result, bias)
        call.ledger.play(bias, "carry")
    fresh = () if result is None else (spread(result, call.out.shape, channel_dim),)
    return [(*fresh, *(label.expand(call.out.shape) for label in kept))]


def _beside(call: Call, image: Tensor, channel_dim: int) -> Labels:
    """What of an image's labels a convolution keeps: those along the batch. Those along pixels are frozen."""
    kept = []
    for label in call.labels_of(image):
        lying = lies_along(label)
        if any(d > channel_dim for d in lying):
            call.ledger.freeze((label,), f"{call.name} slides along channels{call.ledger.where()}")
        if lying == {0} and channel_dim:
            kept.append(shrunk(label))
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
    """Grouped convolutions: a whole conv group, in and out, is one channel. Returns the ids of the output (width,).

    `first` (n,) are the slots of the weight's first dim; they are carried, whichever side of the layer they are on.
    A kernel that is the same for all channels, such as a blur, has none.
    """
    sides = [side.view(groups, -1) for side in (first, channel) if side is not None]
    for side in sides:
        call.ledger.unite(sides[0][:, :1], side)
    if first is not None:
        call.ledger.play(first, "carry")
    return sides[0][:, 0].repeat_interleave(width // groups) if sides else None


@rule("im2col")
def windows(call: Call) -> list[Labels]:
    """Sliding windows: each channel becomes as many neighbouring rows as the window has pixels."""
    image, pixels = call["self"], math.prod(call["kernel_size"])
    at = image.dim() - 3
    _beside(call, image, at)
    channel = call.ledger.along(call.labels_of(image), at)
    return [() if channel is None else (spread(channel.repeat_interleave(pixels), call.out.shape, at),)]


@rule("col2im")
def folded(call: Call) -> list[Labels]:
    """Sliding windows put back (torch's fold): the rows of a window are one channel."""
    at = call["self"].dim() - 2
    _beside(call, call["self"], at)
    rows = call.along("self", at)
    if rows is None:
        return [()]
    rows = rows.view(-1, math.prod(call["kernel_size"]))
    call.ledger.unite(rows[:, :1], rows)
    return [(spread(rows[:, 0], call.out.shape, at),)]


# ---- linear layers and matrix products -------------------------------------------------------------------------------

_FACTORS = {"aten.mm": ("self", "mat2"), "aten.addmm": ("mat1", "mat2"), "aten.bmm": ("self", "mat2"),
            "aten.baddbmm": ("batch1", "batch2")}  # fmt: skip


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul(call: Call) -> list[Labels]:
    """Linear layers arrive as input @ weight.t(): the summed dim reads, the other one writes.

    Of a product of two activations the rows and columns keep their labels; the dim that is summed over is frozen.
    """
    left, right = (call[name] for name in _FACTORS[call.name])
    bias = call.along("self", -1) if call.name in ("aten.addmm", "aten.baddbmm") else None
    if _is_matrix(call, right):
        return _linear(call, left, -1, (right, -2, -1), bias)
    if _is_matrix(call, left):
        return _linear(call, right, -2, (left, -1, -2), bias)
    if bias is not None:
        return frozen_by(call, "no operand is a parameter")
    kept: list[Labels] = []
    for factor, summed in ((left, -1), (right, -2)):
        labels = call.labels_of(factor)
        lost = tuple(label for label in labels if summed % factor.dim() in lies_along(label))
        call.ledger.freeze(lost, f"{call.name} sums over channels of two activations{call.ledger.where()}")
        kept.append(_rows(labels, summed))
    return [merged(call.ledger, kept, call.out.shape)]


@rule("linear")
def linear(call: Call) -> list[Labels]:
    """Linear layers that arrive whole."""
    if not _is_matrix(call, call["weight"]):
        return frozen_by(call, "the weight is no parameter")
    return _linear(call, call["input"], -1, (call["weight"], 1, 0), call.along("bias", 0))


def _is_matrix(call: Call, factor: Tensor) -> bool:
    """Whether a factor is one weight, the same for the whole batch: with labels on both of its dims."""
    if factor.dim() > 2 and factor.size(0) > 1 and factor.stride(0) != 0:
        return False
    labels = call.labels_of(factor)
    return all(call.ledger.along(labels, d) is not None for d in (-1, -2))


def _rows(labels: Labels, summed: int) -> Labels:
    """What is left of a factor's labels when one of its dims is summed over: those that lie along the other ones."""
    left = (label.narrow(summed, 0, 1) for label in labels)
    return tuple(label for label in left if lies_along(label))


def _linear(
    call: Call, image: Tensor, summed: int, weight: tuple[Tensor, int, int], bias: Tensor | None
) -> list[Labels]:
    """A linear layer that sums over one dim of the image: `weight` is the matrix, its reading and its writing dim."""
    matrix, reading, writing = weight
    labels, of_matrix = call.labels_of(image), call.labels_of(matrix)
    reads, writes = call.ledger.along(of_matrix, reading), call.ledger.along(of_matrix, writing)
    assert reads is not None and writes is not None
    call.ledger.use(matrix[0] if matrix.dim() > 2 else matrix, writes, image.numel() // max(image.size(summed), 1))
    _mixed(call, call.ledger.along(labels, summed), reads, writes)
    if bias is not None:
        call.ledger.unite(writes, bias)
        call.ledger.play(bias, "carry")
    fresh = spread(writes, call.out.shape, call.out.dim() + summed)
    return [merged(call.ledger, [(fresh,), _rows(labels, summed)], call.out.shape)]


@rule("mv")
def matrix_vector(call: Call) -> list[Labels]:
    """A matrix times a vector: what is summed over is one kind of channel, the rows keep their labels."""
    summed, vector = call.along("self", 1), call.along("vec", 0)
    if summed is not None and vector is not None:
        call.ledger.unite(summed, vector)
    rows = _rows(call.labels_of(call["self"]), 1)
    return [moved(rows, lambda label: label.select(1, 0).expand(call.out.shape))]


@rule("dot", "vdot")
def inner(call: Call) -> list[Labels]:
    """An inner product: its two vectors have the same channels, the result has none."""
    a, b = call.along("self", 0), call.along("other" if "other" in call.args else "tensor", 0)
    if a is not None and b is not None:
        call.ledger.unite(a, b)
    return [()]


# ---- attention, tables, computed weights -----------------------------------------------------------------------------


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math")  # fmt: skip
def attention(call: Call) -> list[Labels]:
    """Attention that arrives whole: queries and keys are summed over and frozen, values keep their channels."""
    kept: list[Labels] = []
    for name, summed in (("query", (-1,)), ("key", (-1, -2)), ("value", (-2,))):
        labels = call.labels_of(call[name])
        lost = tuple(label for label in labels if any(d % label.dim() in lies_along(label) for d in summed))
        call.ledger.freeze(lost, f"{call.name} sums over channels of two activations{call.ledger.where()}")
        for d in summed:
            labels = _rows(labels, d)
        kept.append(labels)
    out, *others = outputs(call.out)
    return [merged(call.ledger, kept, out.shape), *(() for _ in others)]


@rule("embedding")
def embedding(call: Call) -> list[Labels]:
    """Embedding tables write channels with their second dim; the vocabulary is frozen."""
    vocabulary = call.along("weight", 0)
    call.ledger.freeze(() if vocabulary is None else (vocabulary,), "a vocabulary, not channels")
    writes = call.along("weight", 1)
    if writes is None:
        return frozen_by(call, "the table is no parameter")
    call.ledger.play(writes, "write")
    return [(spread(writes, call.out.shape, call.out.dim() - 1),)]


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> list[Labels]:
    """The weight g v / |v| has the channels of v; g has those of the dim that it keeps."""
    direction, gain = call["v"], call["g"]
    labels = merged(call.ledger, [call.labels_of(direction), call.labels_of(gain)], direction.shape)
    return [labels, call.labels_of(gain)]
