"""First-order Taylor terms of gates (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import empty
from autowidth.lab.baselines.calls import watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="taylor-gate", unit="nats", scope="network", source="Molchanov et al. 2019, arXiv 1906.10771")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The size of the first-order loss change when a channel's gate closes, (width,) by channel group; nats.

    The gate is on the activations: one factor on a channel in front of all its readers, so that a residual stream has
    a single gate. Its gradient is activation x gradient, summed over readers and positions. The paper squares it for
    every batch; here its absolute value is taken for every sample and averaged, which is independent of the batch
    size and has the unit of a loss (the form of Molchanov et al. 2017, arXiv 1611.06440).
    """
    weights = effective_weights(model)
    importances = {group.name: empty(group, weights) for group in channel_map.groups}
    total = sum(len(inputs) for inputs, _ in batches)
    for inputs, target in batches:
        for name, change in gates(model, channel_map, inputs, target, loss).items():
            importances[name] += change.abs().sum(0) / total
    return importances


def gates(model: nn.Module, channel_map: ChannelMap, inputs: Tensor, target: Any, loss: Loss) -> dict[str, Tensor]:
    """The derivative of each sample's loss by the gate of each channel, (N, width) by channel group."""
    image, samples = inputs.detach().clone().requires_grad_(), len(inputs)
    with torch.enable_grad():
        value, calls = watched(model, lambda: loss(model, (image, target)))
        found = torch.autograd.grad(value, [call.source for call in calls], allow_unused=True)
    changes = {group.name: torch.zeros(samples, group.width, device=image.device) for group in channel_map.groups}
    for call, gradient in zip(calls, found, strict=True):
        if gradient is None:
            continue
        product = (call.source.detach() * gradient).movedim(call.dim, -1)
        of_sample = product.reshape(samples, -1, product.size(-1)).sum(1) * samples
        for group in channel_map.groups:
            for place in group.with_role("read"):
                if place.axis.name == call.weight:
                    changes[group.name] += of_sample[:, torch.tensor(place.index, device=image.device)].sum(-1)
    return changes
