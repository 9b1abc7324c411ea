"""Which resizes to make, given worths, costs and a target: pure; numbers in, plan out."""

from __future__ import annotations

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
class Books:
    """What a policy sees of one channel group at a review.

    worth (width,): nats per sample; grace (width,): True for newborns that must not be judged yet.
    """

    name: str
    width_start: int
    worth: tuple[float, ...]
    grace: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that a policy decides on: when, what is there, what it costs."""

    step: int
    total_steps: int
    books: tuple[Books, ...]
    macs: CostOfWidths


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do: index maps of the groups that change, the cost aimed at, the price that it implies.

    price: nats per MAC at the margin, of the dearest filter removed; announced: the sum of the removed filters' worths,
    nats per sample. A negative worth counts for nothing there: what single filters promise does not add up, since the
    most promising are picked (docs/decisions/004).
    """

    plan: Mapping[str, IndexMap]
    target_macs: int | None = None
    price: float | None = None
    announced: float | None = None
    notes: tuple[str, ...] = ()


class Policy(Protocol):
    """When to review, and what to do then. Implementations hold settings, no state."""

    @property
    def grace(self) -> int: ...
    def check(self, macs: CostOfWidths, widths: Mapping[str, int]) -> None:
        """Raises BudgetError if the policy cannot be met from these widths."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps, counted from 1, after which a review takes place."""

    def decide(self, situation: Situation) -> Decision:
        """The resizes to make now."""

    def bearable(self, decision: Decision, *, last: bool) -> float:
        """The rise of the loss, nats per sample, above which only half of the decision is carried out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Never reviews, never resizes: the run is plain training."""

    grace: int = 0

    def check(self, macs: CostOfWidths, widths: Mapping[str, int]) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """No steps."""
        return ()

    def decide(self, situation: Situation) -> Decision:
        """An empty plan."""
        return Decision(plan={})

    def bearable(self, decision: Decision, *, last: bool) -> float:
        """Nothing is decided, so nothing has to be borne."""
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Ends at a given share of the starting network's MACs, and allocates them freely among the layers.

    macs: the target, as a share of the MACs at the start (0.5), or above 1 a larger network.
    count: number of reviews, evenly spaced between the shares `begin` and `end` of the run.
    offer: share of the starting MACs that is offered to newborns at a review (0: no insertion). Newborns are not
        judged for `grace` reviews, and none are offered in the last `grace` reviews, so that all are judged.
    diminishing: exponent g of the prior of diminishing returns. A filter's worth is taken as
        worth x (uniform share / width that would be left) ** g, where the uniform share is the width that the group
        would have in a uniformly narrowed network of the target's cost. Early worth overrates layers that learn
        first; the narrower a group already is, the dearer its next filter (docs/decisions/002).
    min_width: no group gets narrower.
    tolerance: a plan that turns out to cost this many nats (the unit of the loss) more than twice what was announced is
        carried out by half; what is left is made up for at later reviews. The last review always meets the target.
    """

    macs: float = 0.5
    count: int = 10
    begin: float = 0.1
    end: float = 0.6
    offer: float = 0.05
    grace: int = 2
    diminishing: float = 2.0
    min_width: int = 2
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not self.macs > 0:
            raise BudgetError(f"budget macs={self.macs:g} is impossible: pass a share of the starting MACs above 0")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"reviews from {self.begin:g} to {self.end:g} of the run: need 0 <= begin < end <= 1")
        if self.count < 1 or self.min_width < 1 or self.grace < 0 or not 0 <= self.offer < 1:
            raise ValueError(
                f"count={self.count}, min_width={self.min_width}, grace={self.grace}, offer={self.offer:g}: "
                "need count >= 1, min_width >= 1, grace >= 0 and 0 <= offer < 1"
            )
        if self.tolerance < 0 or self.diminishing < 0:
            raise ValueError(f"tolerance={self.tolerance:g}, diminishing={self.diminishing:g}: neither may be negative")

    def check(self, macs: CostOfWidths, widths: Mapping[str, int]) -> None:
        """Raises BudgetError if the target is below what minimum widths cost, or above the start without insertion."""
        full = macs.at(widths)
        least = macs.at({name: min(width, self.min_width) for name, width in widths.items()})
        if self.macs * full < least:
            raise BudgetError(
                f"budget macs={self.macs:g} is below the least that minimum widths allow ({least / full:.3g} of the "
                f"starting MACs at min_width={self.min_width}): raise macs or lower min_width"
            )
        if self.macs > 1 and self.offer == 0:
            raise BudgetError(f"budget macs={self.macs:g} needs insertion, which offer=0 turns off: set offer above 0")
        if self.macs > 1 and self.count <= max(self.grace, 1):
            raise BudgetError(
                f"budget macs={self.macs:g} needs insertion, and the last {max(self.grace, 1)} of {self.count} reviews "
                "insert nothing: raise count or lower grace"
            )

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """Evenly spaced steps between `begin` and `end` of the run."""
        return tuple(sorted({max(1, round(x * total_steps)) for x in np.linspace(self.begin, self.end, self.count)}))

    def decide(self, situation: Situation) -> Decision:
        """Removes the filters of least profit down to this review's target, less what newborns are offered."""
        steps = self.reviews(situation.total_steps)
        number = sum(step <= situation.step for step in steps)
        start = {books.name: books.width_start for books in situation.books}
        full = situation.macs.at(start)
        last_offer = len(steps) - max(self.grace, 1)  # a network that grows must have arrived when offers end
        way = number / len(steps) if self.macs <= 1 else min(number / max(last_offer, 1), 1.0)
        target = full * self.macs**way
        offered = self.offer * full if number <= last_offer else 0.0
        market = _Market.open(situation, self.diminishing, self.min_width, self.macs)
        price, announced = market.remove_down_to(target - offered)
        market.take_back_up_to(target - offered)
        if offered:
            market.insert_up_to(target)
        return Decision(
            plan=market.plan(), target_macs=round(target), price=price, announced=announced - market.regained
        )

    def bearable(self, decision: Decision, *, last: bool) -> float:
        """Twice what was announced and the tolerance; anything at the last review."""
        return math.inf if last else 2 * (decision.announced or 0.0) + self.tolerance


def shrunk(decision: Decision, worths: Mapping[str, Sequence[float]]) -> Decision:
    """The weaker half of a decision's removals, and no insertions. `worths` by group name, per channel."""
    order = sorted((worths[name][c], name, c) for name, index_map in decision.plan.items() for c in index_map.removed)
    half = order[: len(order) // 2]
    gone: dict[str, list[int]] = {}
    for _, name, c in half:
        gone.setdefault(name, []).append(c)
    plan = {name: IndexMap.removing(channels, decision.plan[name].size) for name, channels in gone.items()}
    return replace(decision, plan=plan, announced=sum(max(worth, 0.0) for worth, _, _ in half))


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

    macs: CostOfWidths
    books: dict[str, Books]
    ranked: list[list[int]]
    share: Array
    widths: Array
    least: Array
    exponent: float
    gone: list[list[int]]
    born: list[int]
    typical: Array
    regained: float = 0.0

    @classmethod
    def open(cls, situation: Situation, exponent: float, min_width: int, target: float) -> _Market:
        """The market at the start of a review."""
        names = situation.macs.names
        books = {b.name: b for b in situation.books}
        start = {name: books[name].width_start for name in names}
        factor = uniform_share(situation.macs, start, target * situation.macs.at(start))
        ranked = [
            sorted((c for c, grace in enumerate(books[n].grace) if not grace), key=books[n].worth.__getitem__)
            for n in names
        ]
        return cls(
            macs=situation.macs,
            books=books,
            ranked=ranked,
            share=np.array([start[n] * factor for n in names]),
            widths=np.array([len(books[n].worth) for n in names], dtype=np.float64),
            least=np.array([min_width for _ in names], dtype=np.float64),
            exponent=exponent,
            gone=[[] for _ in names],
            born=[0 for _ in names],
            typical=np.array([_typical(books[n]) for n in names]),
        )

    def _density(self, worth: Array, left: Array) -> Array:
        """Worth per MAC, under the prior of diminishing returns, if `left` channels are left in each group."""
        prior = (self.share / np.maximum(left, 0.5)) ** self.exponent
        return worth * prior / np.maximum(self.macs.of_channel(self.widths), 1.0)

    def remove_down_to(self, target: float) -> tuple[float | None, float]:
        """Removes the filter of least worth per MAC until the cost is met. Returns (price, sum of worths)."""
        price, announced = None, 0.0
        while self.macs.at(self.widths) > target:
            weakest = np.array([self._next_worth(g) for g in range(len(self.ranked))])
            density = np.where(np.isfinite(weakest), self._density(np.maximum(weakest, 0.0), self.widths - 1), np.inf)
            density = np.where(np.isfinite(weakest) & (weakest < 0), weakest, density)
            g = int(np.argmin(density))
            if not np.isfinite(density[g]):
                break
            price = float(density[g])
            announced += max(float(weakest[g]), 0.0)
            self.gone[g].append(self.ranked[g].pop(0))
            self.widths[g] -= 1
        return price, announced

    def _next_worth(self, g: int) -> float:
        """The worth of the weakest filter that may still leave group g; infinite if none may."""
        if not self.ranked[g] or self.widths[g] <= self.least[g]:
            return np.inf
        return self.books[self.macs.names[g]].worth[self.ranked[g][0]]

    def take_back_up_to(self, target: float) -> None:
        """Takes back removed filters that still fit under the target, the strongest first: fine adjustment."""
        last = [(self.books[self.macs.names[g]].worth[c], g, c) for g, out in enumerate(self.gone) for c in out]
        for worth, g, c in sorted(last, reverse=True):
            self.widths[g] += 1
            if self.macs.at(self.widths) <= target:
                self.gone[g].remove(c)
                self.regained += max(worth, 0.0)
            else:
                self.widths[g] -= 1

    def insert_up_to(self, target: float) -> None:
        """Inserts one channel at a time where a typical filter, under the prior, earns most per MAC."""
        open_to = np.ones(len(self.born), dtype=bool)
        while open_to.any():
            density = np.where(open_to, self._density(self.typical, self.widths + 1), -np.inf)
            g = int(np.argmax(density))
            self.widths[g] += 1
            if self.macs.at(self.widths) <= target:
                self.born[g] += 1
            else:
                self.widths[g] -= 1
                open_to[g] = False

    def plan(self) -> dict[str, IndexMap]:
        """The index maps of the groups that change."""
        plan = {}
        for name, gone, born in zip(self.macs.names, self.gone, self.born, strict=True):
            width = len(self.books[name].worth)
            index_map = IndexMap.removing(gone, width).inserting(born)
            if not index_map.is_identity:
                plan[name] = index_map
        return plan


def _typical(books: Books) -> float:
    """What a further filter of this group may be worth: the mean worth of the weaker half of those that are judged."""
    judged: Sequence[float] = sorted(w for w, grace in zip(books.worth, books.grace, strict=True) if not grace)
    weaker = judged[: max(len(judged) // 2, 1)]
    return max(float(np.mean(weaker)), 0.0) if weaker else 0.0
