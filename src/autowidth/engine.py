"""Attached to a model and its optimizer: counts steps, and reviews the widths when the policy says so."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from autowidth.attach import (
    check_kinds,
    check_ranks,
    check_start,
    first_batch,
    fitted_effort,
    latency_of,
    loss_of,
    resizable,
    several,
)
from autowidth.boundaries import Boundary, LoopError, accumulators, check_inference, forbid_backward
from autowidth.channels import ChannelMap, ResizePlan
from autowidth.engine_state import SCHEMA, StateError, check_made, made_with, restore_, state_of
from autowidth.history import Event, History
from autowidth.policy import Auto, Budget, Policy
from autowidth.ranks import Ranks, ranks_of
from autowidth.review.batches import Loss
from autowidth.review.calibrate import Calibration
from autowidth.review.effort import Effort
from autowidth.review.review import Importance, Reviewer
from autowidth.review.state import quiet
from autowidth.review.untrained import shrink_with
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace
from autowidth.unwrapping import forget_compiled, inner_model, written
from autowidth.wrappers import group_of, inner, rebuild, rebuilt, wrappers_of

_log = logging.getLogger(__name__)


def resize_(
    model: nn.Module,
    plan: ResizePlan,
    *,
    example_inputs: Inputs,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    followers: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> ChannelMap:
    """Resizes channel groups of a live model by a plan (group name -> index map), or raises and nothing has changed.

    Parameters, buffers, optimizer state, module attributes and followers (EMA copies) change together; Parameter
    objects stay the same ones. Fresh channels have zero fan-out, so that the function is unchanged. Returns the new
    channel map. Wrappers of DistributedDataParallel around the model are looked through and rebuilt; every rank makes
    the same call then, and takes over the fresh weights of the first one. Raises UnknownGroupError or ValueError where
    the plan does not fit; warns where it has no effect.
    """
    check_inference("resize_")
    model, followers = inner_model(model), [*map(inner, followers)]
    channel_map = trace(model, example_inputs)
    with rebuilt([model, *followers]):
        resized = apply_(
            model, channel_map, plan, optimizers=several(optimizer), followers=followers, generator=generator
        )
    forget_compiled()
    return resized


class AutoWidth:
    """The engine: call `step()` after every optimizer step; now and then it reviews the widths.

    model: the model itself, or what `torch.compile` made of it. optimizer: one or several of torch, or what Accelerate
        or Lightning put around them.

    probe: a loader or list of batches that can be iterated again and again; it should hold training data that the
        policy may look at, best without augmentation. Never pass test data.
    loss_fn: called as loss_fn(model(inputs), target) on batches that are pairs, a mean over samples. Worth is in its
        unit (nats for cross-entropy).
    loss: instead of loss_fn, for batches of any kind: loss(model, batch), a mean over samples.
    policy: when to review and what to do (Budget, Price, Auto, Never); Auto if not given.
    total_steps: optimizer steps of the whole run; the policy's schedule is a share of it.
    followers: EMA copies of the model that are resized with it.
    effort: how much a review looks at; what it leaves open is fitted so that reviews take about 4 % of the run.
    batch_size: samples per optimizer step, for that; None for those of a batch of the probe.
    importance: what takes the place of our worth; it is used as it is, without audit. A filter about which it says
        nothing (NaN) stays.
    reconstruct: whether co-channels take over, by least squares, what is removed.
    resize_frozen: whether channel groups with parameters that do not train (requires_grad=False) are resized too.
    latency_inputs: what is timed where the policy bounds latency, often a batch of one; None for the example inputs.
    history: a file that holds every event before training goes on; None keeps them in memory.
    seed: decides which filters are audited and how fresh weights are drawn.
    process_group: the ranks that train the model together, each of which attaches an engine with the same arguments and
        calls it equally often; None for those of a DistributedDataParallel wrapper, which may be passed as the model,
        or else for all of torch.distributed, where that is up. Probes may be the same, or a shard of the data each;
        what the ranks find is added up, and the first one writes the history.

    Raises AttachError, NothingToResizeError with the reasons, ForeignOptimizerError, UnsupportedOptimizerError,
    PolicyError, BudgetError, TraceError, ProbeError, LoopError inside of torch.inference_mode; FileExistsError where
    the history is there already; for ranks RanksDifferError, RankStoppedError, LostRankError, WrapperError,
    ShardedModelError.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        example_inputs: Inputs,
        probe: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        loss: Loss | None = None,
        policy: Policy | None = None,
        total_steps: int,
        followers: Sequence[nn.Module] = (),
        effort: Effort | None = None,
        batch_size: int | None = None,
        importance: Importance | None = None,
        reconstruct: bool = True,
        resize_frozen: bool = False,
        latency_inputs: Inputs | None = None,
        history: str | os.PathLike[str] | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        model, optimizers, policy = written(model), several(optimizer), policy or Auto()
        check_kinds(model, optimizers, probe, policy, total_steps)
        ranks, model = ranks_of(process_group or group_of(model)), inner_model(model)
        with ranks.together("attaching the engine"):
            model, steps = _alone(model, "AutoWidth(...)"), policy.reviews(total_steps)
            channel_map = resizable(model, example_inputs, optimizers, resize_frozen=resize_frozen)
            with quiet(model):  # a shuffled loader draws from the global random state
                batch = first_batch(probe) if steps else None
                self._reviewer = Reviewer(
                    model=model, channel_map=channel_map, optimizers=optimizers,
                    followers=tuple(map(inner, followers)), policy=policy, probe=probe, loss=loss_of(loss_fn, loss),
                    importance=importance, reconstruct=reconstruct, seed=seed, ranks=ranks,
                    effort=fitted_effort(effort, channel_map, len(steps), total_steps, batch_size, batch, ranks),
                    latency=latency_of(model, channel_map, policy, latency_inputs, example_inputs, ranks),
                )  # fmt: skip
                check_ranks(self._reviewer, total_steps)
                check_start(self._reviewer, batch)
            self._begin(total_steps, steps, history if ranks.rank == 0 else None)

    def _begin(self, total_steps: int, steps: Sequence[int], history: str | os.PathLike[str] | None) -> None:
        """Starts counting, and the record."""
        if history is not None:
            self._reviewer.history = History(
                self.channel_map.widths, path=history, layers=self._reviewer.history.layers
            )
        self.steps, self.total_steps, self._due, self._review_steps = 0, total_steps, False, frozenset(steps)
        self.macs_start, self.params_start = self.macs, self.params
        self._progress = _Progress(self.steps, self.total_steps, tuple(sorted(self._review_steps)))
        self._farewell = weakref.finalize(self, _say_what_never_took_place, self._progress)
        self._boundary = Boundary(self.model, self.optimizers, due=1 in self._review_steps)
        _engines.add(self)

    # ---- what it says of itself

    @property
    def model(self) -> nn.Module:
        """The model that is resized."""
        return self._reviewer.model

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers that are resized with it."""
        return self._reviewer.optimizers

    @property
    def followers(self) -> tuple[nn.Module, ...]:
        """The EMA copies that are resized with it."""
        return self._reviewer.followers

    @property
    def policy(self) -> Policy:
        """What decides when to review and what to do."""
        return self._reviewer.policy

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        return self._reviewer.ranks

    @property
    def channel_map(self) -> ChannelMap:
        """The present channel map."""
        return self._reviewer.channel_map

    @property
    def history(self) -> History:
        """The record of all reviews."""
        return self._reviewer.history

    @property
    def calibration(self) -> Calibration:
        """What the audits have taught so far."""
        return self._reviewer.calibration

    @property
    def widths(self) -> dict[str, int]:
        """The present widths by channel group."""
        return self.channel_map.widths

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one sample, now."""
        return self._reviewer.macs

    @property
    def params(self) -> int:
        """The number of parameters now."""
        return self._reviewer.params

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds of one forward pass of the present model, timed now; None where the policy does not bound it."""
        return None if self._reviewer.latency is None else self._reviewer.latency.now()

    @property
    def latency_ms_start(self) -> float | None:
        """The same of the starting model, as it was timed then."""
        return None if self._reviewer.latency is None else self._reviewer.latency.fit.measured

    @property
    def review_seconds(self) -> float:
        """Wall time spent in reviews so far."""
        return sum(event.seconds_total for event in self.history)

    def __repr__(self) -> str:
        done, planned = len(self.history), len(self._review_steps) + sum(event.step == 0 for event in self.history)
        return (
            f"AutoWidth({type(self.model).__name__}, {self.policy.aim}: step {self.steps} of {self.total_steps}, "
            f"{done} of {planned} reviews, {self.macs / self.macs_start:.1%} of the MACs, "
            f"{self.params / self.params_start:.1%} of the parameters)\n"
            + "\n".join(f"  {name}: {self.history.widths_start[name]} -> {now}" for name, now in self.widths.items())
        )

    # ---- what it does

    def step(self, *, finite: bool = True) -> Event | None:
        """Counts one optimizer step. Returns the event of the review, if one took place, else None.

        A call without an optimizer step, while gradients are added up over several batches or because a GradScaler has
        left it out, counts nothing: a review waits until the gradients are used. With finite=False it counts: the loop
        has left the step out itself.

        `finite` says whether the loss and the gradients of the step were: a review that is due waits for a step in
        which they are, on all ranks. So does one that failed or was interrupted: it is made after the next step. An
        interrupt that arrives when a review has been made is raised behind it; its event is then the last of `history`.

        Raises LoopError between forward and backward, and inside of torch.inference_mode.
        """
        check_inference("engine.step()")
        if not self._boundary.passed() and finite:
            return None
        if not self.steps:
            _alone(self.model, "engine.step()")
            self._warn_of_idleness()
        self.steps += 1
        self._progress.steps = self.steps
        if self.steps == self.total_steps + 1:
            warnings.warn(
                f"step {self.steps} of a run of total_steps={self.total_steps}: its reviews were planned for a shorter "
                "run, and none will follow; pass the number of optimizer steps of the whole run",
                stacklevel=2,
            )
        self._due |= self.steps in self._review_steps
        self._expect()
        if not self._due or self.ranks.totals(not finite)[0]:
            return None
        made = len(self.history)
        try:
            return self.review()
        finally:
            self._due = len(self.history) == made
            self._expect()

    def _warn_of_idleness(self) -> None:
        """Says it where a budget will never be met, for nobody reviews."""
        if isinstance(self.policy, Budget) and not (self.policy.schedule.count or len(self.history)):
            warnings.warn(
                f"{self.policy.aim}, and no review is planned: call engine.shrink() before the first step, or "
                "engine.review() where it suits you",
                stacklevel=3,
            )

    def _expect(self) -> None:
        """Tells the boundary whether a review follows the next optimizer step."""
        self._boundary.due = self._due or self.steps + 1 in self._review_steps

    def review(self) -> Event:
        """One review: look, judge, decide, try, commit. Gradients are dropped where shapes change.

        A review that fails leaves model, optimizers, followers and history as they were. Raises LoopError where a
        forward pass waits for its backward pass, and inside of torch.inference_mode. A backward pass through a graph
        from before the review raises LoopError.
        """
        check_inference("engine.review()")
        with self._between_graphs():
            notes = (DROPPED,) if self._boundary.waiting() else ()
            return self._reviewer.review(self.steps, self.total_steps, notes=notes)

    @contextmanager
    def _between_graphs(self) -> Iterator[None]:
        """For reviews: no graph waits for its backward pass, and those from before can have none any more."""
        self._boundary.check_graphs()
        before, made = accumulators(self.model), len(self.history)
        try:
            yield
        finally:  # an interrupt comes behind a review that was made
            if any(event.maps for event in self.history.events[made:]):
                forbid_backward(before, self.steps)

    def shrink(
        self, *, batches: Iterable[Any] | None = None, reviews: int | None = None, effort: Effort | None = None,
        report: Callable[[Event], None] = lambda event: None,
    ) -> tuple[Event, ...]:  # fmt: skip
        """Makes a trained classifier as small as the policy says before the first step, as `shrink_` does.

        What counts is that it goes on giving its own softened answers; labels are not looked at. For a run that trains
        given weights on: what is removed before they move is chosen better than what is removed on the way
        (docs/decisions/016). Schedule(count=0) leaves the run itself without reviews.

        batches: training data as training sees them, augmented; None: the probe. reviews: in how many steps; None: one
        for every tenth of the cost that goes, at least three, fewer in a run of less than forty steps for each. effort:
        what each looks at. `report` is called with each event; all are in the history, as of step 0. Returns them.

        Raises LoopError after the first step, ShrinkError for a policy without limits or schedule, ProbeError for
        batches without inputs and networks without scores of classes; what `review` raises.
        """
        check_inference("engine.shrink()")
        if self.steps:
            raise LoopError(f"engine.shrink() at step {self.steps}: it is for weights that training has not moved yet")
        with self._between_graphs():
            return shrink_with(
                self._reviewer, self.total_steps, batches=self._reviewer.probe if batches is None else batches,
                reviews=reviews, effort=effort, report=report,
            )  # fmt: skip

    # ---- what its future depends on

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future of the engine depends on: tensors, numbers, strings, lists and dicts of them.

        Steps, widths, history, what audits have taught, both generators, the ages of filters, the latency as it was
        fitted, where the probe stands. Not the content of model, optimizers and followers, which have state dicts.
        """
        return {
            "schema": SCHEMA, "steps": self.steps, "due": self._due, "calls": self._boundary.calls,
            "seen": self._boundary.seen, "macs_start": self.macs_start,
            "params_start": self.params_start, "made_with": made_with(self._reviewer, self.total_steps),
            **state_of(self._reviewer),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], *, differing: Collection[str] = ()) -> None:
        """Goes on where `state_dict` was taken: resizes model, optimizers and followers to the widths of the state.

        The engine is attached to a fresh model, as wide as at the start or of any other widths, and built with the same
        settings; what differs is refused by name unless `differing` names it, such as "total_steps" for a run that goes
        on longer. Load the model, the optimizers and the followers after the engine: their shapes are then right.

        Raises StateError for a state that is damaged, too new, of another network or of an engine built otherwise.
        Everything is then as it was.
        """
        if (schema := state.get("schema")) != SCHEMA:
            raise StateError(f"the state of the engine has format {schema}, this version reads {SCHEMA}")
        check_made(state["made_with"], made_with(self._reviewer, self.total_steps), differing)
        if state["steps"] > self.total_steps:
            raise StateError(f"the state is that of step {state['steps']}, and total_steps is {self.total_steps}")
        path = self.history.path
        restore_(self._reviewer, state)
        for wrapper in wrappers_of([self.model, *self.followers]):
            rebuild(wrapper)
        if path is not None:
            self.history.attach(path)
        self.steps = self._progress.steps = state["steps"]
        self._due, self._boundary.calls, self._boundary.seen = state["due"], state["calls"], state["seen"]
        self._expect()
        self.macs_start, self.params_start = state["macs_start"], state["params_start"]

    def abandon(self) -> None:
        """The run was broken off: that reviews never took place needs no mention, and another engine may take over."""
        self._farewell.detach()
        _engines.discard(self)


# ---- one engine for one model ----------------------------------------------------------------------------------------

DROPPED = "gradients that no optimizer had used were dropped"
"""What an event says of a review in the middle of an accumulation."""

_engines: weakref.WeakSet[AutoWidth] = weakref.WeakSet()
"""The engines that may still review."""


def _alone(model: nn.Module, what: str) -> nn.Module:
    """The model. Raises LoopError in inference mode, and where another engine under way will review its parameters."""
    check_inference(what)
    ours = {id(parameter) for parameter in model.parameters()}
    for other in list(_engines):
        ahead = [step for step in other._review_steps if step > other.steps]
        if other.steps and ahead and not ours.isdisjoint(id(parameter) for parameter in other.model.parameters()):
            raise LoopError(
                f"{type(model).__name__} has an engine already, at step {other.steps} of {other.total_steps} and with "
                f"{len(ahead)} reviews ahead, and two would resize it without each other's knowledge: call abandon() "
                "of the other one first, or go on with it"
            )
    return model


# ---- the end of a run ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Progress:
    """How far a run has come, apart from the engine, so that it is known when that is gone."""

    steps: int
    total_steps: int
    reviews: tuple[int, ...]


def _say_what_never_took_place(progress: _Progress) -> None:
    """Logs a warning where training ended before the last review."""
    missed = sum(step > progress.steps for step in progress.reviews)
    if progress.steps and missed:
        _log.warning(
            "the run ended after %d steps of total_steps=%d: %d of %d reviews never took place; pass the number of "
            "optimizer steps of the whole run",
            progress.steps, progress.total_steps, missed, len(progress.reviews),
        )  # fmt: skip
