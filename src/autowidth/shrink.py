"""A trained network made smaller without training: several reviews in a row, and nothing between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from autowidth.attach import check_groups, check_kinds, check_start, first_batch, latency_of, loss_of
from autowidth.history import History
from autowidth.policy import Budget, Never, Policy
from autowidth.review.answers import Answered, answers_loss
from autowidth.review.batches import Loss
from autowidth.review.effort import Effort
from autowidth.review.review import Reviewer
from autowidth.review.state import quiet
from autowidth.review.trial import NormsAfter
from autowidth.review.untrained import STEPS, ShrinkError, fitted_at_rest, review_, untrained
from autowidth.trace import Inputs, trace
from autowidth.unwrapping import inner_model, written
from autowidth.wrappers import group_of


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
            importance=None, reconstruct=True, seed=seed, norms=norms, effort=fitted_at_rest(effort, batches),
            latency=latency_of(model, channel_map, policy, None, example_inputs),
        )  # fmt: skip
        check_start(reviewer, batch)
    return reviewer
