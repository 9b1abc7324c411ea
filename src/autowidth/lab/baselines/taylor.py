"""First-order Taylor terms (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import channels, empty, filters
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="taylor", unit=None, scope="network", source="Molchanov et al. 2019, arXiv 1906.10771")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The squared first-order loss change when a filter's weights go to zero, (width,) by channel group; nats^2.

    (sum of gradient x weight over the filter)^2, its square taken for every batch and averaged over batches, as in
    the paper's code; so it depends on the batch size. Where several layers write a channel, their squares are added.
    Biases do not count. In evaluation mode: under batch statistics the term is zero for a filter in front of a norm,
    since the loss does not depend on the filter's scale.
    """
    weights = effective_weights(model)
    importances = {group.name: empty(group, weights) for group in channel_map.groups}
    writers = [(group.name, place) for group in channel_map.groups for place in group.with_role("write")]
    names = sorted({place.axis.name for _, place in writers})
    with torch.enable_grad():
        for inputs, target in batches:
            live = effective_weights(model)
            value = loss(model, (inputs.detach().clone().requires_grad_(), target))
            found = torch.autograd.grad(value, [live[name] for name in names], allow_unused=True)
            products = {n: g * live[n] for n, g in zip(names, found, strict=True) if g is not None}
            for group, place in writers:
                if place.axis.name in products:
                    change = filters(products[place.axis.name], place.axis).sum(1)
                    importances[group] += channels(change, place).square() / len(batches)
    return importances
