"""What a policy decides on and what it answers: frozen data, and the protocol of a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from autowidth.channels import IndexMap
from autowidth.policy.limits import Limits

Array = NDArray[np.float64]

Unit = Literal["macs", "params", "ms"]
"""What a cost is counted in: multiply-accumulates of one sample, parameters, milliseconds of one forward pass."""


class Cost(Protocol):
    """A cost as a function of the widths of all channel groups, in the order of `names` (see autowidth.cost.Cost)."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def at(self, widths: Mapping[str, int] | Array) -> float: ...
    def of_channel(self, widths: Mapping[str, int] | Array) -> Array: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a network costs at given widths; `ms` where the policy bounds it, since it has to be measured."""

    macs: Cost
    params: Cost | None = None
    ms: Cost | None = None

    def of(self, unit: Unit) -> Cost | None:
        """The cost in this unit."""
        return {"macs": self.macs, "params": self.params, "ms": self.ms}[unit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What is known before training: the widths, their costs, the number of training samples (None: unknown)."""

    costs: Costs
    widths: Mapping[str, int]
    samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What a review found out about one channel group.

    worth (width,): nats per sample; grace (width,): True for newborns that must not be judged yet. together: (k, rise),
    what the loss rose by, nats per sample, when the k weakest that may be judged left together; None if not tried.
    """

    name: str
    width_start: int
    worth: tuple[float, ...]
    grace: tuple[bool, ...]
    together: tuple[int, float] | None = None

    @property
    def width(self) -> int:
        return len(self.worth)

    @cached_property
    def judged(self) -> tuple[int, ...]:
        """The channels that may be judged, the one of least worth first."""
        return tuple(sorted((c for c, grace in enumerate(self.grace) if not grace), key=self.worth.__getitem__))

    @cached_property
    def interaction(self) -> float:
        """What two of the weakest filters cost together beyond what each costs alone, half of it, nats per sample.

        With pairwise interactions c the k weakest cost the sum of their worths and c k^2; c is what the trial says.
        """
        if self.together is None:
            return 0.0
        count, rise = self.together
        alone = sum(max(self.worth[c], 0.0) for c in self.judged[:count])
        return max(rise - alone, 0.0) / count**2

    def predicted(self, channels: tuple[int, ...], *, after: int = 0) -> float:
        """What taking these filters away should cost when `after` others of the group have left, nats per sample.

        Their worths, none of them below 0 (what single filters promise to gain does not add up, since the most
        promising are picked: docs/decisions/004), and their interactions with each other and with those who left.
        """
        return sum(max(self.worth[c], 0.0) for c in channels) + self.beyond(len(channels), after=after)

    def beyond(self, count: int, *, after: int) -> float:
        """What `count` filters cost beyond their worths when `after` others have already left, nats per sample."""
        return self.interaction * ((after + count) ** 2 - after**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that a policy decides on: when, what is there, what it costs, how well the network does.

    loss: of the network on the samples of the review, nats per sample. agreement: how well the worths ranked the
    filters of the last audits, Spearman's rank correlation; None where nothing was audited. samples: training samples,
    None where nobody knows their number.
    """

    step: int
    total_steps: int
    groups: tuple[GroupReport, ...]
    costs: Costs
    loss: float | None = None
    agreement: float | None = None
    samples: int | None = None

    @property
    def widths(self) -> dict[str, int]:
        """The present widths by channel group."""
        return {report.name: report.width for report in self.groups}

    @property
    def widths_start(self) -> dict[str, int]:
        """The widths at the start of the run by channel group."""
        return {report.name: report.width_start for report in self.groups}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do: index maps of the groups that change, the cost aimed at, the price that it implies.

    target: the cost aimed at, in `unit`; price: nats per unit at the margin, of the filters removed last, 0 where they
    cost nothing; prices: what that asks of one filter of each channel group, nats per sample; predicted: the sum of
    what the removed filters cost, and of what they cost beyond that together, nats per sample. multiple: of what the
    widths that change are multiples. max_rise: the rise of the loss, nats per sample, above which only half of the
    decision is carried out. missed: a sentence for the user where the target cannot be met, None where it is.
    """

    plan: Mapping[str, IndexMap]
    target: float | None = None
    unit: Unit = "macs"
    price: float | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    predicted: float | None = None
    multiple: int = 1
    max_rise: float = math.inf
    notes: tuple[str, ...] = ()
    missed: str | None = None


class Policy(Protocol):
    """When to review, and what to do then. Implementations are frozen: they hold settings, no state."""

    @property
    def limits(self) -> Limits:
        """What one review may do."""

    @property
    def unit(self) -> Unit:
        """What the cost is counted in that the policy bounds; for "ms" the engine measures latency."""

    @property
    def aim(self) -> str:
        """Where the run leads, for people: "to 50% of the MACs"."""

    def check(self, start: Start) -> None:
        """Raises BudgetError if the policy cannot be met from this start."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps, counted from 1, after which a review takes place."""

    def decide(self, situation: Situation) -> Decision:
        """The resizes to make now."""
