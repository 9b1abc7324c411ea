"""Which resizes to make, given worths, costs and a target: pure; numbers in, plan out."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autowidth.channels import IndexMap

Array = NDArray[np.float64]


class BudgetError(ValueError):
    """A budget that no network of this kind can meet."""


class CostOfWidths(Protocol):
    """A cost as a function of the widths of all channel groups, in the order of `names` (see autowidth.cost.Cost)."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def at(self, widths: Mapping[str, int] | Array) -> float: ...
    def of_channel(self, widths: Mapping[str, int] | Array) -> Array: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a network costs at given widths: multiply-accumulates, parameters, milliseconds where they are bounded."""

    macs: CostOfWidths
    params: CostOfWidths | None = None
    latency: CostOfWidths | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What a policy sees of one channel group at a review.

    worth (width,): nats per sample; grace (width,): True for newborns that must not be judged yet. together: (k, rise),
    what the loss rose by, nats per sample, when the k weakest that may be judged left together; None if not tried.
    """

    name: str
    width_start: int
    worth: tuple[float, ...]
    grace: tuple[bool, ...]
    together: tuple[int, float] | None = None

    @property
    def judged(self) -> tuple[int, ...]:
        """The channels that may be judged, the one of least worth first."""
        return tuple(sorted((c for c, grace in enumerate(self.grace) if not grace), key=self.worth.__getitem__))

    @property
    def interaction(self) -> float:
        """What two of the weakest filters cost together beyond what each costs alone, half of it, nats per sample.

        With pairwise interactions c the k weakest cost the sum of their worths and c k^2; c is what the trial says.
        """
        if self.together is None:
            return 0.0
        count, rise = self.together
        alone = sum(max(self.worth[c], 0.0) for c in self.judged[:count])
        return max(rise - alone, 0.0) / count**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that a policy decides on: when, what is there, what it costs, how well the network does.

    loss: of the network on the samples of the review, nats per sample. fidelity: how well the worths ranked the filters
    of the last audits, Spearman's rank correlation; None where nothing was audited.
    """

    step: int
    total_steps: int
    books: tuple[Books, ...]
    costs: Costs
    loss: float | None = None
    fidelity: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do: index maps of the groups that change, the cost aimed at, the price that it implies.

    price: nats per MAC at the margin, of the dearest filter removed; announced: the sum of the removed filters' worths
    and of what they cost beyond that together, nats per sample. A negative worth counts for nothing there: what single
    filters promise does not add up, since the most promising are picked (docs/decisions/004). multiple: of what the
    widths that change are multiples. bearable: the rise of the loss, nats per sample, above which only half of the
    decision is carried out.
    """

    plan: Mapping[str, IndexMap]
    target_macs: int | None = None
    price: float | None = None
    announced: float | None = None
    multiple: int = 1
    bearable: float = math.inf
    notes: tuple[str, ...] = ()


class Policy(Protocol):
    """When to review, and what to do then. Implementations hold settings, no state."""

    @property
    def grace(self) -> int: ...
    @property
    def joint(self) -> float:
        """The share of every group's filters that a review takes away together to see what that costs; 0: none."""

    def check(self, costs: Costs, widths: Mapping[str, int]) -> None:
        """Raises BudgetError if the policy cannot be met from these widths."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps, counted from 1, after which a review takes place."""

    def decide(self, situation: Situation) -> Decision:
        """The resizes to make now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Never reviews, never resizes: the run is plain training."""

    grace: int = 0
    joint: float = 0.0

    def check(self, costs: Costs, widths: Mapping[str, int]) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """No steps."""
        return ()

    def decide(self, situation: Situation) -> Decision:
        """An empty plan."""
        return Decision(plan={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Editing:
    """When reviews take place and what they may do: the options that Budget, Price and Auto share.

    count: number of reviews, evenly spaced between the shares `begin` and `end` of the run.
    offer: share of the present cost that is offered to newborns at a review (0: no insertion). Newborns are not
        judged for `grace` reviews, and none are offered in the last `grace` reviews, so that all are judged.
    newborn: price of newborns: what a filter not yet born is expected to be worth, as a share of the mean worth of the
        weaker half of its group.
    diminishing: exponent g of a prior of diminishing returns. A filter's worth is taken as
        worth x (uniform share / width that would be left) ** g, where the uniform share is the width that the group
        would have in a uniformly narrowed network of the same cost (docs/decisions/002). 0, no prior, does best where
        `joint` measures returns instead of guessing them (docs/decisions/008).
    joint: share of every group's filters that a review takes away together, on trial, to see how much more that
        costs than one by one (0: not tried). Filters of a residual stream stand in for each other, so that the first
        ones seem to cost nothing, and many of them very much (docs/decisions/008).
    min_width: no group gets narrower.
    multiple: widths that change become multiples of this; groups that are narrower than it stay.
    protect: patterns of names (as in `stem.*`) of groups that keep their widths. One that matches nothing is an error.
    max_move: the largest share of the present cost that one review may remove; the last review of a budget may more.
    tolerance: a plan that turns out to cost this many nats (the unit of the loss) more than twice what was announced is
        carried out by half; what is left is made up for at later reviews. The last review always meets a budget.
    doubt: where the worths ranked the filters of the last audits worse than this (Spearman), a plan may cost only half
        of that, and the review says so. Where filters cost next to nothing, as in a network that is far too wide,
        their order hardly matters, and nothing is held up (docs/decisions/011). -1: never.
    """

    count: int = 8
    begin: float = 0.06
    end: float = 0.7
    offer: float = 0.05
    newborn: float = 1.0
    grace: int = 2
    diminishing: float = 0.0
    joint: float = 0.5
    min_width: int = 2
    multiple: int = 1
    protect: tuple[str, ...] = ()
    max_move: float = 0.5
    tolerance: float = 0.1
    doubt: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"reviews from {self.begin:g} to {self.end:g} of the run: need 0 <= begin < end <= 1")
        if self.count < 1 or self.min_width < 1 or self.grace < 0 or not 0 <= self.offer < 1:
            raise ValueError(
                f"count={self.count}, min_width={self.min_width}, grace={self.grace}, offer={self.offer:g}: "
                "need count >= 1, min_width >= 1, grace >= 0 and 0 <= offer < 1"
            )
        if self.tolerance < 0 or self.diminishing < 0 or self.newborn < 0:
            raise ValueError(
                f"tolerance={self.tolerance:g}, diminishing={self.diminishing:g}, newborn={self.newborn:g}: "
                "none may be negative"
            )
        if not 0 <= self.joint < 1:
            raise ValueError(f"joint={self.joint:g}: need a share from 0 to below 1")
        if not -1 <= self.doubt <= 1:
            raise ValueError(f"doubt={self.doubt:g}: need a rank correlation, from -1 to 1")
        if self.multiple < 1 or not 0 < self.max_move <= 1:
            raise ValueError(
                f"multiple={self.multiple}, max_move={self.max_move:g}: need multiple >= 1 and 0 < max_move <= 1"
            )

    def check(self, costs: Costs, widths: Mapping[str, int]) -> None:
        """Raises BudgetError for a pattern in `protect` that matches no group, or where it leaves nothing to edit."""
        for pattern in self.protect:
            if not fnmatch.filter(widths, pattern):
                close = difflib.get_close_matches(pattern, widths, n=3, cutoff=0.3) or list(widths)[:3]
                raise BudgetError(
                    f"protect={pattern!r} matches no channel group; close names are {', '.join(close)} "
                    "(`autowidth inspect` lists all)"
                )
        if len(self.protected(tuple(widths))) == len(widths):
            raise BudgetError(f"protect={self.protect} matches all channel groups: nothing is left to resize")

    def protected(self, names: Sequence[str]) -> frozenset[str]:
        """The names that a pattern in `protect` matches."""
        return frozenset(name for pattern in self.protect for name in fnmatch.filter(names, pattern))

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """Evenly spaced steps between `begin` and `end` of the run."""
        return tuple(sorted({max(1, round(x * total_steps)) for x in np.linspace(self.begin, self.end, self.count)}))

    def standing(self, situation: Situation) -> tuple[int, int, bool]:
        """(which review this is, counted from 1, of how many, whether newborns are offered at it)."""
        steps = self.reviews(situation.total_steps)
        number = sum(step <= situation.step for step in steps)
        return number, len(steps), self.offer > 0 and number <= len(steps) - max(self.grace, 1)

    def guarded(self, decision: Decision, situation: Situation) -> Decision:
        """The decision with what it may cost: twice what was announced and the tolerance; half of it in doubt."""
        bearable = 2 * (decision.announced or 0.0) + self.tolerance
        if situation.fidelity is None or situation.fidelity >= self.doubt:
            return replace(decision, bearable=bearable)
        note = (
            f"the last audits ranked filters with a Spearman of {situation.fidelity:.2f}, below {self.doubt:g}: "
            "the plan may cost only half as much"
        )
        return replace(decision, bearable=bearable / 2, notes=(note, *decision.notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(Editing):
    """Ends at a given cost, and allocates it freely among the layers.

    macs: the target; up to 100 as a share of the MACs at the start (0.5; above 1 a larger network), above 100 as
        multiply-accumulates of one sample.
    params: the same in parameters, instead of MACs.
    latency: a share of the milliseconds that a forward pass of the start takes, measured on this machine with the
        engine's example inputs (see autowidth.latency); latency_ms: the same in milliseconds.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        Editing.__post_init__(self)
        given = {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}
        if not given:
            object.__setattr__(self, "macs", 0.5)
        if len(given) > 1:
            said = " and ".join(f"{name}={value:g}" for name, value in given.items())
            raise BudgetError(f"budget {said}: pass one of them")
        if not self.target > 0:
            raise BudgetError(
                f"budget {self.what}={self.target:g} is impossible: pass a share of the starting network above 0"
            )

    @property
    def what(self) -> str:
        """The name of the setting that is given: macs, params, latency or latency_ms."""
        return next(name for name in BOUNDS if getattr(self, name) is not None)

    @property
    def timed(self) -> bool:
        """Whether the cost that is bounded is latency, which has to be measured."""
        return self.what.startswith("latency")

    @property
    def target(self) -> float:
        """The bound as it was given, a share or an absolute number."""
        return float(getattr(self, self.what))

    @property
    def absolute(self) -> bool:
        """Whether the target is an absolute number, and not a share of the start."""
        return self.what == "latency_ms" or (not self.timed and self.target > ABSOLUTE)

    def check(self, costs: Costs, widths: Mapping[str, int]) -> None:
        """Raises BudgetError if the target is below what minimum widths cost, or above the start without insertion."""
        Editing.check(self, costs, widths)
        cost = self._bounded(costs)
        full = cost.at(widths)
        share = self._share(full)
        kept = self.protected(tuple(widths))
        least = cost.at({n: width if n in kept else min(width, self.min_width) for n, width in widths.items()})
        said = f"budget {self.what}={self.target:g}"
        if share * full < least:
            raise BudgetError(
                f"{said} is below the least that minimum widths allow ({least / full:.3g} of the "
                f"starting network at min_width={self.min_width}): raise {self.what} or lower min_width"
            )
        if share > 1 and self.offer == 0:
            raise BudgetError(f"{said} needs insertion, which offer=0 turns off: set offer above 0")
        if share > 1 and self.count <= max(self.grace, 1):
            raise BudgetError(
                f"{said} needs insertion, and the last {max(self.grace, 1)} of {self.count} reviews "
                "insert nothing: raise count or lower grace"
            )

    def _bounded(self, costs: Costs) -> CostOfWidths:
        """The cost that the target is about."""
        cost = costs.latency if self.timed else costs.params if self.what == "params" else costs.macs
        if cost is None:
            raise BudgetError(f"budget {self.what}={self.target:g} needs to know what a channel costs in that unit")
        return cost

    def _share(self, full: float) -> float:
        """The target as a share of the cost at the start."""
        return self.target / full if self.absolute else self.target

    def decide(self, situation: Situation) -> Decision:
        """Removes the filters of least profit down to this review's target, less what newborns are offered."""
        cost = self._bounded(situation.costs)
        number, reviews, offering = self.standing(situation)
        full = cost.at({books.name: books.width_start for books in situation.books})
        share = self._share(full)
        last_offer = reviews - max(self.grace, 1)  # a network that grows must have arrived when offers end
        way = number / reviews if share <= 1 else min(number / max(last_offer, 1), 1.0)
        market = _Market.opened(situation, self, cost, share * full)
        now, target = cost.at(market.widths), full * share**way
        if number == reviews:
            return market.deal(target, 0.0, exactly=True)
        offered = self.offer * min(full, now) if offering else 0.0
        return self.guarded(market.deal(max(target, (1 - self.max_move) * now), offered), situation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price(Editing):
    """Lets widths settle where the marginal profit is zero: where a MAC earns what it costs.

    The loss of networks that differ in size alone follows a power law, loss ~ MACs ** -exponent (Hestness et al. 2017,
    Rosenfeld et al. 2020), so that one e-fold of MACs earns exponent x loss. Every MAC costs the same, and the network
    is as wide as it should be where all of them together cost what the e-fold earns. The loss is measured at every
    review; filters then leave and enter as under a budget of these MACs.

    nats_per_model: what the whole compute of the starting network costs, nats per sample.
    exponent: of the power law; measured on held-out images (docs/decisions/009).
    pace: how fast: the share of ln(MACs) still to go that one review goes, within `max_move` both ways. A
        review goes its equal part of what is left at least, so that the last one goes all of it.
    """

    max_move: float = 0.35
    nats_per_model: float = 0.1
    exponent: float = 0.1
    pace: float = 0.5

    def __post_init__(self) -> None:
        Editing.__post_init__(self)
        if not self.nats_per_model > 0:
            raise BudgetError(f"a price of nats_per_model={self.nats_per_model:g} is impossible: pass one above 0")
        self._check_pace()

    def _check_pace(self) -> None:
        if not self.exponent > 0 or not 0 < self.pace <= 1:
            raise ValueError(f"exponent={self.exponent:g}, pace={self.pace:g}: need exponent > 0 and 0 < pace <= 1")

    def justified(self, situation: Situation, loss: float) -> float:
        """The MACs at which a network of this loss costs what its last e-fold earns."""
        start = situation.costs.macs.at({books.name: books.width_start for books in situation.books})
        return self.exponent * loss / self.nats_per_model * start

    def decide(self, situation: Situation) -> Decision:
        """Moves the cost towards where it pays, and allocates it as a budget does."""
        widths = {books.name: len(books.worth) for books in situation.books}
        now = situation.costs.macs.at(widths)
        if situation.loss is None or not situation.loss > 0:
            return Decision(plan={}, notes=(f"a loss of {situation.loss} says nothing about size: nothing was done",))
        aim = self.justified(situation, situation.loss)
        number, reviews, offering = self.standing(situation)
        pace = max(self.pace, 1 / (reviews - number + 1))
        most = -math.log(max(1 - self.max_move, 1e-9))
        move = min(max(pace * math.log(aim / now), -most), most if offering else 0.0)  # who grows must be judged
        market = _Market.opened(situation, self, situation.costs.macs, now)
        decision = market.deal(now * math.exp(move), self.offer * now if offering else 0.0)
        note = f"a loss of {situation.loss:.3g} justifies {aim:.3g} MACs, and {now:.3g} were there"
        return self.guarded(replace(decision, notes=(note,)), situation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto(Price):
    """Needs no target and no price: finds the width that the data justify, whatever the starting network.

    As `Price`, but every parameter costs `nats_per_parameter` / `samples` nats per sample. The form is that of
    description length: a parameter learnt from n samples is worth its place if it saves a fixed number of nats over all
    of them together (Akaike 1974: one; Schwarz 1978: ln(n) / 2). Deep networks share their parameters' work, so the
    number is far below these; the default was chosen on held-out images (docs/decisions/009). It says how large a
    uniform multiple of the starting network should be; the MACs of that one are what the layers then compete for.

    samples: training samples; must be given (`autowidth train` does).
    """

    nats_per_parameter: float = 0.011
    samples: int | None = None

    def __post_init__(self) -> None:
        Editing.__post_init__(self)
        self._check_pace()
        if not self.nats_per_parameter > 0:
            raise BudgetError(f"nats_per_parameter={self.nats_per_parameter:g} is impossible: pass a number above 0")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples={self.samples}: pass the number of training samples, at least 1")

    def check(self, costs: Costs, widths: Mapping[str, int]) -> None:
        """Raises BudgetError where the number of samples is not known."""
        Editing.check(self, costs, widths)
        if self.samples is None:
            raise BudgetError("Auto needs the number of training samples: pass Auto(samples=len(dataset))")

    def justified(self, situation: Situation, loss: float) -> float:
        """The MACs of the uniform multiple of the start whose parameters cost what its last e-fold earns."""
        assert situation.costs.params is not None and self.samples is not None, "checked at the door"
        start = {books.name: books.width_start for books in situation.books}
        wanted = self.exponent * loss * self.samples / self.nats_per_parameter
        factor = uniform_share(situation.costs.params, start, wanted)
        widths = [max(start[name] * factor, self.min_width) for name in situation.costs.macs.names]
        return situation.costs.macs.at(np.array(widths))


NEWBORN_RETURNS = 2.0
"""How fast the gain of newborns falls with the width of their group, as a power of it: the prior of decision 002."""

BOUNDS = ("macs", "params", "latency", "latency_ms")
"""The settings of a budget that name its target: one of them is given."""

LARGEST_BIRTH = 0.25
"""Newborns of one review, as a share of their group's width (74 in a stream of 60 undid a run: docs/decisions/009)."""

ABSOLUTE = 100.0
"""Above this a target is an absolute number, up to it a share of the start."""


def shrunk(decision: Decision, worths: Mapping[str, Sequence[float]]) -> Decision:
    """The weaker half of a decision's removals, and no insertions. `worths` by group name, per channel.

    Widths that change stay multiples of the decision's: it may be less than half.
    """
    order = sorted((worths[name][c], name, c) for name, index_map in decision.plan.items() for c in index_map.removed)
    gone: dict[str, list[int]] = {}
    for _, name, c in order[: len(order) // 2]:
        gone.setdefault(name, []).append(c)
    plan = {}
    for name, channels in gone.items():
        size = decision.plan[name].size
        count = len(channels) - (len(channels) - size) % decision.multiple
        if count > 0:
            plan[name] = IndexMap.removing(channels[:count], size)
    announced = sum(max(worths[name][c], 0.0) for name, index_map in plan.items() for c in index_map.removed)
    return replace(decision, plan=plan, announced=announced)


def uniform_share(macs: CostOfWidths, widths: Mapping[str, int], target: float) -> float:
    """The factor by which all widths are multiplied in a uniform network that costs `target`; by bisection."""
    start = np.array([widths[name] for name in macs.names], dtype=np.float64)
    low, high = 0.0, 1.0
    while macs.at(start * high) < target:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if macs.at(start * middle) < target else (low, middle)
    return high


@dataclass(slots=True, kw_only=True)
class _Market:
    """Widths on the way from now to the plan: the weakest filters leave, newborns enter where filters earn most."""

    cost: CostOfWidths
    editing: Editing
    books: list[Books]
    ranked: list[list[int]]
    interaction: Array
    share: Array
    widths: Array
    gone: list[list[tuple[int, ...]]]
    born: list[int]
    typical: Array
    open: NDArray[np.bool_]

    @classmethod
    def opened(cls, situation: Situation, editing: Editing, cost: CostOfWidths, target: float) -> _Market:
        """The market at the start of a review that aims, in the end, at this cost."""
        by_name = {b.name: b for b in situation.books}
        books = [by_name[name] for name in cost.names]
        start = {b.name: b.width_start for b in books}
        factor = uniform_share(cost, start, target)
        kept = editing.protected(cost.names)
        return cls(
            cost=cost,
            editing=editing,
            books=books,
            ranked=[
                sorted((c for c, grace in enumerate(b.grace) if not grace), key=b.worth.__getitem__) for b in books
            ],
            share=np.array([b.width_start * factor for b in books]),
            interaction=np.array([b.interaction for b in books]),
            widths=np.array([len(b.worth) for b in books], dtype=np.float64),
            gone=[[] for _ in books],
            born=[0 for _ in books],
            typical=np.array([editing.newborn * _typical(b) for b in books]),
            open=np.array([b.name not in kept for b in books]),
        )

    def deal(self, target: float, offered: float, *, exactly: bool = False) -> Decision:
        """Removes down to the target less what is offered to newborns, who take of it what they can pay for.

        What they leave goes back to the strongest of those removed. `exactly`: see `remove_down_to`.
        """
        grows = self.cost.at(self.widths) < target
        price, announced = self.remove_down_to(target - offered, exactly=exactly)
        regained = self.take_back_up_to(target - offered)
        if offered:
            self.insert_up_to(target, price or 0.0, most=LARGEST_BIRTH)
            if grows:  # who must grow arrives, and floods where nothing else is left
                self.insert_up_to(target, price or 0.0, most=None)
            regained += self.take_back_up_to(target)
        return Decision(
            plan=self.plan(), target_macs=round(target), price=price, announced=announced - regained,
            multiple=self.editing.multiple,
        )  # fmt: skip

    def _density(self, worth: Array, left: Array) -> Array:
        """Worth per unit of cost, under the prior of diminishing returns, if `left` channels are left in each group."""
        prior = (self.share / np.maximum(left, 0.5)) ** self.editing.diminishing
        return worth * prior / np.maximum(self.cost.of_channel(self.widths), 1e-12)

    def remove_down_to(self, target: float, *, exactly: bool) -> tuple[float | None, float]:
        """Removes the filters of least worth per MAC until the cost is met. Returns (price, sum of worths).

        With `exactly`, of what a block saves only that counts which is still needed, so that small blocks go before a
        large one at the end. Without it the widths may get ahead: a large block is sold when its turn has come.
        """
        price, announced = None, 0.0
        while (needed := self.cost.at(self.widths) - target) > 0:
            blocks = [self._next_block(g) for g in range(len(self.books))]
            weakest = np.array([self._mean_worth(g, block) for g, block in enumerate(blocks)])
            sizes = np.array([max(len(block), 1) for block in blocks])
            wasted = (
                np.maximum(self.cost.of_channel(self.widths) * sizes / needed, 1.0) if exactly else np.ones(len(sizes))
            )
            left = self.widths - sizes
            density = np.where(np.isfinite(weakest), self._density(np.maximum(weakest, 0.0), left) * wasted, np.inf)
            density = np.where(np.isfinite(weakest) & (weakest < 0), weakest, density)
            g = int(np.argmin(density))
            if not np.isfinite(density[g]):
                break
            price = float(density[g] / wasted[g])
            self.gone[g].append(blocks[g])
            announced += self._last_worth(g)
            del self.ranked[g][: len(blocks[g])]
            self.widths[g] -= len(blocks[g])
        return price, announced

    def _next_block(self, g: int) -> tuple[int, ...]:
        """The weakest filters that leave group g together, down to the next multiple; empty where none may."""
        width, multiple = int(self.widths[g]), self.editing.multiple
        left = (width - 1) // multiple * multiple
        count = width - left
        if not self.open[g] or left < self.editing.min_width or count > len(self.ranked[g]):
            return ()
        return tuple(self.ranked[g][:count])

    def _mean_worth(self, g: int, block: tuple[int, ...]) -> float:
        """The mean worth of the filters of a block that leaves next; infinite for an empty one."""
        if not block:
            return np.inf
        alone = float(np.mean([self.books[g].worth[c] for c in block]))
        return alone + self._beyond(g, len(block), after=sum(map(len, self.gone[g]))) / len(block)

    def _beyond(self, g: int, count: int, *, after: int) -> float:
        """What `count` filters of group g cost beyond their worths when `after` others have already left."""
        return float(self.interaction[g]) * ((after + count) ** 2 - after**2)

    def _worth(self, g: int, block: tuple[int, ...], *, after: int) -> float:
        """What taking these filters away is announced to cost: what single ones promise to gain counts for nothing."""
        return sum(max(self.books[g].worth[c], 0.0) for c in block) + self._beyond(g, len(block), after=after)

    def _last_worth(self, g: int) -> float:
        """What the block of group g that left last is announced to cost."""
        return self._worth(g, self.gone[g][-1], after=sum(map(len, self.gone[g][:-1])))

    def take_back_up_to(self, target: float) -> float:
        """Takes back removed filters that still fit, the strongest first: fine adjustment. Returns their worths."""
        regained, open_to = 0.0, {g for g, blocks in enumerate(self.gone) if blocks}
        while open_to:
            g = max(sorted(open_to), key=self._last_worth)
            block, worth = self.gone[g][-1], self._last_worth(g)
            self.widths[g] += len(block)
            if self.cost.at(self.widths) <= target:
                self.gone[g].pop()
                regained += worth
            else:
                self.widths[g] -= len(block)
            if not self.gone[g] or self.gone[g][-1] == block:
                open_to.remove(g)
        return regained

    def insert_up_to(self, target: float, price: float, *, most: float | None) -> None:
        """Inserts channels where a typical filter, under the prior, earns most per MAC, and more than the price.

        A group grows to its next multiple at a time, and by the share `most` of its width at most; None: by any.
        """
        open_to, multiple, before = self.open.copy(), self.editing.multiple, self.widths.copy()
        while open_to.any():
            # Each further newborn finds less to do: without this all of them would go to one group.
            gain = self.typical * (before / (self.widths + 1)) ** NEWBORN_RETURNS
            density = np.where(open_to, self._density(gain, self.widths + 1), -np.inf)
            g = int(np.argmax(density))
            if density[g] < price:
                return
            count = multiple - int(self.widths[g]) % multiple
            self.widths[g] += count
            room = most is None or self.born[g] + count <= max(multiple, most * (before[g] - self.born[g]))
            if room and self.cost.at(self.widths) <= target:
                self.born[g] += count
            else:
                self.widths[g] -= count
                open_to[g] = False

    def plan(self) -> dict[str, IndexMap]:
        """The index maps of the groups that change."""
        plan = {}
        for books, blocks, born in zip(self.books, self.gone, self.born, strict=True):
            gone = [c for block in blocks for c in block]
            index_map = IndexMap.removing(gone, len(books.worth)).inserting(born)
            if not index_map.is_identity:
                plan[books.name] = index_map
        return plan


def _typical(books: Books) -> float:
    """What a further filter of this group may be worth: the mean of the weaker half of those that are judged.

    Where a trial has said what the weaker ones cost together, that takes the place of the sum of their worths.
    """
    weaker = [books.worth[c] for c in books.judged[: max(len(books.judged) // 2, 1)]]
    alone = max(float(np.mean(weaker)), 0.0) if weaker else 0.0
    return alone + books.interaction * len(weaker)
