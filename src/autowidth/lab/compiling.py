"""A training loss that is compiled where that pays: as long as compiling takes a small share of the run."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from autowidth.lab.loop_parts import compiled

Loss = Callable[[Tensor, Tensor], Tensor]

EAGER = 5
"""Steps that are timed before anything is compiled."""

PER_LAYER = 2.0
"""Seconds that compiling a layer with a weight takes, forward and backward, before it has been measured (two cores)."""


class PacedLoss:
    """The loss as it was written, or compiled, whichever is said to be quicker for what is left of the run.

    share: how much of the run, by the time that compiled steps take, compiling may take; 1 compiles always, at once.
    layers: weights of the network, by which the time for the first compilation is guessed. total_steps: of the run.
    ahead: the steps until the widths may change again, for which compiled code is of use. say: is told, once, where
    nothing is compiled.

    Times are of whole steps, from one call to the next. Which of both is used changes results by rounding only.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        model: str,
        share: float,
        layers: int,
        total_steps: int,
        ahead: Callable[[], int],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
        compiler: Callable[[Loss, str], Loss] = compiled,
    ) -> None:
        self.loss, self.quick = loss, compiler(loss, model)
        self.share, self.total_steps, self.ahead, self._say = share, total_steps, ahead, say
        self.seconds = 0.0
        """What compiling has taken so far."""
        self._clock = clock
        self._guess = PER_LAYER * layers
        self._eager: list[float] = []
        self._compiled: list[float] = []
        self._before: tuple[float, bool, bool] | None = None  # when, whether compiled, whether for the first time
        self._decided: bool | None = None
        self._fresh, self._said = True, False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._note(self._clock())
        if self._decided is None and (self.share == 1 or len(self._eager) >= EAGER):
            self._decided = self.pays()
        used = bool(self._decided)
        self._before = (self._clock(), used, used and self._fresh)
        self._fresh &= not used
        return (self.quick if used else self.loss)(x, y)

    def anew(self) -> None:
        """The widths have changed: what was compiled is of no use any more."""
        self._note(self._clock())
        self._before, self._decided, self._fresh = None, None, True
        self._compiled = self._compiled[-EAGER:]

    def pays(self) -> bool:
        """Whether compiling for the present widths stays within the share, and wins more time than it takes."""
        if self.share == 1:
            return True
        eager = min(self._eager)
        quick = min(self._compiled, default=eager / 2)
        allowed = self.share * self.total_steps * min(eager, quick)
        pays = self.seconds + self._guess <= allowed and self._guess < (eager - quick) * self.ahead()
        if not pays and not self.seconds and not self._said:
            self._said = True
            self._say(
                f"not compiled: that takes about {self._guess:.0f} s, and {self.share:.0%} of a run of about "
                f"{self.total_steps * eager:.0f} s is allowed (compile_share)"
            )
        return pays

    def _note(self, now: float) -> None:
        """Enters how long the step since the last call has taken."""
        if self._before is None:
            return
        then, used, first = self._before
        self._before = None
        if first:
            self._guess = max(now - then - min(self._eager, default=0.0), 0.0)
            self.seconds += self._guess
        else:
            (self._compiled if used else self._eager).append(now - then)
