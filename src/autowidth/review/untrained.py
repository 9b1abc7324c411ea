"""Reviews in a row of a network that does not train: the policy for them, what they measure, and how they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

from autowidth.errors import AutoWidthError
from autowidth.history import Event
from autowidth.policy import Budget, Limits, Policy, Schedule, Start
from autowidth.review.answers import Answered, answers_loss
from autowidth.review.batches import of_pairs, samples_of
from autowidth.review.calibrate import Calibration
from autowidth.review.effort import Effort, FittedEffort
from autowidth.review.review import Reviewer

STEPS = 1000
"""On how many steps the schedule of a policy is laid out, none of which are taken."""

FEWEST, EACH = 3, 0.1
"""Reviews where nobody says how many: one for every tenth of the cost that goes, and at least so many."""

SHORT, STEPS_EACH = 2, 40
"""Reviews before the first step of a run: no more than one for so many of its optimizer steps, but two in any case."""

PROBE, AUDIT, FILTERS = 1024, 256, 4
"""Samples that score filters and samples for trials at every review, and filters that are ablated for an audit."""


class ShrinkError(AutoWidthError, ValueError):
    """A policy that says nothing about a network that does not train."""


def reviews_for(policy: Policy) -> int:
    """How many reviews the removal of so much takes."""
    share = policy.target if isinstance(policy, Budget) and not policy.is_absolute else 1.0
    return max(FEWEST, round((1 - share) / EACH))


def untrained(policy: Policy, reviews: int | None = None) -> Policy:
    """The policy for a network that does not train: so many reviews, no insertion, and no plan is put off.

    Raises ShrinkError for a policy without limits or schedule of the usual kind, or one that never reviews.
    """
    limits, schedule = getattr(policy, "limits", None), getattr(policy, "schedule", None)
    if not is_dataclass(policy) or not isinstance(limits, Limits) or not isinstance(schedule, Schedule):
        raise ShrinkError(f"policy {policy} has no schedule of reviews: pass Budget(...), Price(...) or Auto()")
    changed: Policy = replace(
        policy,
        schedule=Schedule(count=reviews or reviews_for(policy), begin=0.0, end=1.0),
        limits=replace(limits, offer=0.0, max_move=1.0, tolerance=math.inf),
    )
    return changed


def review_(reviewer: Reviewer, step: int) -> None:
    """One review of a network that does not train, of which norms may be changed all the same; then evaluation mode."""
    reviewer.model.train()  # what a review may change are norms in training mode
    try:
        reviewer.review(step, STEPS)
    finally:
        reviewer.model.eval()


def shrink_with(
    reviewer: Reviewer, total_steps: int, *, batches: Iterable[Any], reviews: int | None, effort: Effort | None,
    report: Callable[[Event], None],
) -> tuple[Event, ...]:  # fmt: skip
    """Reviews in a row by what the reviewer's network answers to these batches; events of step 0.

    The reviewer is then as it was, with another network. Raises ShrinkError, ProbeError, PolicyError, BudgetError.
    """
    reviews = reviews or min(reviews_for(reviewer.policy), max(total_steps // STEPS_EACH, SHORT))
    found, modes = list[Event](), {module: module.training for module in reviewer.model.modules()}
    history = reviewer.history
    with _at_rest(reviewer, untrained(reviewer.policy, reviews), batches, effort):
        for step in reviewer.policy.reviews(STEPS):
            before = len(history)
            try:
                review_(reviewer, step)
            finally:  # an interrupt comes behind a review that was made
                for made in history.events[before:]:
                    history.retract(made)
                    history.append(replace(made, step=0, total_steps=total_steps))
                for module, training in modes.items():
                    module.training = training
            found.append(history.events[-1])
            report(found[-1])
    return tuple(found)


@contextmanager
def _at_rest(
    reviewer: Reviewer, policy: Policy, batches: Iterable[Any], effort: Effort | None
) -> Iterator[None]:  # fmt: skip
    """The reviewer with what judges a network that does not train, and afterwards with what it had."""
    policy.check(Start(costs=reviewer.costs(), widths=reviewer.channel_map.widths, samples=reviewer.samples))
    answers = Answered(batches, reviewer.model, seed=reviewer.seed)
    lent = {
        "policy": policy, "probe": answers, "loss": of_pairs(answers_loss), "effort": fitted_at_rest(effort, answers),
        "importance": None, "norms": "corrected", "calibration": Calibration(),
    }  # fmt: skip
    own = {name: getattr(reviewer, name) for name in lent}
    try:
        for name, value in lent.items():
            setattr(reviewer, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(reviewer, name, value)


def fitted_at_rest(effort: Effort | None, batches: Iterable[Any]) -> FittedEffort:
    """How much a review looks at; where there are fewer samples, a fifth of them are for trials."""
    wanted, there = effort or Effort(), samples_of(batches)
    probe = wanted.probe_samples or PROBE
    audit = AUDIT if wanted.audit_samples is None else wanted.audit_samples
    if there is not None and probe + audit > there:
        audit = min(audit, there // 5)
        probe = min(probe, there - audit)
    filters = FILTERS if wanted.audit_filters is None else wanted.audit_filters
    return FittedEffort(probe_samples=probe, audit_samples=audit, audit_filters=filters)
