"""Asymptotic soft filter pruning (He, Dong, Kang, Fu, Yan, Yang 2020, arXiv 1808.07471): soft, by a rising share."""

from __future__ import annotations

import math

from scipy.optimize import brentq

from autowidth.lab.baselines import registry
from autowidth.lab.baselines.soft import Soft

EARLY, MOST = 1 / 8, 3 / 4
"""At this share of training this much of the final removal is reached: the paper's D = 1/8, and its 3/4."""


def _excess(rate: float) -> float:
    return (1 - math.exp(-rate * EARLY)) - MOST * (1 - math.exp(-rate))


RATE: float = brentq(_excess, 1.0, 100.0)
"""The k of the paper's a exp(-k t) + b through its three points, with t from 0 to 1."""


def reached(progress: float) -> float:
    """How much of the final removal is due: 0 at the start, 3/4 after an eighth of the training, 1 at its end.

    On the paper's curve a exp(-k t) + b through these points. It counts t in epochs of the whole training; here the
    training ends with the removal, and the first point is no removal at all.
    """
    return (1 - math.exp(-RATE * progress)) / (1 - math.exp(-RATE))


@registry.training_rule(name="asymptotic", importance="l2", source="He et al. 2020, arXiv 1808.07471")
def rule(*, widths_left: float) -> Soft:
    """The rule that comes to leave this share of every width."""
    return Soft(widths_left=widths_left, reached=reached)
