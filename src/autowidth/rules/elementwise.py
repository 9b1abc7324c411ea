"""Rules of ops that keep the shape: elementwise, gated, softmax, running sums, and results without an identity."""

from __future__ import annotations

import torch

from autowidth.rules.labels import Labels, lies_along, moved
from autowidth.rules.ledger import merged
from autowidth.rules.registry import Call, outputs, rule


@rule("_prelu_kernel", "copy_", "_to_copy", "native_dropout", "rrelu_with_noise", "masked_fill", "lerp", "layer_norm",
      "hardswish", "log_sigmoid_forward", tag=torch.Tag.pointwise)  # fmt: skip
def pointwise(call: Call) -> list[Labels]:
    """Elementwise ops: labels are broadcast to the output and united where they lie along the same dim."""
    out, labels = outputs(call.out)[0], call.merged()
    if call.op._schema.is_mutable and out._is_view() and len(labels) > len(call.labels_of(out)):
        call.ledger.freeze(labels, f"{call.name} writes channels into a view of another tensor{call.ledger.where()}")
    return [labels]


@rule("glu")
def gated(call: Call) -> list[Labels]:
    """One half of a dim times a function of the other half: a channel is a pair."""
    halves = [label.chunk(2, call.args.get("dim", -1)) for label in call.labels_of(call["self"])]
    first, second = (moved((pair[i] for pair in halves), lambda label: label) for i in (0, 1))
    return [merged(call.ledger, [first, second], call.out.shape)]


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def same_shape(call: Call) -> list[Labels]:
    """Ops along one dim that keep the shape and treat all its positions alike: everybody keeps the label."""
    return [call.labels_of(call["self"])]


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(call: Call) -> list[Labels]:
    """Running sums and the like: along channels each one depends on its place among the others, so they are frozen."""
    labels, dim = call.labels_of(call["self"]), call["dim"] % max(call["self"].dim(), 1)
    tangled = tuple(label for label in labels if dim in lies_along(label))
    call.ledger.freeze(tangled, f"{call.name} runs along channels{call.ledger.where()}")
    return [labels for _ in outputs(call.out)]


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
      "new_empty", "new_full", "bernoulli", "argmax", "argmin", "argsort", "_local_scalar_dense", "is_same_size",
      "lift_fresh", "sym_size", "zero_", "fill_", "bernoulli_", "uniform_", "normal_")  # fmt: skip
def nameless(call: Call) -> list[Labels]:
    """Ops whose result has no channel identity of its own."""
    return [call.labels_of(t) if call.op._schema.is_mutable else () for t in outputs(call.out)]
