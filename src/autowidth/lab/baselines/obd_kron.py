"""Optimal brain damage of whole filters, Kronecker-factored: C-OBD of Wang, Grosse, Fidler, Zhang 2019, 1905.05934."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import channels, empty
from autowidth.lab.baselines.calls import Call, watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights


@registry.importance(name="obd-kron", unit="nats", scope="network", source="Wang et al. 2019, arXiv 1905.05934")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """1/2 S_oo w_o' A w_o for every filter o, (width,) by channel group; nats.

    A layer's Fisher matrix is taken as the Kronecker product of A = E[a a'], of the patches that it reads, and
    S = P E[g g'], of the gradients at its P output positions (Grosse and Martens 2016, arXiv 1602.01407). Since
    w_o' A w_o is the mean square of what the filter writes, neither factor is built. The bias belongs to the filter.
    The paper samples targets from the network's own predictions; here they are those of the data (empirical Fisher).
    Where several layers write a channel, their numbers are added.
    """
    weights = effective_weights(model)
    sums: dict[str, _Squares] = {}
    total = sum(len(inputs) for inputs, _ in batches)
    with torch.enable_grad():
        for inputs, target in batches:
            image = inputs.detach().clone().requires_grad_()
            value, calls = watched(model, lambda x=image, y=target: loss(model, (x, y)))  # type: ignore[misc]
            found = torch.autograd.grad(value, [call.out for call in calls], allow_unused=True)
            for call, gradient in zip(calls, found, strict=True):
                if gradient is not None:
                    squares = _Squares.of(call, gradient * len(inputs))
                    sums[call.weight] = squares + sums[call.weight] if call.weight in sums else squares
    importances = {}
    for group in channel_map.groups:
        importances[group.name] = empty(group, weights)
        for place in group.with_role("write"):
            if place.axis.name in sums:
                importances[group.name] += channels(sums[place.axis.name].saliency(total), place)
    return importances


@dataclass(frozen=True, slots=True, kw_only=True)
class _Squares:
    """Sums of squares over positions of what a weight wrote, (o,), and of the gradients there, (o,)."""

    written: Tensor
    gradients: Tensor
    positions: int

    @classmethod
    def of(cls, call: Call, gradient: Tensor) -> _Squares:
        y, g = (t.detach().movedim(call.dim, -1).flatten(0, -2) for t in (call.out, gradient))
        return cls(written=y.square().sum(0), gradients=g.square().sum(0), positions=len(y))

    def __add__(self, other: _Squares) -> _Squares:
        return _Squares(
            written=self.written + other.written,
            gradients=self.gradients + other.gradients,
            positions=self.positions + other.positions,
        )

    def saliency(self, samples: int) -> Tensor:
        """1/2 P E[y^2] E[g^2], with P positions per sample and means over positions, (o,)."""
        return self.written * self.gradients / (2 * samples * self.positions)
