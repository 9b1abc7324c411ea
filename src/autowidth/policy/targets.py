"""Where a run leads: a budget, a price, what the data justify, or nowhere. One class each, registered by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from autowidth.policy.allocate import Allocation, guarded, uniform_share
from autowidth.policy.limits import Limits, PolicyError
from autowidth.policy.schedule import Schedule, Standing
from autowidth.policy.situation import Cost, Decision, Situation, Start, Unit

ABSOLUTE = 100.0
"""Above this a target is an absolute number, up to it a share of the start."""

EXPONENT = 0.1
"""Of the power law of loss and size; measured on held-out images of one data set (docs/decisions/009)."""


class BudgetError(PolicyError):
    """A target that no network of this kind can meet."""


Kind = TypeVar("Kind", bound=type)

POLICIES: dict[str, type[Any]] = {}
"""The policies by the name that settings and the command use."""


def policy(name: str) -> Callable[[Kind], Kind]:
    """Registers a class as the policy of this name."""

    def register(kind: Kind) -> Kind:
        POLICIES[name] = kind
        return kind

    return register


def offers(limits: Limits, standing: Standing) -> bool:
    """Whether newborns are offered at a review: not so late that they could not be judged."""
    return limits.offer > 0 and standing.number <= standing.count - max(limits.grace, 1)


# ---- never -----------------------------------------------------------------------------------------------------------


@policy("never")
@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Never reviews, never resizes: the run is plain training."""

    limits: Limits = field(default_factory=lambda: Limits(offer=0.0, trial_share=0.0))

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return "without reviews"

    def check(self, start: Start) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """No steps."""
        return ()

    def decide(self, situation: Situation) -> Decision:
        """An empty plan."""
        return Decision(plan={})


# ---- a budget --------------------------------------------------------------------------------------------------------

Bound = Literal["macs", "params", "latency", "latency_ms"]

BOUNDS: Mapping[Bound, tuple[Unit, str]] = {
    "macs": ("macs", "MACs"),
    "params": ("params", "parameters"),
    "latency": ("ms", "latency"),
    "latency_ms": ("ms", "ms per image"),
}
"""The settings of a budget that name its target, the unit of the cost that they bound, and their name for people."""


@policy("budget")
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Ends at a given cost, and allocates it freely among the layers.

    macs: the target; up to 100 as a share of the MACs at the start (0.5; above 1 a larger network), above 100 as
        multiply-accumulates of one sample. Without any target: half of the MACs.
    params: the same in parameters, instead of MACs.
    latency: a share of the milliseconds that a forward pass of the start takes, measured on this machine with the
        engine's example inputs (see autowidth.latency); latency_ms: the same in milliseconds.
    schedule: when reviews take place; limits: what they may do.

    Raises BudgetError for a target that is not above 0, and for more than one.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        given = {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}
        if not given:
            object.__setattr__(self, "macs", 0.5)
        if len(given) > 1:
            listed = " and ".join(f"{name}={value:g}" for name, value in given.items())
            raise BudgetError(f"budget {listed}: pass one of them")
        if not self.target > 0:
            raise BudgetError(f"{self} is impossible: pass a share of the starting network above 0")

    def __str__(self) -> str:
        return f"budget {self.bound}={self.target:g}"

    @property
    def bound(self) -> Bound:
        """The name of the setting that is given: macs, params, latency or latency_ms."""
        return next(name for name in BOUNDS if getattr(self, name) is not None)

    @property
    def unit(self) -> Unit:
        """What the cost is counted in that is bounded."""
        return BOUNDS[self.bound][0]

    @property
    def target(self) -> float:
        """The bound as it was given, a share or an absolute number."""
        return float(getattr(self, self.bound))

    @property
    def is_absolute(self) -> bool:
        """Whether the target is an absolute number, and not a share of the start."""
        return self.bound == "latency_ms" or (self.unit != "ms" and self.target > ABSOLUTE)

    @property
    def aim(self) -> str:
        """The target for people."""
        name = BOUNDS[self.bound][1]
        return f"to {self.target:g} {name}" if self.is_absolute else f"to {self.target:.0%} of the {name}"

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps of the schedule."""
        return self.schedule.reviews(total_steps)

    def check(self, start: Start) -> None:
        """Raises BudgetError if the target is below what the least widths cost, or above the start without insertion.

        The least widths are those that `min_width`, `multiple` and `protect` leave.
        """
        self.limits.check(tuple(start.widths))
        cost = start.costs.of(self.unit)
        if cost is None:
            raise BudgetError(f"{self} needs to know what a channel costs in that unit")
        full, least = cost.at(start.widths), cost.at(self.limits.narrowest(start.widths))
        share = self._share(full)
        if share * full < least:
            protected = f", protect={self.limits.protect}" if self.limits.protect else ""
            raise BudgetError(
                f"{self} is below the least that widths allow ({least / full:.3g} of the starting network at "
                f"min_width={self.limits.min_width}, multiple={self.limits.multiple}{protected}): raise {self.bound}, "
                "or lower min_width or multiple"
            )
        self._check_growth(share)

    def _check_growth(self, share: float) -> None:
        """Raises BudgetError where the target is above the start and nothing can be inserted."""
        last = max(self.limits.grace, 1)
        if share > 1 and self.limits.offer == 0:
            raise BudgetError(f"{self} needs insertion, which offer=0 turns off: set offer above 0")
        if share > 1 and self.schedule.count <= last:
            raise BudgetError(
                f"{self} needs insertion, and the last {last} of {self.schedule.count} reviews insert nothing: "
                "raise count or lower grace"
            )

    def _share(self, full: float) -> float:
        """The target as a share of the cost at the start."""
        return self.target / full if self.is_absolute else self.target

    def decide(self, situation: Situation) -> Decision:
        """Removes the filters of least profit down to this review's target, less what newborns are offered."""
        cost, limits = situation.costs.of(self.unit), self.limits
        assert cost is not None, "checked at the door"
        standing = self.schedule.standing(situation)
        full = cost.at(situation.widths_start)
        share = self._share(full)
        last_offer = standing.count - max(limits.grace, 1)  # a network that grows must have arrived when offers end
        way = standing.number / standing.count if share <= 1 else min(standing.number / max(last_offer, 1), 1.0)
        allocation = Allocation.of(situation, limits, cost, share * full)
        now, target = allocation.total, full * share**way
        if standing.is_last:
            decision = allocation.decide(target, 0.0, unit=self.unit, exactly=True)
            return replace(decision, missed=self._missed(situation, cost, decision))
        offered = limits.offer * min(full, now) if offers(limits, standing) else 0.0
        decision = allocation.decide(max(target, (1 - limits.max_move) * now), offered, unit=self.unit)
        return guarded(decision, situation, limits)

    def _missed(self, situation: Situation, cost: Cost, decision: Decision) -> str | None:
        """What to tell the user where the last decision does not lead down to the target, else None."""
        end = situation.widths | {name: index_map.width for name, index_map in decision.plan.items()}
        reached, full = cost.at(end), cost.at(situation.widths_start)
        if decision.target is None or reached <= decision.target * (1 + 1e-9):
            return None
        silent = sum(not math.isfinite(w) for report in situation.groups for w in report.worth)
        why = f"nothing is known of {silent} filters, which stay" if silent else "no further filters may leave"
        return (
            f"{self} is missed: the run ends at {reached / full:.1%} of the start instead of "
            f"{decision.target / full:.1%}; {why} (min_width={self.limits.min_width}, "
            f"multiple={self.limits.multiple}, protect={self.limits.protect})"
        )


# ---- a price ---------------------------------------------------------------------------------------------------------


def check_curve(exponent: float, pace: float) -> None:
    """Raises PolicyError where the exponent of a power law or the pace of a run is out of range."""
    if not exponent > 0 or not 0 < pace <= 1:
        raise PolicyError(f"exponent={exponent:g}, pace={pace:g}: need exponent > 0 and 0 < pace <= 1")


def go_towards(aim: float, situation: Situation, *, schedule: Schedule, limits: Limits, pace: float) -> Decision:
    """Moves the MACs towards those that the loss justifies, and allocates them as a budget does.

    A review goes the share `pace` of the ln(MACs) still to go, within `max_move` both ways, and its equal part of what
    is left at least, so that the last one goes all of it.
    """
    macs, standing = situation.costs.macs, schedule.standing(situation)
    now, offering = macs.at(situation.widths), offers(limits, standing)
    share = max(pace, 1 / (standing.count - standing.number + 1))
    most = -math.log(max(1 - limits.max_move, 1e-9))
    move = min(max(share * math.log(aim / now), -most), most if offering else 0.0)  # who grows must be judged
    allocation = Allocation.of(situation, limits, macs, now)
    decision = allocation.decide(now * math.exp(move), limits.offer * now if offering else 0.0, unit="macs")
    note = f"a loss of {situation.loss:.3g} justifies {aim:.3g} MACs, and {now:.3g} were there"
    return guarded(replace(decision, notes=(note,)), situation, limits)


def _silent_about_size(situation: Situation) -> Decision | None:
    """An empty decision where the loss says nothing about size, else None."""
    if situation.loss is not None and situation.loss > 0:
        return None
    return Decision(plan={}, notes=(f"a loss of {situation.loss} says nothing about size: nothing was done",))


def _slow() -> Limits:
    """Where the aim is judged anew at every review, one review goes a shorter way."""
    return Limits(max_move=0.35)


@policy("price")
@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Lets widths settle where the marginal profit is zero: where a MAC earns what it costs.

    The loss of networks that differ in size alone follows a power law, loss ~ MACs ** -exponent (Hestness et al. 2017,
    Rosenfeld et al. 2020), so that one e-fold of MACs earns exponent x loss. Every MAC costs the same, and the network
    is as wide as it should be where all of them together cost what the e-fold earns. The loss is measured at every
    review; filters then leave and enter as under a budget of these MACs.

    nats_per_model: what the whole compute of the starting network costs, nats per sample.
    exponent: of the power law.
    pace: how fast: the share of ln(MACs) still to go that one review goes.
    schedule, limits: when reviews take place, and what they may do.

    Raises BudgetError or PolicyError for values that are not above 0.
    """

    nats_per_model: float = 0.1
    exponent: float = EXPONENT
    pace: float = 0.5
    schedule: Schedule = field(default_factory=Schedule)
    limits: Limits = field(default_factory=_slow)

    def __post_init__(self) -> None:
        if not self.nats_per_model > 0:
            raise BudgetError(f"a price of nats_per_model={self.nats_per_model:g} is impossible: pass one above 0")
        check_curve(self.exponent, self.pace)

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return f"at {self.nats_per_model:g} nats for all MACs"

    def check(self, start: Start) -> None:
        """Raises PolicyError as the limits do."""
        self.limits.check(tuple(start.widths))

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps of the schedule."""
        return self.schedule.reviews(total_steps)

    def justified(self, situation: Situation, loss: float) -> float:
        """The MACs at which a network of this loss costs what its last e-fold earns."""
        return self.exponent * loss / self.nats_per_model * situation.costs.macs.at(situation.widths_start)

    def decide(self, situation: Situation) -> Decision:
        """Moves the cost towards where it pays."""
        if silent := _silent_about_size(situation):
            return silent
        aim = self.justified(situation, situation.loss or 0.0)
        return go_towards(aim, situation, schedule=self.schedule, limits=self.limits, pace=self.pace)


# ---- what the data justify -------------------------------------------------------------------------------------------


@policy("auto")
@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """Needs no target and no price: finds the width that the data justify, whatever the starting network.

    As `Price`, but every parameter costs `nats_per_parameter` / `samples` nats per sample. The form is that of
    description length: a parameter learnt from n samples is worth its place if it saves a fixed number of nats over all
    of them together (Akaike 1974: one; Schwarz 1978: ln(n) / 2). Deep networks share their parameters' work, so the
    number is far below these; the default was chosen on held-out images (docs/decisions/009). It says how large a
    uniform multiple of the starting network should be; the MACs of that one are what the layers then compete for.

    samples: training samples; None for what the engine finds out from its probe loader.

    Raises BudgetError or PolicyError for values that are not above 0.
    """

    nats_per_parameter: float = 0.011
    samples: int | None = None
    exponent: float = EXPONENT
    pace: float = 0.5
    schedule: Schedule = field(default_factory=Schedule)
    limits: Limits = field(default_factory=_slow)

    def __post_init__(self) -> None:
        if not self.nats_per_parameter > 0:
            raise BudgetError(f"nats_per_parameter={self.nats_per_parameter:g} is impossible: pass a number above 0")
        check_curve(self.exponent, self.pace)
        if self.samples is not None and self.samples < 1:
            raise PolicyError(f"samples={self.samples}: pass the number of training samples, at least 1")

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return "to the width that the data justify"

    def check(self, start: Start) -> None:
        """Raises BudgetError where the number of samples is not known."""
        self.limits.check(tuple(start.widths))
        if self.samples is None and start.samples is None:
            raise BudgetError(
                "Auto needs the number of training samples, and the probe does not tell it (it has no dataset and no "
                "length): pass Auto(samples=len(dataset))"
            )

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps of the schedule."""
        return self.schedule.reviews(total_steps)

    def justified(self, situation: Situation, loss: float) -> float:
        """The MACs of the uniform multiple of the start whose parameters cost what its last e-fold earns."""
        samples, params = self.samples or situation.samples, situation.costs.params
        assert params is not None and samples is not None, "checked at the door"
        start = situation.widths_start
        factor = uniform_share(params, start, self.exponent * loss * samples / self.nats_per_parameter)
        widths = [max(start[name] * factor, self.limits.min_width) for name in situation.costs.macs.names]
        return situation.costs.macs.at(np.array(widths))

    def decide(self, situation: Situation) -> Decision:
        """Moves the cost towards where it pays."""
        if silent := _silent_about_size(situation):
            return silent
        aim = self.justified(situation, situation.loss or 0.0)
        return go_towards(aim, situation, schedule=self.schedule, limits=self.limits, pace=self.pace)
