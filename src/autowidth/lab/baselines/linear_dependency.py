"""Linear dependency of feature maps (Pan, Chao, Qian, Zhuang, Wang, Xiao 2021, LDFM, ICASSP, pages 1720-1724)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap, ParamAxis
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import empty, readers
from autowidth.lab.baselines.calls import watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="linear-dependency", unit=None, scope="layer", source="Pan et al. 2021, ICASSP, page 1720")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """|R_ii| of a channel in the QR decomposition with column pivoting of all maps of its layer, (width,) by group.

    No unit: it is as large as the activations are, and layers differ in that; of the paper only the abstract is known
    to us, which ranks within a layer. Its matrix has one column per channel and one row per image and position. A
    layer is here what one reader gets (before global pooling or flattening, if it gets maps pooled), maps are not
    centred, and where several layers read a channel, their numbers are averaged.
    """
    readings = readers(channel_map)
    grams: dict[ParamAxis, Tensor] = {}
    with torch.no_grad():
        for inputs, _ in batches:
            _, calls = watched(model, lambda x=inputs: model(x))  # type: ignore[misc]
            for axis, on_axis in readings.items():
                for call in calls:
                    if call.weight == axis.name:
                        maps = torch.cat([call.maps(place).flatten(2) for _, place in on_axis], dim=1)
                        columns = maps.transpose(0, 1).flatten(1).double()
                        grams[axis] = grams.get(axis, 0) + columns @ columns.T
    weights = effective_weights(model)
    importances = {group.name: empty(group, weights) for group in channel_map.groups}
    for axis, gram in grams.items():
        sizes = [len(place.index) for _, place in readings[axis]]
        for (name, _), part in zip(readings[axis], pivots(gram).split(sizes), strict=True):
            seen = sum(place.axis in grams for place in channel_map.group(name).with_role("read"))
            importances[name] += part.float() / seen
    return importances


def pivots(gram: Tensor) -> Tensor:
    """|R_ii| of each column of X in its QR decomposition with column pivoting, (c,), from X'X (c, c).

    The pivoted Cholesky factor of X'X is R up to signs: the column with the largest rest is taken, its direction is
    removed from all others, and so on.
    """
    rest, found = gram.clone(), torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    left = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(len(gram)):
        pivot = int(torch.where(left, rest.diagonal(), -torch.inf).argmax())
        left[pivot] = False
        size = rest[pivot, pivot].clamp_min(0)
        found[pivot] = size.sqrt()
        if size > 0:
            rest = rest - torch.outer(rest[:, pivot], rest[pivot]) / size
    return found
