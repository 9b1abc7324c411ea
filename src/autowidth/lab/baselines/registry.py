"""The published methods by name: importance measures and training rules, each entered where it is defined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from autowidth.channels import ChannelMap
from autowidth.review.review import Importance

Scope = Literal["layer", "network"]
"""What filters are ranked against: those of their channel group, or all filters of the network."""


class TrainingRule(Protocol):
    """What is done to the weights of a network in training; `progress` is the share of the run until the removal."""

    def after_backward(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """Between the backward pass and the optimizer step: may change gradients."""

    def after_step(self, model: nn.Module, channel_map: ChannelMap, progress: float, lr: float) -> None:
        """After the optimizer step, which was made at the learning rate `lr`: may change weights."""

    def after_epoch(self, model: nn.Module, channel_map: ChannelMap, progress: float) -> None:
        """After an epoch, before the evaluation: may change weights."""


class Schedule(Protocol):
    """Makes a fresh training rule with its paper's strength, for a run of which a share of every width will be left."""

    def __call__(self, *, widths_left: float) -> TrainingRule: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedImportance:
    """A published importance measure, and what is to be known of it.

    unit: "nats" where it predicts a change of the loss, None where it only ranks. scope: `layer` where the paper gives
    every layer a share of its own, `network` where it ranks all filters. source: authors, year, and where to find it.
    """

    name: str
    importance: Importance
    unit: Literal["nats"] | None
    scope: Scope
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRule:
    """A published way to train towards a removal; `importance` names the measure that removes when it is done."""

    name: str
    schedule: Schedule
    importance: str
    source: str


IMPORTANCES: dict[str, PublishedImportance] = {}
"""The importance measures by name. Importing the package, not this file alone, fills it."""

TRAINING_RULES: dict[str, PublishedRule] = {}
"""The training rules by name, filled in the same way."""


def importance(
    *, name: str, unit: Literal["nats"] | None, scope: Scope, source: str
) -> Callable[[Importance], Importance]:
    """Enters the decorated function as the importance measure of this name. Raises ValueError for a name taken."""

    def entered(function: Importance) -> Importance:
        if name in IMPORTANCES:
            raise ValueError(f"two importance measures are named {name!r}")
        IMPORTANCES[name] = PublishedImportance(
            name=name, importance=function, unit=unit, scope=scope, source=source
        )  # fmt: skip
        return function

    return entered


def training_rule(*, name: str, importance: str, source: str) -> Callable[[Schedule], Schedule]:
    """Enters the decorated function, which makes a rule, under this name. Raises ValueError for a name taken."""

    def entered(schedule: Schedule) -> Schedule:
        if name in TRAINING_RULES:
            raise ValueError(f"two training rules are named {name!r}")
        TRAINING_RULES[name] = PublishedRule(name=name, schedule=schedule, importance=importance, source=source)
        return schedule

    return entered
