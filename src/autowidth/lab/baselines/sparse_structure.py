"""Sparse structure selection (Huang and Wang 2018, arXiv 1707.01213): factors behind the norms, driven to zero."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import channels
from autowidth.review.batches import Batches, Loss


@registry.importance(
    name="sparse-structure", unit=None, scope="network", source="Huang and Wang 2018, arXiv 1707.01213"
)
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The length of (scale, bias) of a channel's batch norm, (width,) by channel group; no unit. Data do not count.

    The paper removes what has a factor of exactly zero behind it, and reaches a size by the strength of the penalty.
    Its factors are part of scale and bias here (`SparseStructure`), so the length is zero for the same channels, and
    ranks the others where a given size asks for more. Where a channel passes through several norms, their lengths are
    added; a channel group without a batch norm gets NaN.
    """
    lengths = {
        name: torch.hypot(m.weight.detach().float(), m.bias.detach().float()) for name, m in _norms(model).items()
    }
    importances = {}
    for group in channel_map.groups:
        found = [place for place in group.with_role("carry") if place.axis.name in lengths]
        parts = [channels(lengths[place.axis.name], place) for place in found]
        importances[group.name] = torch.stack(parts).sum(0) if parts else torch.full((group.width,), torch.nan)
    return importances


@dataclass(slots=True)
class _Factors:
    """The factors behind one norm and their velocity, the norm's scale and bias without them; all (length,).

    `gradient` is that of the factors, from the backward pass to the step, otherwise None.
    """

    scale: Tensor
    bias: Tensor
    factor: Tensor
    velocity: Tensor
    gradient: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class SparseStructure:
    """Trains a factor behind every removable channel of every batch norm, under an L1 penalty of this strength.

    Accelerated proximal gradient steps in the paper's form (equations 10 to 12): with gradient g, penalty s and
    momentum m, z = soft(f - lr g, lr s), v = z - f + m v, f = z + m v, and no factor below zero, as in the authors'
    code. Factors start at one and have no weight decay. The network gets no new parameters: its scales and biases are
    the products with the factors, and between after_backward and after_step, for the optimizer, they stand without
    them, as if the factors were a layer of their own.

    The paper puts factors behind neurons (VGG), groups (ResNeXt) and blocks (ResNet); here they are behind channels, of
    which a residual stream has one factor for each norm that it passes. In the paper the strength decides how much goes
    and differs between networks (0.01 for blocks of ResNet-50 in the authors' code); the default here is that of
    network slimming, since a ranking decides the rest.
    """

    strength: float = 1e-4
    momentum: float = 0.9
    known: dict[str, _Factors] = field(default_factory=dict, init=False, repr=False)

    @torch.no_grad()
    def after_backward(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Takes the factors out of scales and biases, and notes the gradients of the factors."""
        carried = _removable(channel_map)
        for name, norm in _norms(model).items():
            if name not in carried or norm.weight.grad is None or norm.bias.grad is None:
                continue
            found = self.known.get(name)
            if found is None or found.factor.shape != norm.weight.shape:
                one = torch.ones_like(norm.weight)
                found = _Factors(norm.weight.clone(), norm.bias.clone(), one, torch.zeros_like(one))
                self.known[name] = found
            found.gradient = norm.weight.grad * found.scale + norm.bias.grad * found.bias
            norm.weight.grad.mul_(found.factor)
            norm.bias.grad.mul_(found.factor)
            norm.weight.copy_(found.scale)
            norm.bias.copy_(found.bias)

    @torch.no_grad()
    def after_step(self, model: nn.Module, channel_map: ChannelMap, progress: float, lr: float) -> None:
        """Makes the factors' own step and puts them back into scales and biases."""
        carried = _removable(channel_map)
        for name, norm in _norms(model).items():
            found = self.known.get(name)
            if found is None or found.gradient is None:
                continue
            index = torch.tensor(carried[name], device=norm.weight.device)
            factor, velocity = found.factor[index], found.velocity[index]
            near = soft(factor - lr * found.gradient[index], lr * self.strength)
            velocity = near - factor + self.momentum * velocity
            found.factor[index] = (near + self.momentum * velocity).clamp_min(0)
            found.velocity[index] = velocity
            found.scale, found.bias, found.gradient = norm.weight.clone(), norm.bias.clone(), None
            norm.weight.mul_(found.factor)
            norm.bias.mul_(found.factor)

    def after_epoch(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Nothing."""


@registry.training_rule(
    name="sparse-structure", importance="sparse-structure", source="Huang and Wang 2018, arXiv 1707.01213"
)
def rule(*, widths_left: float) -> SparseStructure:
    """The rule, which is the same whatever share of the widths is left."""
    return SparseStructure()


def soft(values: Tensor, threshold: float) -> Tensor:
    """The values moved towards zero by the threshold, and not beyond."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms with scale and bias, by the scale's name."""
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}


def _removable(channel_map: ChannelMap) -> dict[str, list[int]]:
    """The positions of removable channels on every parameter that carries some, by its name."""
    found: dict[str, list[int]] = {}
    for group in channel_map.groups:
        for place in group.with_role("carry"):
            found.setdefault(place.axis.name, []).extend(position for row in place.index for position in row)
    return found
