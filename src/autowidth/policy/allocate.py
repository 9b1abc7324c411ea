"""Who leaves and who comes: the allocator that turns worths, costs and a target into a plan.

Letters: g channel groups in the order of `cost.names`; arrays over them are (g,). A block is the run of filters that
leave a group together: one, or as many as lead to the next multiple.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autowidth.channels import IndexMap
from autowidth.policy.limits import Limits
from autowidth.policy.situation import Array, Cost, Decision, GroupReport, Situation, Unit

NEWBORN_RETURNS = 2.0
"""How fast the gain of newborns falls with the width of their group, as a power of it: the prior of decision 002."""

LARGEST_BIRTH = 0.25
"""Newborns of one review, as a share of their group's width (74 in a stream of 60 undid a run: docs/decisions/009)."""


def guarded(decision: Decision, situation: Situation, limits: Limits) -> Decision:
    """The decision with what it may cost: twice what was predicted and the tolerance; half of it in doubt."""
    most = 2 * (decision.predicted or 0.0) + limits.tolerance
    if situation.agreement is None or situation.agreement >= limits.doubt:
        return replace(decision, max_rise=most)
    note = (
        f"the last audits ranked filters with a Spearman of {situation.agreement:.2f}, below {limits.doubt:g}: "
        "the plan may cost only half as much"
    )
    return replace(decision, max_rise=most / 2, notes=(note, *decision.notes))


def shrunk(decision: Decision, groups: Sequence[GroupReport]) -> Decision:
    """The weaker half of a decision's removals, and no insertions; what it predicts holds their interactions.

    Widths that change stay multiples of the decision's: it may be less than half.
    """
    reports = {report.name: report for report in groups}
    everyone = [(name, c) for name, index_map in decision.plan.items() for c in index_map.removed]
    order = sorted((reports[name].worth[c], name, c) for name, c in everyone)
    gone: dict[str, list[int]] = {}
    for _, name, c in order[: len(order) // 2]:
        gone.setdefault(name, []).append(c)
    plan = {}
    for name, channels in gone.items():
        size = decision.plan[name].size
        count = len(channels) - (len(channels) - size) % decision.multiple
        if count > 0:
            plan[name] = IndexMap.removing(channels[:count], size)
    predicted = sum(reports[name].predicted(index_map.removed) for name, index_map in plan.items())
    return replace(decision, plan=plan, predicted=predicted)


def uniform_share(cost: Cost, widths: Mapping[str, int], target: float) -> float:
    """The factor by which all widths are multiplied in a uniform network that costs `target`; by bisection."""
    start = np.array([widths[name] for name in cost.names], dtype=np.float64)
    low, high = 0.0, 1.0
    while cost.at(start * high) < target:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.at(start * middle) < target else (low, middle)
    return high


@dataclass(slots=True, kw_only=True)
class Allocation:
    """Widths on the way from now to a plan: the weakest filters leave, newborns enter where filters earn most.

    ranked: filters that may leave, the weakest first, by group; gone: the blocks that have left, by group, in order;
    born: newborns by group; share (g,): widths of a uniform network of the cost aimed at; widths (g,): as they are
    now; typical (g,): what a newborn is expected to be worth, nats; open (g,): groups that may change.
    """

    cost: Cost
    limits: Limits
    reports: list[GroupReport]
    ranked: list[list[int]]
    share: Array
    widths: Array
    gone: list[list[tuple[int, ...]]]
    born: list[int]
    typical: Array
    open: NDArray[np.bool_]

    @classmethod
    def of(cls, situation: Situation, limits: Limits, cost: Cost, target: float) -> Allocation:
        """The state at the start of a review that aims, in the end, at this cost."""
        by_name = {report.name: report for report in situation.groups}
        reports = [by_name[name] for name in cost.names]
        start = {report.name: report.width_start for report in reports}
        factor = uniform_share(cost, start, target)
        kept = limits.protected(cost.names)
        return cls(
            cost=cost,
            limits=limits,
            reports=reports,
            ranked=[list(report.judged) for report in reports],
            share=np.array([report.width_start * factor for report in reports]),
            widths=np.array([report.width for report in reports], dtype=np.float64),
            gone=[[] for _ in reports],
            born=[0 for _ in reports],
            typical=np.array([limits.newborn * _typical(report) for report in reports]),
            open=np.array([report.name not in kept for report in reports]),
        )

    @property
    def total(self) -> float:
        """The cost at the widths as they are now."""
        return self.cost.at(self.widths)

    def decide(self, target: float, offered: float, *, unit: Unit, exactly: bool = False) -> Decision:
        """Removes down to the target less what is offered to newborns, who take of it what they can pay for.

        What they leave goes back to the strongest of those removed. `exactly`: see `remove_down_to`.
        """
        grows = self.total < target
        price, predicted = self.remove_down_to(target - offered, exactly=exactly)
        regained = self.take_back_up_to(target - offered)
        if offered:
            self.insert_up_to(target, price or 0.0, most=LARGEST_BIRTH)
            if grows:  # who must grow arrives, and floods where nothing else is left
                self.insert_up_to(target, price or 0.0, most=None)
            regained += self.take_back_up_to(target)
        return Decision(
            plan=self.plan(), target=target, unit=unit, price=price, prices=self._prices(price),
            predicted=predicted - regained, multiple=self.limits.multiple,
        )  # fmt: skip

    def _density(self, worth: Array, left: Array) -> Array:
        """Worth per unit of cost, under the prior of diminishing returns, if `left` channels are left in each group."""
        prior = (self.share / np.maximum(left, 0.5)) ** self.limits.diminishing
        return worth * prior / np.maximum(self.cost.of_channel(self.widths), 1e-12)

    def _prices(self, price: float | None) -> dict[str, float]:
        """What one filter of each group has to be worth at this price, nats per sample; empty without a price."""
        if price is None:
            return {}
        worth_one = self._density(np.ones_like(self.widths), self.widths)
        return dict(zip(self.cost.names, (price / worth_one).tolist(), strict=True))

    # ---- removal

    def remove_down_to(self, target: float, *, exactly: bool) -> tuple[float | None, float]:
        """Removes the filters of least worth per cost until the target is met. Returns (price, sum predicted).

        With `exactly`, of what a block saves only that counts which is still needed, so that small blocks go before a
        large one at the end. Without it the widths may get ahead: a large block is sold when its turn has come.
        """
        price, predicted = None, 0.0
        while (needed := self.total - target) > 0:
            blocks = [self._next_block(g) for g in range(len(self.reports))]
            worth = np.array([self._mean_worth(g, block) for g, block in enumerate(blocks)])
            sizes = np.array([max(len(block), 1) for block in blocks])
            density = self._density(np.maximum(worth, 0.0), self.widths - sizes)
            if exactly:  # the more a block saves beyond the need, the dearer it is
                order = density * np.maximum(self.cost.of_channel(self.widths) * sizes / needed, 1.0)
            else:
                order = density
            order = np.where(worth < 0, worth, order)  # who does harm leaves first, the worst of them before others
            g = int(np.argmin(np.where(np.isfinite(worth), order, np.inf)))
            if not np.isfinite(worth[g]):
                break
            price = float(density[g])
            predicted += self._leave(g, blocks[g])
        return price, predicted

    def _leave(self, g: int, block: tuple[int, ...]) -> float:
        """The block leaves group g. Returns what that should cost, nats."""
        self.gone[g].append(block)
        del self.ranked[g][: len(block)]
        self.widths[g] -= len(block)
        return self._last_cost(g)

    def _next_block(self, g: int) -> tuple[int, ...]:
        """The weakest filters that leave group g together, down to the next multiple; empty where none may."""
        width, multiple = int(self.widths[g]), self.limits.multiple
        left = (width - 1) // multiple * multiple
        count = width - left
        if not self.open[g] or left < self.limits.min_width or count > len(self.ranked[g]):
            return ()
        return tuple(self.ranked[g][:count])

    def _mean_worth(self, g: int, block: tuple[int, ...]) -> float:
        """The mean worth of the filters of a block that leaves next, nats; infinite for an empty one."""
        if not block:
            return np.inf
        report, left = self.reports[g], sum(map(len, self.gone[g]))
        alone = float(np.mean([report.worth[c] for c in block]))
        return alone + report.beyond(len(block), after=left) / len(block)

    def _last_cost(self, g: int) -> float:
        """What the block of group g that left last should cost, nats."""
        return self.reports[g].predicted(self.gone[g][-1], after=sum(map(len, self.gone[g][:-1])))

    def take_back_up_to(self, target: float) -> float:
        """Takes back removed filters that still fit, the strongest first: fine adjustment. Returns their worths."""
        regained, open_to = 0.0, {g for g, blocks in enumerate(self.gone) if blocks}
        while open_to:
            g = max(sorted(open_to), key=self._last_cost)
            block, worth = self.gone[g][-1], self._last_cost(g)
            self.widths[g] += len(block)
            keeps_multiple = not self.born[g] or self.widths[g] % self.limits.multiple == 0
            if keeps_multiple and self.total <= target:
                self.gone[g].pop()
                regained += worth
            else:
                self.widths[g] -= len(block)
            if not self.gone[g] or self.gone[g][-1] == block:
                open_to.remove(g)
        return regained

    # ---- insertion

    def insert_up_to(self, target: float, price: float, *, most: float | None) -> None:
        """Inserts channels where a typical filter, under the prior, earns most per cost, and more than the price.

        A group grows to its next multiple at a time, and by the share `most` of its width at most; None: by any.
        """
        open_to, multiple, before = self.open.copy(), self.limits.multiple, self.widths.copy()
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
            if room and self.total <= target:
                self.born[g] += count
            else:
                self.widths[g] -= count
                open_to[g] = False

    def plan(self) -> dict[str, IndexMap]:
        """The index maps of the groups that change."""
        plan = {}
        for report, blocks, born in zip(self.reports, self.gone, self.born, strict=True):
            gone = [c for block in blocks for c in block]
            index_map = IndexMap.removing(gone, report.width).inserting(born)
            if not index_map.is_identity:
                plan[report.name] = index_map
        return plan


def _typical(report: GroupReport) -> float:
    """What a further filter of this group may be worth: the mean of the weaker half of those that are judged, nats.

    Where a trial has said what the weaker ones cost together, that takes the place of the sum of their worths.
    """
    weaker = [report.worth[c] for c in report.judged[: max(len(report.judged) // 2, 1)]]
    alone = max(float(np.mean(weaker)), 0.0) if weaker else 0.0
    return alone + report.interaction * len(weaker)
