"""Rules of pooling, interpolation and reductions: channels that are not reduced keep their labels."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from autowidth.rules.labels import Labels, lies_along, shrunk, spread
from autowidth.rules.registry import Call, outputs, rule


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_max_pool1d", "adaptive_avg_pool2d", "mkldnn_max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
      "_upsample_nearest_exact1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_linear1d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d",
      "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
      "grid_sampler_3d", "_upsample_nearest_exact3d", "fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d",
      "max_unpool3d")  # fmt: skip
def spatial(call: Call) -> list[Labels]:
    """Ops that change the trailing, spatial dims only: channels keep their labels, those along pixels are frozen."""
    source = call["self"] if "self" in call.args else call["input"]
    if isinstance(grid := call.args.get("grid"), Tensor):
        call.ledger.freeze(call.labels_of(grid), f"{call.name}: these are coordinates{call.ledger.where()}")
    shapes = [out.shape for out in outputs(call.out)]
    changed = _spatial_dims(call, source)
    reason = f"{call.name}: channels lie along a spatial dim{call.ledger.where()}"
    kept: list[Tensor] = []
    lost: set[int] = set()
    for label in call.labels_of(source):
        lying = lies_along(label) & changed
        if lying:
            call.ledger.freeze((label,), reason)
            lost |= lying
        if not lying or lies_along(label) - changed:
            kept.append(_first_of(label, changed))
    marks = {d: call.ledger.mark(reason, shapes[0][d]) for d in sorted(lost)}
    return [
        (*(label.expand(shape) for label in kept), *(spread(mark, shape, d) for d, mark in marks.items()))
        for shape in shapes
    ]


def _spatial_dims(call: Call, source: Tensor) -> set[int]:
    """The dims that such an op may change: those that it has changed, and all from the third on."""
    shape = outputs(call.out)[0].shape
    dims = {d for d in range(source.dim()) if source.size(d) != shape[d]} | set(range(2, source.dim()))
    if source.dim() == 3 and len(shape) == 3 and call.name.endswith("2d"):
        dims -= {0}  # an image without a batch
    return dims


def _first_of(label: Tensor, dims: Iterable[int]) -> Tensor:
    """The label tensor at the first position of these dims, which remain with size 1."""
    for d in dims:
        label = label.narrow(d, 0, 1)
    return label


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
      "logsumexp", "prod", "any", "all", "median", "nansum", "aminmax")  # fmt: skip
def reduction(call: Call) -> list[Labels]:
    """Reductions keep labels on the dims that they keep; over a channel dim the identity ends."""
    source = call["self"]
    if isinstance(call.args.get("other"), Tensor):  # max(x, y) is elementwise
        return [call.merged()]
    dims = call.args.get("dim")
    dims = list(range(source.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    gone = {d % max(source.dim(), 1) for d in dims}
    shapes = [out.shape for out in outputs(call.out)]
    kept = []
    for label in call.labels_of(source):
        if lies_along(label) and not lies_along(label) - gone:
            continue
        for d in sorted(gone & lies_along(label)):  # (channel, part) summed over the parts: all parts are the channel
            call.ledger.unite(shrunk(label).narrow(d, 0, 1), shrunk(label))
        kept.append(_first_of(label, sorted(gone)))
    small = [label if len(shapes[0]) == source.dim() else _without(label, gone) for label in kept]
    return [tuple(label.expand(shape) for label in small) for shape in shapes]


def _without(label: Tensor, dims: set[int]) -> Tensor:
    """The label tensor without these dims."""
    for d in sorted(dims, reverse=True):
        label = label.select(d, 0)
    return label
