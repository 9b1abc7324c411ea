"""What audits teach: which filters to sample, the combination of the profits that fits, how well it predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr

Array = NDArray[np.float64]

FORGET = 0.8
"""How much an audit counts at the next review: one audit of a dozen filters is mostly noise (docs/decisions/007)."""


def sample(worths: Mapping[str, Array], count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Picks filters for the audit, stratified over worth: from the ranking of all filters, one of each stretch.

    Returns at most `count` pairs (group, channel), each filter at most once.
    """
    everyone = [(float(w), name, c) for name, values in worths.items() for c, w in enumerate(values)]
    if not count:
        return []
    everyone.sort(key=lambda item: item[0])
    stretches = np.array_split(np.arange(len(everyone)), min(count, len(everyone)))
    return [everyone[int(rng.choice(stretch))][1:] for stretch in stretches if len(stretch)]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The non-negative coefficients of (next-layer, own-layer) and the evidence behind them.

    `normal` (2, 2) and `moment` (2,) are the sums of x x' and x y over audited filters, older ones forgotten by a
    fifth at each review; rows are divided by their own size first, so that it is relative errors that count. The prior
    is that the own-layer profit is the worth: it predicts removal as it is made, with reconstruction.
    """

    coefficients: tuple[float, ...] = (0.0, 1.0)
    normal: tuple[tuple[float, ...], ...] = ((16.0, 0.0), (0.0, 16.0))
    moment: tuple[float, ...] = (0.0, 16.0)

    def vector(self) -> Array:
        """The coefficients as an array (2,)."""
        return np.array(self.coefficients)


def refit(calibration: Calibration, profits: Array, changes: Array) -> Calibration:
    """Refits the coefficients to measured loss changes.

    `profits` (m, 2) are those predicted for the m audited filters, `changes` (m,) what was measured. Solves
    min |A c - b| with c >= 0 (Lawson and Hanson 1974) over the remembered evidence; the first audit is weighed
    against the prior that the own-layer profit alone is right.
    """
    usable = np.isfinite(profits).all(axis=1) & np.isfinite(changes)
    profits, changes = profits[usable], changes[usable]
    if not len(changes):
        return calibration
    size = np.abs(profits).sum(axis=1) + np.abs(changes)
    scale = size + np.median(size) + np.finfo(float).tiny
    x, y = profits / scale[:, None], changes / scale
    normal = FORGET * np.array(calibration.normal) + x.T @ x
    moment = FORGET * np.array(calibration.moment) + x.T @ y
    root = np.linalg.cholesky(normal + 1e-9 * np.trace(normal) * np.eye(2))
    coefficients, _ = nnls(root.T, np.linalg.solve(root, moment))
    if not coefficients.any():
        coefficients = calibration.vector()
    return Calibration(tuple(coefficients.tolist()), tuple(map(tuple, normal.tolist())), tuple(moment.tolist()))


def agreement(predicted: Array, measured: Array) -> tuple[float | None, float | None]:
    """How well predictions held: Spearman's rank correlation, and the slope of measured on predicted through 0.

    None where a figure is not defined: fewer than three filters, or no spread.
    """
    usable = np.isfinite(predicted) & np.isfinite(measured)
    p, m = predicted[usable], measured[usable]
    if len(p) < 3 or np.ptp(p) == 0 or np.ptp(m) == 0:
        return None, None
    return float(spearmanr(p, m).statistic), float((p @ m) / (p @ p))
