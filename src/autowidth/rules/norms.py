"""Rules of norms: scale, shift and running statistics carry the channel."""

from __future__ import annotations

from autowidth.rules.labels import Labels, spread
from autowidth.rules.registry import Call, rule


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")  # fmt: skip
def batch_norm(call: Call) -> list[Labels]:
    """Per-channel norms: scale, shift and running statistics carry the channel."""
    channel = call.along("input", 1)
    carried = [call.along(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    vectors = [vector for vector in carried if vector is not None]
    channel = channel if channel is not None else (vectors[0] if vectors else None)
    if channel is None:
        return [()]
    for vector in vectors:
        call.ledger.unite(channel, vector)
        call.ledger.play(vector, "carry")
    return [call.labels_of(call["input"]) or (spread(channel, call["input"].shape, 1),)]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Labels]:
    """Channels normalised together leave together, norm group by norm group, unless there is only one group."""
    channel, groups = call.along("input", 1), call["group"]
    for name in ("weight", "bias"):
        vector = call.along(name, 0)
        if vector is not None and channel is not None:
            call.ledger.unite(channel, vector)
            call.ledger.play(vector, "carry")
    if channel is not None and groups > 1:
        rows = channel.view(groups, -1)
        call.ledger.unite(rows[:, :1], rows)
    return [call.labels_of(call["input"])]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> list[Labels]:
    """Norms across channels: scale and shift carry the channel, every channel keeps its label."""
    return [call.merged()]
