"""What a published method does to the weights while they train."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from autowidth.channels import ChannelMap


class TrainingRule(Protocol):
    """What is done to the weights of a network in training; `progress` is the share of the run until the removal."""

    def after_backward(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Between the backward pass and the optimizer step: may change gradients."""

    def after_step(self, model: nn.Module, channel_map: ChannelMap, progress: float, lr: float) -> None:
        """After the optimizer step, which was made at the learning rate `lr`: may change weights."""

    def after_epoch(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """After an epoch, before the evaluation: may change weights."""
