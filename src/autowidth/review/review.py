"""One review: look, judge, decide, try, commit.

The life of a review:

    quiet:                                     # evaluation mode, eager, no autocast; modes and random state put back
        look    scoring, held_out = probe data in two parts: one to score filters, one held out for trials
        judge   precise norm statistics, on the scoring part: in training running ones lag behind the weights
                statistics = probe(scoring)    # the profits of every filter, and the reconstruction
                audit: a few filters, taken away for real on the held-out part, refit how the profits are combined
                worths = the profits, combined as the audits so far have taught
        decide  the weaker half of every group leaves together, on trial, where the policy asks
                decision = policy.decide(worths, trials, costs, loss)
        try     the whole plan, on trial; a decision that costs too much is shrunk to its weaker half
        commit  all or nothing: what co-channels take over is written into the readers; surgery on model, optimizers
                and followers; precise norm statistics of the new network; the event, appended to the history
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from autowidth.channels import ChannelMap, ResizePlan
from autowidth.cost import macs_cost, params_cost
from autowidth.history import Event, Fidelity, History
from autowidth.latency import LatencyMeter
from autowidth.layers import layers_of
from autowidth.policy import Costs, Decision, GroupReport, Policy, Situation, shrunk
from autowidth.ranks import ALONE, Ranks
from autowidth.review.batches import Batches, Loss, count, mean_loss, samples_of
from autowidth.review.calibrate import Array, Calibration, agreement, refit, sample
from autowidth.review.effort import FittedEffort
from autowidth.review.memory import Memory, give_back
from autowidth.review.profit import combined, profits
from autowidth.review.reconstruct import Reconstruction, readers_without
from autowidth.review.shares import Look, look, mean_scores
from autowidth.review.state import (
    deferred_interrupts,
    named_tensors,
    norm_shifts,
    precise_norms,
    precise_statistics,
    quiet,
)
from autowidth.review.statistics import known_of, probe
from autowidth.review.trial import NormsAfter, Subject
from autowidth.surgery import Journal, all_or_nothing, holders, operate
from autowidth.unwrapping import body_of, forget_compiled
from autowidth.wrappers import check_no_join, check_wrapper, rebuild, wrappers_of

AUDITS = 3
"""Audits that count for how far worths are trusted: a single one, of a few filters, is mostly noise."""


class Importance(Protocol):
    """A rule that ranks filters: group name -> (width,) tensor, larger = keep, NaN where it says nothing.

    Called in evaluation mode with precise norm statistics. `batches` are as the loader gives them, `loss(model, batch)`
    is a mean over samples. It changes neither the model nor its gradients.
    """

    def __call__(
        self,
        model: nn.Module,
        channel_map: ChannelMap,
        batches: Batches,
        loss: Loss,
        *,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a review found: worths, the reconstruction, how well the last audits had been predicted, losses (nats).

    loss: on the scoring part; baseline: on the held-out part, None where there is none.
    """

    worths: Mapping[str, Array]
    known: Reconstruction
    loss: float
    fidelity: Fidelity | None
    baseline: float | None
    calibration: Calibration


@dataclass(kw_only=True)
class Reviewer:
    """A network, all that is edited with it, and all that reviews have learnt.

    norms: which statistics norms have after a removal: "precise" in training, "corrected" in a trained network, which
        is then judged with those that it has.
    ranks: the processes that train this network together; wrappers around it are made fit again after surgery.
    ages: for each channel of each group the number of the review that inserted it, None for those of the start.
    """

    model: nn.Module
    channel_map: ChannelMap
    optimizers: tuple[Optimizer, ...]
    followers: tuple[nn.Module, ...]
    policy: Policy
    probe: Iterable[Any]
    loss: Loss
    effort: FittedEffort
    importance: Importance | None
    reconstruct: bool
    latency: LatencyMeter | None
    seed: int
    norms: NormsAfter = "precise"
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.history = History(self.channel_map.widths, layers=layers_of(self.channel_map))
        self.calibration = Calibration()
        self.samples = samples_of(self.probe)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.rng = np.random.default_rng(self.seed)
        self.ages: dict[str, list[int | None]] = {group.name: [None] * group.width for group in self.channel_map.groups}

    def review(self, step: int, total_steps: int, *, notes: Sequence[str] = ()) -> Event:
        """One review. A failure at any point, Ctrl-C included, leaves everything as it was and is raised again.

        Gradients are dropped where shapes change. `notes` go into the event, before those of the decision.
        """
        clock = _Clock()
        with (
            deferred_interrupts() as check,
            quiet(self.model) as trained,
            all_or_nothing(self.generator) as journal,
            self.ranks.together(f"the review at step {step}"),
        ):
            wrappers = self._prepare(journal, step, trained)
            seen = self.look()
            scoring, loss = seen.scoring, _checked(self.loss, check)
            precise = self.norms == "precise"
            subject = Subject(
                model=self.model, channel_map=self.channel_map, loss=loss, scoring=scoring,
                held_out=seen.held_out, held=seen.held, trained=trained, known={}, ranks=self.ranks,
                shifts=() if precise else norm_shifts(self.model, scoring, loss, among=trained, ranks=self.ranks),
            )  # fmt: skip
            with precise_norms(self.model, scoring, loss, among=trained if precise else (), ranks=self.ranks):
                judgement = self._judge(subject, clock)
            subject = replace(subject, known=judgement.known)
            situation = self._situation(step, total_steps, judgement, subject, seen)
            clock.lap("audit")
            decision = self.policy.decide(situation)
            decision = replace(decision, notes=(*notes, *decision.notes))
            clock.lap("decide")
            decision, tried = self._try(decision, situation, judgement, subject)
            self.ranks.check_same({"a plan": repr(sorted(decision.plan.items()))}, "give all the same policy")
            clock.lap("audit")
            event = self._commit(journal, decision, situation, judgement, subject, tried, clock)
            for wrapper in wrappers if decision.plan else ():
                rebuild(wrapper)
        if decision.plan:
            _forget_shapes()
        if decision.missed is not None and self.ranks.rank == 0:
            warnings.warn(decision.missed, stacklevel=4)
        return event

    def costs(self) -> Costs:
        """What the model costs as a function of its widths; milliseconds are timed now."""
        names = (name for name, _ in self.model.named_parameters())
        return Costs(
            macs=macs_cost(self.channel_map),
            params=params_cost(self.channel_map, names),
            ms=None if self.latency is None else self.latency.cost(self.channel_map),
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one sample, now."""
        return round(macs_cost(self.channel_map).at(self.channel_map.widths))

    @property
    def params(self) -> int:
        """The number of parameters now."""
        return sum(p.numel() for p in self.model.parameters())

    def look(self) -> Look:
        """Probe data for a review: one part to score filters, the next, held out, for trials."""
        return look(self.probe, self.effort, self.ranks)

    def _prepare(self, journal: Journal, step: int, trained: frozenset[nn.Module]) -> Sequence[DistributedDataParallel]:
        """The wrappers around the model, once all ranks are found at the same place with the same network.

        Where the review fails, they are made fit again behind everything else, and what is drawn is drawn again.
        """
        wrappers = wrappers_of([self.model, *self.followers])
        for wrapper in wrappers:
            journal.call(lambda: None, partial(rebuild, wrapper))
        state = self.rng.bit_generator.state
        journal.call(lambda: None, lambda: setattr(self.rng.bit_generator, "state", state))
        for wrapper in wrappers:
            check_wrapper(wrapper)
        check_no_join(wrappers)
        training = sorted(name for name, module in self.model.named_modules() if module in trained)
        facts = {"step": str(step), "widths": str(self.channel_map.widths), "modules in training mode": str(training)}
        self.ranks.check_same(facts, "call the engine at the same place of the program on every rank")
        self.ranks.check_close(self.model)
        return wrappers

    # ---- judge

    def _judge(self, subject: Subject, clock: _Clock) -> Judgement:
        """What every filter is worth: by our profits, which learn from an audit, or by the importance that is given."""
        if self.importance is not None:
            return self._judge_by(self.importance, subject, clock)
        found = probe(
            self.model, self.channel_map, subject.scoring, subject.loss, reconstruct=self.reconstruct, ranks=self.ranks
        )
        features = profits(found.sums, self.channel_map)
        clock.lap("probe")
        fidelity, calibration, baseline = self._audit(features, replace(subject, known=found.known))
        clock.lap("audit")
        return Judgement(
            worths=_worths(features, calibration), known=found.known, loss=found.loss, fidelity=fidelity,
            baseline=baseline, calibration=calibration,
        )  # fmt: skip

    def _judge_by(self, importance: Importance, subject: Subject, clock: _Clock) -> Judgement:
        """What every filter is worth by an importance that is not ours; infinite where it says nothing. No audit."""
        known: Reconstruction = {}
        scoring, loss = subject.scoring, subject.loss
        if self.reconstruct:
            known = known_of(self.model, self.channel_map, scoring, loss, self.ranks)
        scores = importance(self.model, self.channel_map, scoring, loss, generator=self.generator)
        scores = mean_scores(scores, count(scoring), self.ranks)
        worths = {name: np.nan_to_num(w.detach().cpu().double().numpy(), nan=np.inf) for name, w in scores.items()}
        level = mean_loss(self.model, scoring, loss, self.ranks)
        clock.lap("probe")
        baseline = subject.loss_without({}) if subject.measures else None
        clock.lap("audit")
        return Judgement(
            worths=worths, known=known, loss=level, fidelity=None, baseline=baseline, calibration=self.calibration
        )

    def _audit(
        self, features: Mapping[str, Tensor], subject: Subject
    ) -> tuple[Fidelity | None, Calibration, float | None]:
        """Ablates a few filters. Returns how well the worths had predicted that, what is learnt, the loss without."""
        if not subject.measures:
            return None, self.calibration, None
        worths = _worths(features, self.calibration)
        picks = sample(worths, self.effort.audit_filters, self.rng)
        baseline, *losses = subject.losses_without([{}, *({name: [channel]} for name, channel in picks)])
        if not picks:
            return None, self.calibration, baseline
        changes = np.array(losses) - baseline
        rows = np.array([features[name][channel].tolist() for name, channel in picks])
        spearman, slope = agreement(rows @ self.calibration.vector(), changes)
        fidelity = Fidelity(spearman=spearman, slope=slope, count=len(picks))
        return fidelity, refit(self.calibration, rows, changes), baseline

    # ---- decide

    def _situation(self, step: int, total_steps: int, judgement: Judgement, subject: Subject, seen: Look) -> Situation:
        """What the policy decides on."""
        start = self.history.widths_start
        reports = tuple(
            GroupReport(name=name, width_start=start[name], worth=tuple(worth.tolist()), grace=self._in_grace(name))
            for name, worth in judgement.worths.items()
        )
        tried = self.policy.limits.trial_share and subject.measures
        return Situation(
            step=step,
            total_steps=total_steps,
            groups=self._with_trials(reports, subject) if tried else reports,
            costs=self.costs(),
            loss=_mean_of_both(judgement, seen),
            agreement=self._agreement(judgement.fidelity),
            samples=self.samples,
        )

    def _with_trials(self, reports: tuple[GroupReport, ...], subject: Subject) -> tuple[GroupReport, ...]:
        """The reports with what the weakest filters of every group cost together, measured on the held-out part."""
        weakest = {
            report.name: report.judged[: round(self.policy.limits.trial_share * len(report.judged))]
            for report in reports
            if np.isfinite([report.worth[c] for c in report.judged]).all()
        }
        trials: list[dict[str, tuple[int, ...]]] = [{name: channels} for name, channels in weakest.items() if channels]
        before, *after = subject.losses_without([{}, *trials], norms="batch")
        rises = {name: loss - before for trial, loss in zip(trials, after, strict=True) for name in trial}
        return tuple(
            replace(report, together=(len(weakest[report.name]), rises[report.name]))
            if report.name in rises
            else report
            for report in reports
        )

    def _agreement(self, latest: Fidelity | None) -> float | None:
        """How well the worths ranked the filters of the last audits, mean of Spearman's rank correlations."""
        audited = [*[event.fidelity for event in self.history][1 - AUDITS :], latest]
        known = [found.spearman for found in audited if found and found.spearman is not None]
        return sum(known) / len(known) if known else None

    def _in_grace(self, group: str) -> tuple[bool, ...]:
        """For each channel of a group whether it is too young to be judged."""
        now, grace = len(self.history), self.policy.limits.grace
        return tuple(born is not None and now - born < grace for born in self.ages[group])

    # ---- try

    def _try(
        self, decision: Decision, situation: Situation, judgement: Judgement, subject: Subject
    ) -> tuple[Decision, _Tried]:
        """The decision and what its trial found; a shrunk one where that exceeds what the policy allows."""
        tried = self._tried(decision.plan, judgement, subject)
        if not decision.plan or tried.change is None or tried.change <= decision.max_rise:
            return decision, tried
        lesser = shrunk(decision, situation.groups)
        cost = f"{tried.change:.3g} nats, more than the {decision.max_rise:.3g} allowed"
        note = f"the plan would have cost {cost}: half of it was made"
        return replace(lesser, notes=(*lesser.notes, note)), self._tried(lesser.plan, judgement, subject)

    def _tried(self, plan: ResizePlan, judgement: Judgement, subject: Subject) -> _Tried:
        """What the removals of a plan do to the loss on the held-out part, tried without surgery."""
        removed = _removed(plan)
        if judgement.baseline is None or not removed:
            return _Tried(change=None if judgement.baseline is None else 0.0)
        if self.norms == "corrected":
            loss, corrected = subject.corrected_loss_without(removed)
            return _Tried(change=loss - judgement.baseline, corrected=corrected)
        return _Tried(change=subject.loss_without(removed, norms=self.norms) - judgement.baseline)

    # ---- commit

    def _commit(
        self, journal: Journal, decision: Decision, situation: Situation, judgement: Judgement, subject: Subject,
        tried: _Tried, clock: _Clock,
    ) -> Event:  # fmt: skip
        """Makes the decision and records it; both, or neither."""
        before = (self.macs, self.params)
        memory = Memory.of(self.model, self.optimizers, self.followers)
        self._assign(journal, "calibration", judgement.calibration)
        if decision.plan:
            self._resize(journal, decision.plan, subject, tried.corrected)
            if self.norms == "precise":  # the statistics of the old network say nothing about the new one
                found = precise_statistics(
                    self.model, subject.scoring, subject.loss, among=subject.trained, ranks=self.ranks
                )
                for buffer, content in found:
                    journal.write_(buffer, content)
        clock.lap("surgery")
        missed = () if decision.missed is None else (decision.missed,)
        worths = {name: worth for name, worth in judgement.worths.items() if np.isfinite(worth).all()}
        event = Event(
            step=situation.step, total_steps=situation.total_steps, loss=judgement.loss, predicted=decision.predicted,
            measured=tried.change, price=decision.price, target=decision.target, unit=decision.unit,
            macs_before=before[0], macs=self.macs, params_before=before[1], params=self.params,
            widths=self.channel_map.widths, maps=dict(decision.plan),
            worths={name: _span(worth) for name, worth in worths.items()},
            filter_worths={name: tuple(worth.tolist()) for name, worth in worths.items()}, prices=dict(decision.prices),
            interactions={report.name: c for report in situation.groups if (c := report.interaction)},
            fidelity=judgement.fidelity, coefficients=judgement.calibration.coefficients, seconds=clock.seconds,
            memory=memory.now(),
            notes=(*decision.notes, *missed),
        )  # fmt: skip
        journal.call(lambda: self.history.append(event), lambda: self.history.retract(event))
        return event

    def _resize(self, journal: Journal, plan: ResizePlan, subject: Subject, corrected: _Contents | None) -> None:
        """Surgery on everything that holds the model's shapes; co-channels first take over what is removed."""
        removed, known = _removed(plan), subject.known
        if corrected is None:
            corrected = subject.corrected_without(removed)
        for module in (self.model, *map(body_of, self.followers)):
            tensors = named_tensors(module)
            refitted = readers_without(removed, self.channel_map, known, tensors)
            for name, content in refitted.items():
                journal.write_(tensors[name], content)
        for buffer, content in corrected:
            journal.write_(buffer, content)
        touched = {axis.name for name in plan for axis in self.channel_map.group(name).axes}
        resized = operate(
            journal, self.model, self.channel_map, plan, optimizers=holders(self.optimizers, self.model, touched),
            followers=self.followers, generator=self.generator,
        )  # fmt: skip
        self._take_over(journal, touched.union(refitted))
        now = len(self.history)
        ages = {
            name: [now if s < 0 else self.ages[name][s] for s in index_map.source] for name, index_map in plan.items()
        }
        self._assign(journal, "channel_map", resized)
        self._assign(journal, "ages", self.ages | ages)

    def _take_over(self, journal: Journal, names: Iterable[str]) -> None:
        """Fresh and refitted weights are those of the first rank, on all of them."""
        if self.ranks.count == 1:
            return
        for module in (self.model, *map(body_of, self.followers)):
            found = named_tensors(module)
            mine = [found[name] for name in sorted(names) if name in found]
            for tensor, content in zip(mine, self.ranks.of_first(mine), strict=True):
                if not torch.equal(tensor, content):
                    journal.write_(tensor, content)

    def _assign(self, journal: Journal, name: str, value: object) -> None:
        """Sets one of our attributes, to be taken back where the review fails."""
        before = getattr(self, name)
        journal.call(lambda: setattr(self, name, value), lambda: setattr(self, name, before))


_Contents = list[tuple[Tensor, Tensor]]
"""Buffers, and what they are to hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """What the trial of a plan found.

    change: what it does to the loss, nats per sample, None where nothing was held out; corrected: what norms are to
    hold afterwards, None where the trial did not work that out.
    """

    change: float | None
    corrected: _Contents | None = None


class _Clock:
    """Wall time per part; parts of the same name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _forget_shapes() -> None:
    """Compiled code and freed memory have the old shapes."""
    forget_compiled()
    give_back()


def _checked(loss: Loss, check: Callable[[], None]) -> Loss:
    """The loss, which gives way to an interrupt before it is asked, and sees the weights as they are.

    A loss, or a model, that opens an autocast block of its own would find the casts of the last question: what it
    casts is kept until the outermost block ends, and that is the review's.
    """

    def checked(model: nn.Module, batch: Any) -> Tensor:
        check()
        torch.clear_autocast_cache()
        return loss(model, batch)

    return checked


def _worths(features: Mapping[str, Tensor], calibration: Calibration) -> dict[str, Array]:
    """The worth (width,) of every filter, nats per sample, by channel group."""
    coefficients = torch.tensor(calibration.coefficients, dtype=torch.float32)
    return {name: combined(f.cpu(), coefficients).double().numpy() for name, f in features.items()}


def _mean_of_both(judgement: Judgement, seen: Look) -> float:
    """The loss on the scoring and the held-out part together, nats per sample."""
    return (judgement.loss * seen.scored + (judgement.baseline or 0.0) * seen.held) / (seen.scored + seen.held)


def _removed(plan: ResizePlan) -> dict[str, Sequence[int]]:
    """The channels that a plan removes, by channel group."""
    return {name: index_map.removed for name, index_map in plan.items() if index_map.removed}


def _span(worth: Array) -> tuple[float, float, float]:
    """The weakest, the median and the strongest worth."""
    return float(worth.min()), float(np.median(worth)), float(worth.max())
