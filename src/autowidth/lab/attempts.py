"""As small as costs nothing: a network is trained whole, then narrowed and trained on, and goes back where that costs.

The order of events (docs/decisions/014):

    train the whole network, as if nobody wanted it smaller: the reference      # or take the weights that were brought
    while there is time for an attempt:
        a share of the MACs that may do            # guessed from the loss at first, then from what became of the last
        remove filters of a copy in steps, down to that share, by what it answers: before its first step
        train it on for a part of the epochs, from a part of the peak rate down, taught by the reference as well
        judge: no worse than the reference by more than is tolerated?           # never on test images
            yes: the next attempt starts from here;  no: it starts from where this one did
    what was kept last is the result, beside the accuracy of the reference

Every part is a run of its own below the folder of the whole one, so that what is killed goes on.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from autowidth.checkpoint import RUN, load_, read_run
from autowidth.cost import macs_cost
from autowidth.engine import AutoWidth
from autowidth.history import History
from autowidth.lab.data import ImageSet
from autowidth.lab.fine_tuning import AT_ONCE
from autowidth.lab.guessing import GLANCE, LARGEST, SMALLEST, first_share, healed_share, may_be_won_back
from autowidth.lab.judging import Judge, Seen, difference, parted, seen
from autowidth.lab.keeping import TRAINING, anywhere
from autowidth.lab.lock import locked
from autowidth.lab.loop import Method, train
from autowidth.lab.loop_parts import cpu_threads, evaluated_at_once, threads_of
from autowidth.lab.prepare import build_network, check_folder, find_device, load_images
from autowidth.lab.result import Attempt, Kept, Progress, Report, Result, silent
from autowidth.lab.resuming import WHOLE, begin_row, check_anew, parts_of
from autowidth.lab.saved import save_run
from autowidth.lab.settings import Settings
from autowidth.lab.shrinking import STEP, in_steps, reviewed
from autowidth.layers import layers_of
from autowidth.policy import Budget, BudgetError, Limits, Never, Policy, Schedule
from autowidth.review.effort import Effort
from autowidth.review.review import Reviewer
from autowidth.review.untrained import AUDIT, PROBE, STEPS, review_, reviews_for
from autowidth.trace import trace

JUDGED = 500
"""Pictures that are judged at once."""

EACH = 0.3
"""Of the time that training the whole network takes, what one attempt may take; as many are made as there is time."""

MOST, LEAST = 0.6, 0.06
"""Of the epochs of the whole network, the share that an attempt trains for at most, and below which none is made."""

RATES = (0.2, 0.8)
"""Of the peak learning rate, where an attempt begins that removes next to nothing, and one that removes next to all;
between them it goes with the square of what is removed. It falls to 0 along half a cosine."""

FIXED = 0.3
"""Of a step of the whole network, the part that takes its time however narrow a network is."""

TEACHER = 1 / 3
"""What the reference's own forward pass adds to a step, as a share of a step of the whole network."""

REVIEWS = 0.04
"""What the reviews of an attempt take, as a share of the time of the whole network."""

LOOK, LOOKING = Effort(probe_samples=PROBE, audit_samples=AUDIT), 0.3
"""What a review of an attempt looks at, as `shrink_` does, where all take no more than this part of the attempt; a
quarter of it elsewhere (docs/log/014)."""


def epochs_for(share: float, time: float, epochs: int) -> int:
    """How many epochs an attempt at this share of the MACs may train for in so much of the whole network's time.

    `epochs` are those of the whole network; 0 where there is no time for a useful number.
    """
    part = min((time - REVIEWS) / (FIXED + (1 - FIXED) * share + TEACHER), MOST)
    return max(round(part * epochs), 1) if part >= LEAST else 0


def rate_for(aim: float) -> float:
    """The peak rate of an attempt that leaves this share of the MACs, as a share of the whole network's."""
    gentle, bold = RATES
    return gentle + (bold - gentle) * (1 - aim) ** 2


class _Course:
    """What a row of runs looks like to whoever looks on: one run, whose epochs and steps go on."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.last: Progress | None = None
        self.offset = {"epoch": 0, "step": 0, "reviews": 0, "seconds": 0.0}
        self.start: Progress | None = None

    def next_part(self) -> None:
        """What follows goes on behind what was."""
        if self.last is not None:
            self.offset = {name: getattr(self.last, name) for name in self.offset}

    def show(self, progress: Progress) -> None:
        """Reports, counted from the start of the first part; of later parts the start is no start."""
        self.start = self.start or progress
        offset, start = self.offset, self.start
        moved = {name: getattr(progress, name) + offset[name] for name in offset}
        shown = replace(
            progress, **moved, epochs=progress.epochs + int(offset["epoch"]), macs_start=start.macs_start,
            total_steps=progress.total_steps + int(offset["step"]), params_start=start.params_start,
            accuracy_start=start.accuracy_start,
        )  # fmt: skip
        self.last = shown
        if progress.moment != "start" or progress is start:
            self.report(shown)

    def passed(self, result: Result, *, about: str, steps: int) -> None:
        """A part that is over already, and was not shown by its loop."""
        self.show(
            Progress(
                moment="start", data=about, epoch=result.epochs, epochs=result.epochs, step=steps, total_steps=steps,
                loss=None, accuracy=result.accuracy, accuracy_start=result.accuracy_start, macs=result.macs,
                macs_start=result.macs_start, params=result.params, params_start=result.params_start,
                widths=result.widths, event=None, reviews=result.reviews, seconds=result.seconds,
            )
        )  # fmt: skip

    def say(self, sentence: str) -> None:
        """Tells a sentence."""
        assert self.last is not None, "the first part has begun"
        self.report(replace(self.last, moment="notice", notice=sentence))

    def back_to(self, result: Result, accuracy: float) -> None:
        """The state that stays, where it is not the one that was shown last."""
        if self.last is not None and (self.last.macs, self.last.params) != (result.macs, result.params):
            back = replace(
                self.last, moment="epoch", macs=result.macs, params=result.params, accuracy=accuracy,
                widths=result.widths, notice=None,
            )  # fmt: skip
            self.report(back)


def train_kept(
    settings: Settings,
    *,
    report: Report = silent,
    watch: Callable[[AutoWidth], None] = lambda engine: None,
    network: nn.Module | None = None,
    images: ImageSet | None = None,
    resume: Path | None = None,
) -> Result:
    """Trains by these settings, and makes the network as small as costs no more than `settings.keep` points.

    The result's `kept` says what was promised, what the whole network reached, and every attempt. With `out` set, that
    folder holds the result as a run, and below it, in `whole`, the network that was trained whole. `resume` is the
    folder of a run that was broken off. Raises as `autowidth.lab.loop.train` does.
    """
    if settings.out is not None:
        check_folder(settings.out)
    with locked(settings.out):
        images = (images or load_images(settings)).to(find_device(settings.device))
        row = _Row(settings, images, _Course(report), watch, resume)
        try:
            with cpu_threads(threads_of(settings, images)):
                return row.written(row.followed(network))
        except BaseException:
            if settings.out is not None and not parts_of(settings.out):
                shutil.rmtree(settings.out / TRAINING, ignore_errors=True)
            raise


class _Row:
    """The runs of one promise: the whole network, then the attempts."""

    def __init__(
        self, settings: Settings, images: ImageSet, course: _Course, watch: Callable[[AutoWidth], None],
        resume: Path | None,
    ) -> None:  # fmt: skip
        brought = settings.weights is not None and images.held_out is None
        self.images, judging = parted(images, settings.seed) if brought else (images, images)
        self.settings, self.course, self.watch = settings, course, watch
        source = "training images" if judging is self.images else f"{len(judging.train):,} images set apart"
        at_once = min(JUDGED, evaluated_at_once(settings, images))
        self.judge = Judge(judging, points=settings.keep, nats=settings.keep_nats, at_once=at_once, source=source)
        self.part: Literal["held_out", "test"] = "held_out" if settings.holdout else "test"
        self.device = images.train.labels.device
        self.tried: list[tuple[Attempt, Result]] = []
        self.looked, self.worked = 0.0, 0.0  # seconds of judgements, wall and processor
        self.earlier = {} if resume is None else parts_of(resume)
        if resume is None and settings.out is not None:
            check_anew(settings.out)
            begin_row(settings.out, settings)

    # ---- its parts

    def _part(self, name: str, changes: dict[str, Any], method: Method, network: nn.Module) -> Result:
        """One run, below the folder of all; taken from there where it is finished, gone on with where it is not."""
        out = None if self.settings.out is None else self.settings.out / TRAINING / name
        settings = self.settings.model_copy(update={**changes, "out": out})
        self.course.next_part()
        begun = self.earlier.get(name)
        if begun is not None and (begun / RUN).exists():
            return self._finished(begun, network)
        return train(
            settings, report=self.course.show, watch=self.watch, method=method, network=network, images=self.images,
            resume=begun, named=self.settings.out,
        )  # fmt: skip

    def _finished(self, out: Path, network: nn.Module) -> Result:
        """The result of a part that was finished earlier; the network takes its widths and weights."""
        run = read_run(out)
        channel_map = load_(network, out, example_inputs=torch.zeros(2, *self.images.image_shape))
        table = {name: value for name, value in run.extra["result"].items() if name not in ("history", "kept")}
        history = run.history()
        assert history is not None, "the loop saves one"
        result = Result(**table, network=network.to(self.device), channel_map=channel_map, history=history)
        self.course.passed(result, about=str(self.images), steps=self._each * result.epochs)
        return result

    def followed(self, network: nn.Module | None) -> Result:
        """All parts; the result, with what is known of the whole network."""
        settings = self.settings
        if network is None:
            torch.manual_seed(settings.seed)
            network = build_network(settings, self.images)
        if settings.weights is None:
            whole = self._part(WHOLE, {"policy": Never()}, Method(policy=Never()), network)
        else:
            whole = self._brought(network.to(self.device))
        reference = self._seen(whole.network)
        kept, share, left = whole, 1.0, settings.keep_time - 1
        if settings.weights is None:
            aim = self._first_aim(reference.loss)
        else:
            kept, aim = self._narrowed(whole, reference)
            share = kept.macs / whole.macs
        while aim <= LARGEST and left > 1e-9 and (epochs := self._epochs(aim, left)):
            found = self._attempt(kept, aim / share, epochs, whole)
            if found is None:
                break
            left -= EACH
            stays = self._judged(found, reference, aim, epochs, whole)
            kept, share = (found, found.macs / whole.macs) if stays else (kept, share)
            aim = max(share / 2, SMALLEST) if stays else math.sqrt(aim * share)
            if aim >= 0.95 * share:
                break
        return self._result(kept, whole)

    def _first_aim(self, loss: float) -> float:
        """The share of the MACs of the first attempt: what the loss allows, and what there are steps for."""
        aim = first_share(loss, self.judge.allowed)
        return max(aim, healed_share(self._each * self._epochs(aim, self.settings.keep_time - 1)))

    def _epochs(self, aim: float, left: float) -> int:
        """For how long an attempt trains: a part of the run, or, where the whole network was brought, all of it."""
        if self.settings.weights is not None:
            return self.settings.epochs
        return epochs_for(aim, min(left, EACH), self.settings.epochs)

    def _brought(self, network: nn.Module) -> Result:
        """The network with the weights that were brought, which is the reference as it is."""
        settings, images = self.settings, self.images
        began, worked = time.perf_counter(), time.process_time()
        found = seen(network, images.plain_batches(self.part, evaluated_at_once(settings, images)))
        channel_map = trace(network, torch.zeros(2, *images.image_shape, device=self.device))
        widths, macs = channel_map.widths, round(macs_cost(channel_map).at(channel_map.widths))
        params = sum(parameter.numel() for parameter in network.parameters())
        result = Result(
            model=settings.model, data=images.name, part=self.part, seed=settings.seed, epochs=0,
            accuracy=found.accuracy, accuracy_start=found.accuracy, loss=found.loss, macs=macs, macs_start=macs,
            params=params,
            params_start=params, latency_ms=None, latency_ms_start=None, removed=0, inserted=0, inserted_alive=0,
            skipped=len(images.skipped), reviews=0, seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - worked, review_seconds=0.0, device=str(self.device),
            threads=torch.get_num_threads(), widths_start=widths, widths=widths, out=None, network=network,
            channel_map=channel_map, history=History(widths, layers=layers_of(channel_map)),
        )  # fmt: skip
        self.course.passed(result, about=str(images), steps=0)
        return result

    def _narrowed(self, whole: Result, reference: Seen) -> tuple[Result, float]:
        """The brought network as narrow as it may be without training, and the share that training may win back."""
        own, network = self.settings.effort or GLANCE, copy.deepcopy(whole.network)
        settings = self.settings.model_copy(update={"effort": own})
        reviewer = reviewed(network, settings, self.images, in_steps(self._limits()))
        began, aim, kept, words = time.perf_counter(), LARGEST, whole, ""
        for step in reviewer.policy.reviews(STEPS):
            review_(reviewer, step)
            share, evidence = reviewer.macs / whole.macs, self.judge.seen(network)
            verdict = self.judge.verdict(evidence, reference)
            self.course.say(f"without training, at {share:.1%} of the MACs: {verdict.words}")
            if verdict.holds:
                kept = self._as_narrowed(whole, reviewer)
            words = verdict.words if verdict.holds or kept is whole else words
            may_be = may_be_won_back(evidence.loss - reference.loss, self.judge.allowed) and aim > SMALLEST
            if not (verdict.holds or may_be):
                break
            aim = share
        share, seconds = kept.macs / whole.macs, time.perf_counter() - began
        attempt = Attempt(
            aim=share, macs=share, epochs=0, judged=words, stays=kept is not whole, seconds=seconds
        )  # fmt: skip
        self.tried.append((attempt, replace(kept, seconds=seconds)))
        return kept, min(max(aim, SMALLEST), STEP * share)

    def _as_narrowed(self, whole: Result, reviewer: Reviewer) -> Result:
        """The network of the reviewer as it is now, as what became of the whole one before the first step of a run."""
        network, record = copy.deepcopy(reviewer.model), reviewer.history
        history = History(record.widths_start, layers=record.layers)
        for event in record:
            history.append(replace(event, step=0))
        return replace(
            whole, network=network, channel_map=reviewer.channel_map, history=history, macs=reviewer.macs,
            params=reviewer.params, widths=reviewer.channel_map.widths, reviews=len(history),
            removed=history.removed_total, review_seconds=sum(history.seconds_total.values()),
        )  # fmt: skip

    def _attempt(self, start: Result, aim: float, epochs: int, whole: Result) -> Result | None:
        """A copy of the network, narrowed to this share of its MACs and trained on; None where it cannot get there."""
        settings, number = self.settings, self._trained + 1
        policy = Budget(macs=aim, schedule=Schedule(**AT_ONCE), limits=self._limits())
        share, length = aim * start.macs / whole.macs, f"{epochs} epoch{'s' * (epochs != 1)}"
        self.course.say(f"attempt {number}: to {share:.0%} of the MACs, in {length} taught by the whole network")
        rate = settings.lr * (1.0 if settings.weights is not None else rate_for(aim))
        changes = {
            "policy": policy, "effort": self._effort(policy, epochs, whole), "epochs": epochs,
            "schedule": "cosine", "cycles": 1, "lr": rate, "weights": None,
            "looks": settings.looks and max(1, round(settings.looks * epochs / settings.epochs)),
        }  # fmt: skip
        method = Method(policy=policy, teacher=whole.network)
        try:
            return self._part(f"attempt-{number}", changes, method, copy.deepcopy(start.network))
        except BudgetError as error:
            self.course.say(f"attempt {number} was not made: {error}")
            return None

    def _effort(self, policy: Policy, epochs: int, whole: Result) -> Effort | None:
        """How much a review of an attempt looks at: as given, or well where the attempt is long enough."""
        samples, groups = self._each * epochs * self.settings.batch_size, len(whole.channel_map.groups)
        fitted = Effort().fitted(samples, reviews_for(policy), groups=groups, share=LOOKING)
        affordable = fitted.probe_samples >= PROBE and fitted.audit_samples >= AUDIT
        return self.settings.effort or (LOOK if affordable else None)

    def _limits(self) -> Limits:
        """What reviews of an attempt may do: as the user's policy has it; the judgement at the end decides the rest."""
        own = getattr(self.settings.policy, "limits", None)
        return own if isinstance(own, Limits) else Limits()

    def _seen(self, network: nn.Module) -> Seen:
        """What the network makes of the pictures of a judgement; the time that it takes is counted."""
        began, worked = time.perf_counter(), time.process_time()
        found = self.judge.seen(network)
        self.looked += time.perf_counter() - began
        self.worked += time.process_time() - worked
        return found

    def _judged(self, found: Result, reference: Seen, aim: float, epochs: int, whole: Result) -> bool:
        """Whether what was found stays; says so."""
        verdict = self.judge.verdict(self._seen(found.network), reference)
        attempt = Attempt(
            aim=aim, macs=found.macs / whole.macs, epochs=epochs, judged=verdict.words, stays=verdict.holds,
            seconds=found.seconds,
        )  # fmt: skip
        self.tried.append((attempt, found))
        became = "stays" if verdict.holds else "is taken back"
        self.course.say(f"attempt {self._trained}, at {attempt.macs:.1%} of the MACs, {became}: {verdict.words}")
        return verdict.holds

    # ---- what it comes to

    def _result(self, kept: Result, whole: Result) -> Result:
        """The network that is kept, with the record of how it came about and of what was promised."""
        images = self.images.plain_batches(self.part, evaluated_at_once(self.settings, self.images))
        before = seen(whole.network, images)
        found = difference(before if kept is whole else seen(kept.network, images), before)
        self.course.back_to(kept, kept.accuracy)
        runs = [whole, *(result for _, result in self.tried)]
        history = self._history(whole)
        return replace(
            kept, seed=whole.seed, epochs=sum(run.epochs for run in runs), macs_start=whole.macs_start,
            accuracy_start=whole.accuracy_start,
            params_start=whole.params_start, widths_start=whole.widths_start, history=history,
            removed=history.removed_total, inserted=history.inserted_total, inserted_alive=history.inserted_alive,
            reviews=len(history), seconds=sum(run.seconds for run in runs) + self.looked, skipped=whole.skipped,
            cpu_seconds=sum(run.cpu_seconds for run in runs) + self.worked,
            review_seconds=sum(run.review_seconds for run in runs),
            compile_seconds=sum(run.compile_seconds for run in runs),
            out=None if self.settings.out is None else str(self.settings.out),
            kept=Kept(
                points=self.settings.keep, nats=self.settings.keep_nats, accuracy=before.accuracy,
                difference=found.accuracy, standard_error=found.accuracy_error, seconds=whole.seconds,
                attempts=tuple(attempt for attempt, _ in self.tried),
            ),
        )  # fmt: skip

    @property
    def _trained(self) -> int:
        """How many attempts with training there were."""
        return sum(attempt.epochs > 0 for attempt, _ in self.tried)

    @property
    def _each(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self.images.training_batches(self.settings.batch_size, seed=self.settings.seed))

    def _history(self, whole: Result) -> History:
        """One record of the whole network and of what the attempts that stay did to it, at the steps of all parts."""
        history = History(whole.history.widths_start, layers=whole.history.layers)
        before = self._each * whole.epochs
        for attempt, result in self.tried:
            for event in result.history.events if attempt.stays else ():
                history.append(replace(event, step=event.step + before))
            before += self._each * result.epochs
        return history

    def written(self, result: Result) -> Result:
        """Writes the result, and the whole network beside it, and takes away what the parts left."""
        out = self.settings.out
        if out is None:
            return result

        def write(place: Path) -> Result:
            moved = replace(result, out=str(place))
            save_run(place, self.settings, self.images, moved)
            return moved

        place, result = anywhere(out, self.settings.rescue, write)
        if place != out:
            self.course.say(f"{out} took nothing: the run was written to {place}")
            return result
        whole = out / TRAINING / WHOLE
        with contextlib.suppress(OSError):  # the result is there: what cannot be moved stays where it is
            shutil.rmtree(whole / TRAINING, ignore_errors=True)
            shutil.rmtree(out / WHOLE, ignore_errors=True)
            if whole.is_dir():
                whole.rename(out / WHOLE)
            shutil.rmtree(out / TRAINING)
        return result
