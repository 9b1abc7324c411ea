"""The optimizer of a run, as its settings name it."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from autowidth.lab.loop_parts import decayed_and_not
from autowidth.lab.settings import Settings


def optimizer_of(network: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer of the parameters that train, at the peak of the learning rate."""
    parts = decayed_and_not(network, settings.weight_decay)
    if settings.optimizer == "adamw":
        return AdamW(parts, settings.lr, betas=(settings.momentum, 0.999))
    return SGD(parts, settings.lr, settings.momentum, nesterov=True)
