"""Attached to a model and its optimizer: review = probe, audit, decide, resize, record.

The life of a review:

    quiet:                                   # evaluation mode; modes, norms and random state put back afterwards
        batches   = probe data, in two parts: one to score filters, one held out for the audit
        settle the running statistics of norms on the scoring part: in training they lag behind the weights
        sums      = probe(model, scoring part)
        parts     = profit.parts(sums)       # next-layer and own-layer profit of every filter, nats per sample
        ablations = a few filters, taken away for real on the held-out part, their peers standing in for them
        worths    = parts, combined as the audits so far have taught
        slices    = the weaker half of every group taken away together, on the held-out part, where the policy asks
        decision  = policy.decide(worths, slices, costs)
        measure on the held-out part what the whole plan costs, and shrink it where it costs too much
        fold what the peers take over into the readers' weights
        surgery on model, optimizers and followers
        event     = everything above, appended to the history
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

import autowidth.audit as audits
from autowidth.channels import ChannelMap, ParamAxis, ResizePlan
from autowidth.cost import Cost, macs_cost, params_cost
from autowidth.history import Event, Fidelity, History
from autowidth.latency import Latency, fit_latency, timed
from autowidth.policy import Books, Budget, Costs, Decision, Policy, Situation, shrunk
from autowidth.probe import Loss, effective_weights, moments, probe
from autowidth.profit import Peers, combined, folded, parts, peers
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace


class NothingToResizeError(ValueError):
    """A model without a single channel group that can be resized."""


class ForeignOptimizerError(ValueError):
    """An optimizer that does not hold the model's parameters."""


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
    channel map. Raises UnknownGroupError or ValueError where the plan does not fit; warns where it has no effect.
    """
    channel_map = trace(model, example_inputs)
    return apply_(model, channel_map, plan, optimizers=_several(optimizer), followers=followers, generator=generator)


class Criterion(Protocol):
    """A rule that ranks filters: group name -> (width,) tensor, larger = keep, NaN where it says nothing.

    Called in evaluation mode with settled norms. `batches` are pairs of inputs and target, `loss_fn` is a mean over
    samples. It changes neither the model nor its gradients.
    """

    def __call__(
        self,
        model: nn.Module,
        channel_map: ChannelMap,
        batches: Sequence[tuple[Any, Any]],
        loss_fn: Loss,
        *,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much a review may look at: samples for the probe, samples and filters for the audit."""

    probe_samples: int = 512
    audit_samples: int = 256
    audit_filters: int = 12

    def __post_init__(self) -> None:
        if self.probe_samples < 1 or self.audit_samples < 0 or self.audit_filters < 0:
            raise ValueError(f"{self}: need probe_samples >= 1, audit_samples >= 0 and audit_filters >= 0")

    @classmethod
    def fitting(cls, training_samples: int, reviews: int, *, groups: int, share: float = 0.04) -> Effort:
        """The effort at which reviews take about `share` of the computation of the run.

        `training_samples` is steps x batch size of the whole run. Counted in forward passes of one sample: training
        takes 3; a probe sample 6 (norms settled, two passes, their sums), an audit sample one for each audited filter
        and each of the `groups` whose weakest filters leave together, and five more (the plan tried, the losses before,
        what folding costs). Surgery comes on top; it takes as long as a few steps.
        """
        full = cls()
        each = share * 3 * training_samples / max(reviews, 1)
        filters = 4  # samples are worth more than audits (docs/decisions/007)
        return cls(
            probe_samples=min(2 * full.probe_samples, max(64, round(0.3 * each / 6))),
            audit_samples=min(2 * full.audit_samples, max(64, round(0.7 * each / (filters + groups + 5)))),
            audit_filters=filters,
        )


AUDITS = 3
"""Audits that count for how far a criterion is trusted: a single one, of a few filters, is mostly noise."""


class AutoWidth:
    """The engine: call `step()` after every optimizer step; now and then it reviews the widths.

    probe: a loader or list of (inputs, target) that can be iterated again and again; it should hold training data
        that the policy may look at, best without augmentation. Never pass test data.
    loss_fn: called as loss_fn(model(inputs), target), a mean over samples. Worth is in its unit (nats for
        cross-entropy).
    policy: when to review and what to do (Budget, Price, Auto, Never).
    total_steps: optimizer steps of the whole run; the policy's schedule is a share of it.
    followers: EMA copies of the model that are resized with it.
    criterion: what takes the place of our worth; it is used as it is, without audit. A filter about which it says
        nothing (NaN) stays.
    compensate: whether peers take over what is removed.
    latency_inputs: what is timed where the policy bounds latency, often a batch of one; None for the example inputs.

    Raises NothingToResizeError with the reasons, ForeignOptimizerError, BudgetError, TraceError, ProbeError.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        example_inputs: Inputs,
        probe: Iterable[tuple[Any, Any]],
        loss_fn: Loss,
        policy: Policy,
        total_steps: int,
        followers: Sequence[nn.Module] = (),
        effort: Effort | None = None,
        criterion: Criterion | None = None,
        compensate: bool = True,
        latency_inputs: Inputs | None = None,
        seed: int = 0,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: pass the number of optimizer steps of the run, at least 1")
        self.model = model
        self._latency_inputs = example_inputs if latency_inputs is None else latency_inputs
        self.optimizers = _several(optimizer)
        self.followers = tuple(followers)
        self.policy = policy
        self.total_steps = total_steps
        self.effort = effort or Effort()
        self.criterion = criterion
        self.compensate = compensate
        self.channel_map = trace(model, example_inputs)
        self.latency = self._fit_latency()
        self.calibration = audits.Calibration()
        self.steps = 0
        self._probe = probe
        self._loss_fn = loss_fn
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        self._review_steps = frozenset(policy.reviews(total_steps))
        self._age: dict[str, list[int | None]] = {group.name: [None] * group.width for group in self.channel_map.groups}
        with quiet(model):  # a shuffled loader draws from the global random state
            self._check()
        self.history = History(self.channel_map.widths)
        self.macs_start, self.params_start = self.macs, self.params

    def _check(self) -> None:
        """Everything that can be known to be wrong before training starts."""
        if not self.channel_map.groups:
            reasons = sorted({f.reason for f in self.channel_map.frozen}) or ["no layer passes channels to another one"]
            raise NothingToResizeError(
                f"{type(self.model).__name__} has no channel group that can be resized: {'; '.join(reasons[:5])}; "
                "a group needs a layer that writes its channels and another one that reads them"
            )
        held = {i for optimizer in self.optimizers for i in _held(optimizer)}
        names = {place.axis.name for group in self.channel_map.groups for place in group.places}
        ours = {id(p): name for name, p in self.model.named_parameters()}
        foreign = any(_held(o).isdisjoint(ours) for o in self.optimizers)
        if foreign or not any(ours[i] in names for i in held & ours.keys()):
            raise ForeignOptimizerError(
                f"{' and '.join(type(o).__name__ for o in self.optimizers) or 'no optimizer'} holds none of the "
                "parameters that would be resized: build the optimizer from this model's parameters()"
            )
        self.policy.check(self._costs(), self.channel_map.widths)
        if self._review_steps:
            probe(self.model, self.channel_map, itertools.islice(self._probe, 1), self._loss_fn)

    @property
    def widths(self) -> dict[str, int]:
        """The present widths by channel group."""
        return self.channel_map.widths

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one sample, now."""
        return round(macs_cost(self.channel_map).at(self.widths))

    @property
    def params(self) -> int:
        """The number of parameters now."""
        return sum(p.numel() for p in self.model.parameters())

    def _costs(self) -> Costs:
        """What the model costs as a function of its widths."""
        names = (name for name, _ in self.model.named_parameters())
        return Costs(
            macs=macs_cost(self.channel_map),
            params=params_cost(self.channel_map, names),
            latency=self._latency_cost(),
        )

    def _fit_latency(self) -> Latency | None:
        """The latency of the model as it is, where the policy bounds it."""
        if not (isinstance(self.policy, Budget) and self.policy.timed and self.channel_map.groups):
            return None
        with quiet(self.model):
            return fit_latency(self.model, self.channel_map, self._latency_inputs, multiple=self.policy.multiple)

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds of one forward pass of the present model, timed now; None where the policy does not bound it."""
        return None if self.latency is None else 1000 * timed([self.model], self._latency_inputs)[0]

    def _latency_cost(self) -> Cost | None:
        """Milliseconds as a function of the widths, right at the present ones, which are timed once more."""
        now = self.latency_ms
        return None if self.latency is None or now is None else self.latency.cost_through(self.channel_map, now)

    @property
    def review_seconds(self) -> float:
        """Wall time spent in reviews so far."""
        return sum(event.seconds_total for event in self.history)

    def step(self) -> Event | None:
        """Counts one optimizer step. Returns the event of the review, if one took place, else None."""
        self.steps += 1
        return self.review() if self.steps in self._review_steps else None

    def review(self) -> Event:
        """One look at the books: probe, audit, decide, resize, record. Gradients are dropped where shapes change."""
        clock = _Clock()
        with quiet(self.model) as trained:
            view = _View(*self._batches(), trained)
            with settled_norms(self.model, view.scoring, among=trained):
                found = self._judge(view, clock)
            situation = self._situation(found, view)
            clock.lap("audit")
            decision = self.policy.decide(situation)
            clock.lap("decide")
            decision, measured = self._affordable(decision, found, view)
            clock.lap("audit")
            before = (self.macs, self.params)
            self._operate(decision.plan, found.known)
            if decision.plan:
                with settled_norms(self.model, view.scoring, among=trained, keep=True):
                    pass  # the statistics of the old network say nothing about the new one
            clock.lap("surgery")
        event = Event(
            step=self.steps,
            total_steps=self.total_steps,
            loss=found.loss,
            announced=decision.announced,
            measured=measured,
            price=decision.price,
            target_macs=decision.target_macs,
            macs_before=before[0],
            macs=self.macs,
            params_before=before[1],
            params=self.params,
            widths=self.widths,
            maps=dict(decision.plan),
            worths={name: _span(worth) for name, worth in found.worths.items() if np.isfinite(worth).all()},
            fidelity=found.fidelity,
            coefficients=self.calibration.coefficients,
            seconds=clock.seconds,
            notes=decision.notes,
        )
        self.history.append(event)
        return event

    def _batches(self) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Probe data for this review: one part to score filters, the next, held out, to audit the scores."""
        stream = iter(self._probe)
        scoring = _take(stream, self.effort.probe_samples)
        return scoring, _take(stream, self.effort.audit_samples)

    def _judge(self, view: _View, clock: _Clock) -> _Judgement:
        """What every filter is worth by our criterion, which learns from an audit."""
        if self.criterion is not None:
            return self._judge_by(self.criterion, view, clock)
        nobody: Mapping[ParamAxis, Peers] | None = None if self.compensate else {}
        sums = probe(self.model, self.channel_map, view.scoring, self._loss_fn, known=nobody)
        known = peers(sums, self.channel_map, effective_weights(self.model)) if self.compensate else {}
        features = parts(sums, self.channel_map)
        clock.lap("probe")
        fidelity, baseline = self._audit(features, view.held_out, partial(self._fold, known))
        worths = self._worths(features)
        clock.lap("audit")
        loss = sums.loss / sums.samples
        return _Judgement(worths=worths, known=known, loss=loss, fidelity=fidelity, baseline=baseline)

    def _judge_by(self, criterion: Criterion, view: _View, clock: _Clock) -> _Judgement:
        """What every filter is worth by a criterion that is not ours; infinite where it says nothing. No audit."""
        known: Mapping[ParamAxis, Peers] = {}
        if self.compensate:
            sums = moments(self.model, self.channel_map, view.scoring)
            known = peers(sums, self.channel_map, effective_weights(self.model))
        said = criterion(self.model, self.channel_map, view.scoring, self._loss_fn, generator=self._generator)
        worths = {name: np.nan_to_num(w.detach().cpu().double().numpy(), nan=np.inf) for name, w in said.items()}
        loss = audits.mean_loss(self.model, view.scoring, self._loss_fn)
        clock.lap("probe")
        baseline = audits.mean_loss(self.model, view.held_out, self._loss_fn) if view.held_out else None
        clock.lap("audit")
        return _Judgement(worths=worths, known=known, loss=loss, fidelity=None, baseline=baseline)

    def _fold(self, known: Mapping[ParamAxis, Peers], removed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The readers' tensors once the removed channels are gone and the known peers stand in for them."""
        return folded(removed, self.channel_map, known, audits.named_tensors(self.model))

    def _change_by(self, plan: ResizePlan, found: _Judgement, view: _View) -> float | None:
        """What the removals of a plan do to the loss on the audit samples, nats per sample, tried without surgery."""
        removed = _removed(plan)
        if found.baseline is None or not removed:
            return None if found.baseline is None else 0.0
        with self._tried(removed, found, view):
            return audits.mean_loss(self.model, view.held_out, self._loss_fn) - found.baseline

    @contextmanager
    def _tried(self, removed: Mapping[str, Sequence[int]], found: _Judgement, view: _View) -> Iterator[None]:
        """While it lasts, the network is as it would be without the removed channels, its norms settled."""
        with (
            audits.standing_in(self.model, self._fold(found.known, removed)),
            settled_norms(self.model, view.scoring, among=view.trained),
        ):
            yield

    def _affordable(self, decision: Decision, found: _Judgement, view: _View) -> tuple[Decision, float | None]:
        """The decision and its measured loss change; with a shrunk plan where that exceeds what the policy bears."""
        measured = self._change_by(decision.plan, found, view)
        if not decision.plan or measured is None or measured <= decision.bearable:
            return decision, measured
        lesser = shrunk(decision, {name: tuple(worth.tolist()) for name, worth in found.worths.items()})
        cost = f"{measured:.3g} nats, more than the bearable {decision.bearable:.3g}"
        note = f"the plan would have cost {cost}: half of it was made"
        return replace(lesser, notes=(*lesser.notes, note)), self._change_by(lesser.plan, found, view)

    def _audit(
        self, features: Mapping[str, Tensor], held_out: list[tuple[Any, Any]], fold: audits.Fold
    ) -> tuple[Fidelity | None, float | None]:
        """Ablates a few filters, learns from them. Returns how well the criterion had predicted, and the loss."""
        if not held_out:
            return None, None
        baseline = audits.mean_loss(self.model, held_out, self._loss_fn)
        picks = audits.sample(self._worths(features), self.effort.audit_filters, self._rng)
        if not picks:
            return None, baseline
        ablations = audits.ablate(
            self.model, self.channel_map, picks, held_out, self._loss_fn, before=baseline, folded=fold
        )
        rows = np.array([features[a.group][a.channel].tolist() for a in ablations])
        changes = np.array([a.change for a in ablations])
        spearman, slope = audits.agreement(rows @ self.calibration.vector(), changes)
        self.calibration = audits.refit(self.calibration, rows, changes)
        return Fidelity(spearman=spearman, slope=slope, count=len(ablations)), baseline

    def _worths(self, features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The worth (width,) of every filter, nats per sample, by channel group."""
        coefficients = torch.tensor(self.calibration.coefficients, dtype=torch.float32)
        return {name: combined(f.cpu(), coefficients).double().numpy() for name, f in features.items()}

    def _situation(self, found: _Judgement, view: _View) -> Situation:
        """What the policy decides on."""
        start = self.history.widths_start
        books = tuple(
            Books(name=name, width_start=start[name], worth=tuple(worth.tolist()), grace=self._in_grace(name))
            for name, worth in found.worths.items()
        )
        return Situation(
            step=self.steps,
            total_steps=self.total_steps,
            books=self._with_slices(books, found, view) if self.policy.joint and view.held_out else books,
            costs=self._costs(),
            loss=found.loss_on_all(view),
            fidelity=self._fidelity(found.fidelity),
        )

    def _fidelity(self, latest: Fidelity | None) -> float | None:
        """How well the criterion ranked the filters of the last audits, mean of Spearman's rank correlations."""
        audited = [*[event.fidelity for event in self.history][1 - AUDITS :], latest]
        known = [found.spearman for found in audited if found and found.spearman is not None]
        return sum(known) / len(known) if known else None

    def _with_slices(self, books: tuple[Books, ...], found: _Judgement, view: _View) -> tuple[Books, ...]:
        """The books with what the weakest filters of every group cost together, measured on the audit samples."""
        with batch_norms(self.model, among=view.trained):
            before = audits.mean_loss(self.model, view.held_out, self._loss_fn)
            told = []
            for book in books:
                count = round(self.policy.joint * len(book.judged))
                if count < 1 or not np.isfinite([book.worth[c] for c in book.judged]).all():
                    told.append(book)
                    continue
                tensors = self._fold(found.known, {book.name: book.judged[:count]})
                with audits.standing_in(self.model, tensors):
                    rise = audits.mean_loss(self.model, view.held_out, self._loss_fn) - before
                told.append(replace(book, together=(count, rise)))
        return tuple(told)

    def _in_grace(self, group: str) -> tuple[bool, ...]:
        """For each channel of a group whether it is too young to be judged."""
        now = len(self.history)
        return tuple(born is not None and now - born < self.policy.grace for born in self._age[group])

    def _operate(self, plan: ResizePlan, known: Mapping[ParamAxis, Peers]) -> None:
        """Surgery on everything that holds the model's shapes; peers first take over what is removed."""
        if not plan:
            return
        touched = {axis.name for axis in self.channel_map.gathers(plan)}
        moved = {id(p) for name, p in self.model.named_parameters() if name in touched}
        removed = _removed(plan)
        with ExitStack() as stack:
            for module in (self.model, *(f.module if isinstance(f, AveragedModel) else f for f in self.followers)):
                tensors = folded(removed, self.channel_map, known, audits.named_tensors(module))
                stack.enter_context(audits.standing_in(module, tensors, stay=True))
            self.channel_map = apply_(
                self.model,
                self.channel_map,
                plan,
                optimizers=[o for o in self.optimizers if _held(o) & moved],
                followers=self.followers,
                generator=self._generator,
            )
        now = len(self.history)
        for name, index_map in plan.items():
            self._age[name] = [now if s < 0 else self._age[name][s] for s in index_map.source]
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code holds the old shapes, and gives up silently after eight recompiles


@dataclass(frozen=True, slots=True)
class _View:
    """What a review looks at: images that score filters, images held out from that, the modules in training."""

    scoring: list[tuple[Any, Any]]
    held_out: list[tuple[Any, Any]]
    trained: set[nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judgement:
    """What a review found: worths, the peers that may take over, the losses on both parts of the images (nats)."""

    worths: dict[str, np.ndarray]
    known: Mapping[ParamAxis, Peers]
    loss: float
    fidelity: Fidelity | None
    baseline: float | None

    def loss_on_all(self, view: _View) -> float:
        """The loss on both parts of the images together."""
        scored, held_out = (sum(len(x) for x, _ in part) for part in (view.scoring, view.held_out))
        return (self.loss * scored + (self.baseline or 0.0) * held_out) / (scored + held_out)


@contextmanager
def quiet(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Evaluation mode, and afterwards every module's mode and the global random state as they were.

    Yields the modules that were in training mode.
    """
    modes = {module: module.training for module in model.modules()}
    states = (random.getstate(), np.random.get_state())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield {module for module, training in modes.items() if training}
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes.items():
            module.training = training


@contextmanager
def settled_norms(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], *, among: Collection[nn.Module], keep: bool = False
) -> Iterator[None]:
    """While it lasts, running statistics of norms are plain averages over the batches; afterwards as they were.

    `among` are the modules that are being trained: a norm that the user keeps in evaluation mode is left alone.
    With `keep` the settled statistics stay, if nothing is raised.

    At a high learning rate running statistics lag behind the weights: the network in evaluation mode is then not the
    one that is being trained, and what it says of its filters is wrong (docs/decisions/003). Batches of one sample
    are left out: a norm may have no second value to compare it with.
    """
    usable = [inputs for inputs, _ in batches if len(inputs) > 1]
    norms = _running_norms(model, among) if usable else []
    with _as_found(norms):
        modes = [norm.training for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        with torch.no_grad():
            for inputs in usable if norms else ():
                model(inputs)
        for norm, training in zip(norms, modes, strict=True):
            norm.training = training
        yield
        kept = norms if keep else []
        settled = [(b, b.clone()) for norm in kept for b in norm.buffers() if b is not norm.num_batches_tracked]
    for buffer, content in settled:
        buffer.copy_(content)


@contextmanager
def batch_norms(model: nn.Module, *, among: Collection[nn.Module]) -> Iterator[None]:
    """While it lasts, norms take the statistics of the batch at hand; their own stay as they are.

    `among` are the modules that are being trained. It is what `settled_norms` does at half the price, for batches that
    are large enough to speak for all.
    """
    norms = _running_norms(model, among)
    with _as_found(norms):
        for norm in norms:
            norm.momentum, norm.training = 0.0, True
        yield


def _running_norms(model: nn.Module, among: Collection[nn.Module]) -> list[_NormBase]:
    """The norms among these modules that keep running statistics."""
    return [m for m in model.modules() if m in among and isinstance(m, _NormBase) and m.track_running_stats]


@contextmanager
def _as_found(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Afterwards momentum, mode and statistics of the norms are as they were."""
    saved = [(m.momentum, m.training, [(b, b.clone()) for b in m.buffers()]) for m in norms]
    try:
        yield
    finally:
        for norm, (momentum, training, buffers) in zip(norms, saved, strict=True):
            norm.momentum, norm.training = momentum, training
            for buffer, content in buffers:
                buffer.copy_(content)


class _Clock:
    """Wall time per part; parts of the same name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _removed(plan: ResizePlan) -> dict[str, tuple[int, ...]]:
    """The channels that a plan removes, by channel group."""
    return {name: index_map.removed for name, index_map in plan.items() if index_map.removed}


def _several(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)


def _held(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer updates."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _take(stream: Iterator[tuple[Any, Any]], samples: int) -> list[tuple[Any, Any]]:
    """The next batches, until they hold this many samples or the data ends; the last one cut where it can be."""
    taken: list[tuple[Any, Any]] = []
    missing = samples
    while missing > 0 and (batch := next(stream, None)) is not None:
        inputs, target = batch
        if isinstance(inputs, Tensor) and isinstance(target, Tensor) and len(inputs) == len(target):
            inputs, target = inputs[:missing], target[:missing]
        taken.append((inputs, target))
        missing -= len(inputs)
    return taken


def _span(worth: np.ndarray) -> tuple[float, float, float]:
    return float(worth.min()), float(np.median(worth)), float(worth.max())
