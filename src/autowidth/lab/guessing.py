"""How small an attempt may aim: what the loss allows, what there are steps for, what training may win back."""

from __future__ import annotations

from autowidth.review.effort import Effort

EXPONENT = 0.3
"""Of the power law of loss and size by which the first attempt is guessed: for short training after a removal."""

HEALING = 100
"""Optimizer steps after which a network of half the MACs is itself again, and one of a third after twice as many."""

SMALLEST, LARGEST = 0.25, 0.9
"""Shares of the MACs that an attempt may aim at: below, too little is known; above, too little is won."""

FIRST = 0.7
"""The share of the MACs that the first attempt leaves at most, whatever the loss: networks that err on a third of their
pictures lose as little by it as by a fifth, and a judgement takes back what does not hold (docs/log/014)."""

WON_BACK = 2.0
"""How many times what is tolerated a trained network may lose by narrowing alone, for training to win it back. Three
epochs made 2.15 of 5.2 points, and .089 of .246 nats (docs/log/014)."""

GLANCE = Effort(probe_samples=512, audit_samples=256, audit_filters=0)
"""What a review looks at that narrows a trained network without training, where nothing else is asked for."""


def first_share(loss: float, allowed: float) -> float:
    """The share of the MACs at which a network of this loss loses as many nats as are allowed, by a power law.

    loss ~ MACs ** -EXPONENT, so that a network whose loss is next to nothing may become very small. Between SMALLEST
    and FIRST.
    """
    share: float = (1 + allowed / max(loss, 1e-6)) ** (-1 / EXPONENT)
    return min(max(share, SMALLEST), FIRST)


def healed_share(steps: int) -> float:
    """The least share of the MACs at which so many steps make up for a removal."""
    return 1 / (1 + steps / HEALING)


def may_be_won_back(rise: float, allowed: float) -> bool:
    """Whether training may win back a rise of the loss by so many nats, but for what is allowed."""
    return rise <= WON_BACK * allowed
