"""Optimal brain damage (LeCun, Denker, Solla 1990), its diagonal saliencies added up over a filter."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.review.batches import Batches, Loss
from autowidth.review.state import named_tensors

_VALUES = 2**25
"""Gradients that are held at once, as numbers: bounds the memory, not the result."""


@registry.importance(name="obd", unit="nats", scope="network", source="LeCun, Denker, Solla 1990, NIPS 2")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The sum of 1/2 h w^2 over a filter's weights, (width,) by channel group; nats.

    The paper computes the diagonal h of the Hessian by a backward pass of second derivatives with the Gauss-Newton
    term alone; here h is the mean square of the gradients of single samples, the diagonal of the empirical Fisher
    matrix, which stands for the same term. Where several layers write a channel, their sums are added; what is between
    the weights of a filter is lost, which is what the Kronecker-factored variant mends.
    """
    names = {place.axis.name for group in channel_map.groups for place in group.with_role("write")}
    weights = {name: p.detach() for name, p in model.named_parameters() if name in names}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    total = sum(len(inputs) for inputs, _ in batches)
    for inputs, target in batches:
        step = max(1, _VALUES // sum(w.numel() for w in weights.values()))
        for start in range(0, len(inputs), step):
            part = slice(start, start + step)
            for name, g in sample_gradients(model, weights, inputs[part], target[part], loss).items():
                squares[name] += g.square().sum(0)
    saliencies = {name: w.square() * squares[name] / (2 * total) for name, w in weights.items()}
    anything = {**named_tensors(model), **saliencies}
    return sum_over_writers(channel_map, anything, lambda filters: filters.sum(1))


def sample_gradients(
    model: nn.Module, weights: dict[str, Tensor], inputs: Tensor, target: Tensor, loss: Loss
) -> dict[str, Tensor]:
    """The gradient of each sample's loss, (N, ...) for every weight in `weights`, by name."""
    rest = named_tensors(model)
    fixed = {name: tensor.detach() for name, tensor in rest.items() if name not in weights}

    def of_sample(live: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with_weights = partial(functional_call, model, {**fixed, **live})
        return loss(with_weights, (x[None], y[None]))  # type: ignore[arg-type]

    gradients: dict[str, Tensor] = vmap(grad(of_sample), in_dims=(None, 0, 0))(weights, inputs, target)
    return gradients
