"""A model of accuracy over log widths, and the shapes that it wants to see next."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from autowidth.lab.studies.widths import Array, Shape, Space, distance, log_widths, random_direction

CANDIDATES = 500
"""Shapes among which Thompson samples choose."""

APART = 0.05
"""Smallest distance, in root mean square of log widths, between a proposal and what was trained or proposed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """A Gaussian process over log widths with a length scale for every group and noise, fitted to accuracies.

    shift, scale: mean and standard deviation of the accuracies; observed: the accuracies, (n,); covered: their
    log widths, (n, groups).
    """

    process: GaussianProcessRegressor
    covered: Array
    observed: Array
    shift: float
    scale: float

    @classmethod
    def fitted(cls, shapes: Sequence[Shape], accuracies: Sequence[float]) -> Surrogate:
        """The process whose hyperparameters are most likely, given accuracies of trained shapes, repeats allowed."""
        x = np.stack([log_widths(shape) for shape in shapes])
        y = np.asarray(accuracies, dtype=np.float64)
        shift, scale = float(y.mean()), float(y.std()) or 1.0
        kernel = ConstantKernel(4.0, (0.1, 100.0)) * RBF(np.full(x.shape[1], 1.0), (0.2, 20.0))
        process = GaussianProcessRegressor(kernel + WhiteKernel(0.2, (1e-3, 2.0)), random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound: a group of no effect
            process.fit(x, (y - shift) / scale)
        return cls(process=process, covered=x, observed=y, shift=shift, scale=scale)

    def smoothed(self, shapes: Sequence[Shape]) -> Array:
        """Expected accuracies, (shapes,)."""
        x = np.stack([log_widths(shape) for shape in shapes])
        return np.asarray(self.process.predict(x) * self.scale + self.shift)

    def drawn(self, shapes: Sequence[Shape], count: int, generator: np.random.Generator) -> Array:
        """Accuracies of the shapes in `count` functions drawn from the process, (count, shapes), without noise."""
        mean, covariance = self.process.predict(np.stack([log_widths(s) for s in shapes]), return_cov=True)
        quiet = covariance - (self.process.kernel_.k2.noise_level - 1e-6) * np.eye(len(shapes))
        root = np.linalg.cholesky(quiet)
        standard = mean + generator.standard_normal((count, len(shapes))) @ root.T
        return np.asarray(standard * self.scale + self.shift)

    @property
    def noise(self) -> float:
        """Standard deviation of accuracy between repeats of one shape, as the process sees it."""
        return float(np.sqrt(self.process.kernel_.k2.noise_level)) * self.scale

    def left_out(self) -> Array:
        """The accuracy of every trained shape as expected without its shape's trainings, (n,), same hyperparameters.

        Rasmussen and Williams 2006, section 5.4.2, for blocks of equal rows.
        """
        inverse = np.linalg.inv(self.process.kernel_(self.covered))
        weights = inverse @ ((self.observed - self.shift) / self.scale)
        _, block = np.unique(self.covered, axis=0, return_inverse=True)
        expected = np.empty(len(self.observed))
        for b in np.unique(block):
            mine = np.flatnonzero(block == b)
            expected[mine] = self.observed[mine] - self.scale * np.linalg.solve(
                inverse[np.ix_(mine, mine)], weights[mine]
            )
        return expected


def proposals(space: Space, surrogate: Surrogate, trained: Sequence[Shape], count: int, *, seed: int) -> list[Shape]:
    """`count` shapes to train next: a third where the expected accuracy is highest, the rest by Thompson sampling.

    A shape is no closer than `APART` to another or to a trained one, unless nothing else is left.
    """
    generator = np.random.default_rng(seed)
    ranked = [trained[n] for n in np.argsort(-surrogate.smoothed(trained))]
    chosen: list[Shape] = []
    for start in ranked:
        if len(chosen) >= max(count // 3, 1):
            break
        _take(chosen, climbed(space, surrogate, start), trained)
    around = _candidates(space, ranked[:20], generator)
    for sample in surrogate.drawn(around, count * 4, generator):
        if len(chosen) >= count:
            break
        _take(chosen, around[int(sample.argmax())], trained)
    for shape in around:
        if len(chosen) >= count:
            break
        _take(chosen, shape, trained)
    return chosen


def _take(chosen: list[Shape], shape: Shape, trained: Sequence[Shape]) -> None:
    """Appends the shape where it is far enough from all that there is."""
    if all(distance(shape, other) >= APART for other in (*chosen, *trained)):
        chosen.append(shape)


def _candidates(space: Space, bases: Sequence[Shape], generator: np.random.Generator) -> list[Shape]:
    """Different shapes around the bases, near and far."""
    found: dict[Shape, None] = {}
    for _ in range(CANDIDATES * 4):
        base = bases[int(generator.integers(len(bases)))]
        offset = random_direction(len(base), float(generator.uniform(0.05, 0.5)), generator)
        if shape := space.nearest(log_widths(base) + offset):
            found.setdefault(shape)
        if len(found) >= CANDIDATES:
            break
    return list(found)


def climbed(space: Space, surrogate: Surrogate, start: Shape, steps: int = 25) -> Shape:
    """The shape reached from `start` by the best single step, again and again, until none promises more.

    A step widens one group and narrows all others a little, or the reverse: the cost stays the same.
    """
    best, value = start, float(surrogate.smoothed([start])[0])
    for _ in range(steps):
        near = list(dict.fromkeys(_neighbours(space, best)))
        values = surrogate.smoothed(near) if near else np.array([-np.inf])
        if values.max() <= value + 1e-6:
            break
        best, value = near[int(values.argmax())], float(values.max())
    return best


def _neighbours(space: Space, shape: Shape) -> list[Shape]:
    logs = log_widths(shape)
    found = []
    for g in range(len(shape)):
        for size in (-0.25, -0.1, 0.1, 0.25):
            offset = np.zeros(len(shape))
            offset[g] = size
            found.append(space.nearest(logs + offset))
    return [near for near in found if near is not None and near != shape]
