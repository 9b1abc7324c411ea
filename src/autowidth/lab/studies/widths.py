"""Shapes of one network that cost about the same: which there are, and directions to look for them in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from autowidth.cost import Cost

Array: TypeAlias = NDArray[np.float64]
Shape: TypeAlias = tuple[int, ...]
"""The widths of a network in the order of its channel groups."""

FAR = 12.0
"""Largest shift of log widths that is looked at: every width is at a bound by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All shapes of a network whose MACs lie in a band and whose widths lie within bounds.

    cost: MACs as a function of the widths; dense: the widths of the dense network; low, high: the band, as shares of
    its MACs; least: the smallest width; most: the largest width, as a multiple of the dense one.
    """

    cost: Cost
    dense: Shape
    low: float = 0.24
    high: float = 0.25
    least: int = 2
    most: float = 2.0

    def share(self, widths: Sequence[float] | Array) -> float:
        """The MACs of these widths as a share of those of the dense network."""
        return self.cost.at(np.asarray(widths, dtype=np.float64)) / self.macs_dense

    @property
    def macs_dense(self) -> float:
        """The MACs of the dense network."""
        return self.cost.at(np.asarray(self.dense, dtype=np.float64))

    def admits(self, widths: Sequence[int]) -> bool:
        """Whether the shape lies in the band and within the bounds."""
        bounded = all(self.least <= w <= self.most * d for w, d in zip(widths, self.dense, strict=True))
        return bounded and self.low <= self.share(widths) <= self.high

    def nearest(self, logs: Array) -> Shape | None:
        """The shape in the band next to exp(`logs`) times one factor, as expensive as the band allows.

        logs: natural logarithms of widths, (groups,). None where rounding and bounds leave no such shape.
        """
        ideal = self._at_cost(logs)
        widths = np.clip(np.rint(ideal), self.least, self._most)
        while self.share(widths) > self.high:
            excess = np.where(widths > self.least, widths / ideal, -np.inf)
            if not np.isfinite(excess.max()):
                return None
            widths[excess.argmax()] -= 1
        while (g := self._next_up(widths, ideal)) is not None:
            widths[g] += 1
        shape = tuple(int(w) for w in widths)
        return shape if self.admits(shape) else None

    @property
    def _most(self) -> Array:
        return np.floor(self.most * np.asarray(self.dense, dtype=np.float64))

    def _at_cost(self, logs: Array) -> Array:
        """Widths, not rounded, exp(`logs`) times the factor at which they cost the upper end of the band."""
        whole, most = self.macs_dense, self._most

        def at(shift: float) -> Array:
            return np.asarray(np.clip(np.exp(logs + shift), self.least, most))

        def excess(shift: float) -> float:
            return self.cost.at(at(shift)) / whole - self.high

        if excess(-FAR) >= 0:
            return at(-FAR)
        return at(brentq(excess, -FAR, FAR, xtol=1e-9) if excess(FAR) > 0 else FAR)

    def _next_up(self, widths: Array, ideal: Array) -> int | None:
        """The group furthest below its ideal width that has room for one channel more; None where there is none."""
        for g in np.argsort(widths / ideal):
            wider = widths.copy()
            wider[g] += 1
            if wider[g] <= self._most[g] and self.share(wider) <= self.high:
                return int(g)
        return None


def log_widths(shape: Sequence[int]) -> Array:
    """Natural logarithms of the widths, (groups,)."""
    return np.log(np.asarray(shape, dtype=np.float64))


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Root mean square of the differences of log widths."""
    return float(np.sqrt(np.mean((log_widths(one) - log_widths(other)) ** 2)))


def structured(names: Sequence[str]) -> Iterator[tuple[str, Array]]:
    """(What is done, offsets of log widths) for shapes that a person would try, (groups,) by group name.

    Streams against the insides of blocks (in a network without blocks: the first layer of each stage against the
    others), early against late, the inside of one stage narrowed, one stage narrowed or widened.
    """
    stages, inner = _stages(names), _inner(names)
    slope = 1 - 2 * stages / max(stages.max(), 1)
    for size in (0.3, 0.6):
        for sign, word in ((1, "narrow"), (-1, "wide")):
            yield f"insides {word}", sign * size * (1 - 2 * inner)
        for sign, word in ((1, "wide"), (-1, "narrow")):
            yield f"early {word}", sign * size * slope
    for stage in sorted(set(stages)):
        for size in (0.5, 1.0):
            yield f"insides of stage {stage:g} narrow", -size * inner * (stages == stage)
        for sign, word in ((1, "wide"), (-1, "narrow")):
            yield f"stage {stage:g} {word}", sign * 0.4 * (stages == stage)


def _stages(names: Sequence[str]) -> Array:
    """The stage of every group, counted from 0; a stem belongs to the first."""
    found = [re.search(r"stages\.(\d+)\.", name) for name in names]
    return np.array([float(match[1]) if match else 0.0 for match in found])


def _inner(names: Sequence[str]) -> Array:
    """1 for the insides of blocks, 0 for streams; without blocks 1 for the first group of each stage."""
    if any(".first." in name for name in names):
        return np.array([float(".first." in name) for name in names])
    stages = _stages(names)
    return np.array([float(g == 0 or stages[g] != stages[g - 1]) for g in range(len(names))])


def random_direction(size: int, radius: float, generator: np.random.Generator) -> Array:
    """Offsets of log widths, (size,), in a direction drawn evenly from all, with this root mean square."""
    drawn = generator.standard_normal(size)
    return np.asarray(drawn * radius / np.sqrt(np.mean(drawn**2)))
