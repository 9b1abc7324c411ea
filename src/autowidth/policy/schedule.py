"""When reviews take place, and where in their row one stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autowidth.policy.limits import PolicyError
from autowidth.policy.situation import Situation


@dataclass(frozen=True, slots=True)
class Standing:
    """Which review this is, counted from 1, and of how many."""

    number: int
    count: int

    @property
    def is_last(self) -> bool:
        return self.number == self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`count` reviews, evenly spaced between the shares `begin` and `end` of the run.

    With none of them a budget is met by `AutoWidth.shrink`, before the first step. The defaults were measured on
    held-out images (docs/decisions/009). Raises PolicyError for values out of range.
    """

    count: int = 8
    begin: float = 0.06
    end: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise PolicyError(f"reviews from {self.begin:g} to {self.end:g} of the run: need 0 <= begin < end <= 1")
        if self.count < 0:
            raise PolicyError(f"count={self.count}: need count >= 0")

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps, counted from 1, after which a review takes place."""
        return tuple(sorted({max(1, round(x * total_steps)) for x in np.linspace(self.begin, self.end, self.count)}))

    def standing(self, situation: Situation) -> Standing:
        """Which of the reviews of its run a situation belongs to."""
        steps = self.reviews(situation.total_steps) or (situation.step,)
        return Standing(sum(step <= situation.step for step in steps), len(steps))
