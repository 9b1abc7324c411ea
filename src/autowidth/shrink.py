"""A trained network made smaller without training: several reviews in a row, and nothing between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from autowidth.attach import check_groups, check_kinds, check_start, first_batch, latency_of, loss_of
from autowidth.errors import AutoWidthError
from autowidth.history import History
from autowidth.policy import Budget, Limits, Never, Policy, Schedule
from autowidth.review.answers import Answered, answers_loss
from autowidth.review.batches import Loss, samples_of
from autowidth.review.effort import Effort, FittedEffort
from autowidth.review.review import Reviewer
from autowidth.review.state import quiet
from autowidth.review.trial import NormsAfter
from autowidth.trace import Inputs, trace
from autowidth.unwrapping import inner_model, written
from autowidth.wrappers import group_of

STEPS = 1000
"""On how many steps the schedule of a policy is laid out, none of which are taken."""

FEWEST, EACH = 3, 0.1
"""Reviews where nobody says how many: one for every tenth of the cost that goes, and at least so many."""

PROBE, AUDIT, FILTERS = 1024, 256, 4
"""Samples that score filters and samples for trials at every review, and filters that are ablated for an audit."""


class ShrinkError(AutoWidthError, ValueError):
    """A policy that says nothing about a network that does not train."""


def shrink_(
    model: nn.Module,
    *,
    example_inputs: Inputs,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    loss: Loss | None = None,
    policy: Policy | None = None,
    reviews: int | None = None,
    effort: Effort | None = None,
    norms: NormsAfter = "corrected",
    seed: int = 0,
) -> History:
    """Makes a trained network smaller without training it; returns the record of the reviews.

    batches: a loader or list that can be iterated again and again, of training data as training saw them: augmented as
        then, or statistics are of something else (docs/decisions/013). About a thousand samples are looked at.
    loss_fn, loss: as for `AutoWidth`; at most one of them. None: what counts is that the network, a classifier, goes on
        giving its own softened answers (autowidth/review/answers.py), which tells far more where it knows the labels by
        heart, and needs no labels.
    policy: where to end; Budget(macs=0.7) if not given. Nothing is inserted, and no plan is put off: nothing heals in
        between.
    reviews: in how many steps; each works out anew what channels can take over. None: one for every tenth of the cost
        that a budget takes away, and at least three.
    norms: which statistics norms have afterwards: "corrected" keeps those of the network, moved by as much as the
        removal moves them on the batches; "precise" takes plain averages over the batches.

    The network is in evaluation mode afterwards. A review that fails leaves it as the review before it did. Raises
    AttachError, ProbeError, NothingToResizeError, PolicyError, BudgetError, TraceError, ShrinkError.
    """
    if loss_fn is None and loss is None:
        batches, loss_fn = answered(model, batches, seed), answers_loss
    reviewer = reviewer_of(
        model, example_inputs=example_inputs, batches=batches, loss=loss_of(loss_fn, loss),
        policy=untrained(policy or Budget(macs=0.7), reviews), effort=effort, norms=norms, seed=seed,
    )  # fmt: skip
    for step in reviewer.policy.reviews(STEPS):
        review_(reviewer, step)
    return reviewer.history


def answered(model: nn.Module, batches: Iterable[Any], seed: int) -> Answered:
    """The batches with answers of the model as it is now for labels. Raises as `shrink_` does."""
    check_kinds(model, (), batches, Never(), STEPS)
    return Answered(batches, inner_model(model), seed=seed)


def review_(reviewer: Reviewer, step: int) -> None:
    """One review of a network that does not train, of which norms may be changed all the same; then evaluation mode."""
    reviewer.model.train()  # what a review may change are norms in training mode
    try:
        reviewer.review(step, STEPS)
    finally:
        reviewer.model.eval()


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


def reviewer_of(
    model: nn.Module, *, example_inputs: Inputs, batches: Iterable[Any], loss: Loss, policy: Policy,
    effort: Effort | None, norms: NormsAfter, seed: int,
) -> Reviewer:  # fmt: skip
    """What reviews the network. Raises as `shrink_` does."""
    check_kinds(model, (), batches, policy, STEPS)
    if group_of(written(model)) is not None:
        raise ShrinkError("model is wrapped in DistributedDataParallel: pass its .module, and wrap it again afterwards")
    model = inner_model(model)
    channel_map = trace(model, example_inputs)
    check_groups(channel_map, model)
    with quiet(model):
        batch = first_batch(batches)
        reviewer = Reviewer(
            model=model, channel_map=channel_map, optimizers=(), followers=(), policy=policy, probe=batches, loss=loss,
            importance=None, reconstruct=True, seed=seed, norms=norms, effort=_fitted(effort, batches),
            latency=latency_of(model, channel_map, policy, None, example_inputs),
        )  # fmt: skip
        check_start(reviewer, batch)
    return reviewer


def _fitted(effort: Effort | None, batches: Iterable[Any]) -> FittedEffort:
    """How much a review looks at; where there are fewer samples, a fifth of them are for trials."""
    wanted, there = effort or Effort(), samples_of(batches)
    probe = wanted.probe_samples or PROBE
    audit = AUDIT if wanted.audit_samples is None else wanted.audit_samples
    if there is not None and probe + audit > there:
        audit = min(audit, there // 5)
        probe = min(probe, there - audit)
    filters = FILTERS if wanted.audit_filters is None else wanted.audit_filters
    return FittedEffort(probe_samples=probe, audit_samples=audit, audit_filters=filters)
