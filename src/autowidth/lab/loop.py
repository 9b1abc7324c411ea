"""The training loop with the engine attached.

The order of events:

    check the folder, the device, the data, the model    # what can be known to be wrong is refused before training
    for every epoch:
        for every batch of augmented training images:
            forward, loss, backward, optimizer step, learning rate step; no optimizer step where that is not finite
            move the averaged copy, if there is one
            engine.step()                                # now and then a review, which may change widths
            watch(engine), if somebody watches
            every few minutes: save the training as it stands
            Ctrl-C, SIGTERM: save it, and leave
        evaluate the network, or its averaged copy
    save the same, the history, the settings and the result; then the training once more, to be gone on with
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from autowidth.engine import AutoWidth
from autowidth.history import Event
from autowidth.lab.baselines.registry import TrainingRule
from autowidth.lab.compiling import PacedLoss
from autowidth.lab.data import ImageSet
from autowidth.lab.fine_tuning import LOOKED_AT
from autowidth.lab.finite import DivergedError, FiniteCheck
from autowidth.lab.keeping import Keeper, NowhereError, anywhere
from autowidth.lab.lock import locked
from autowidth.lab.loop_parts import (
    PROBED,
    Lesson,
    at_once,
    augmented_batches,
    cpu_threads,
    evaluated_at_once,
    fitted_convolutions,
    one_cycle,
    probe_batches,
    seed_everything,
    threads_of,
)
from autowidth.lab.optimizers import optimizer_of
from autowidth.lab.policies import shrinks_first
from autowidth.lab.prepare import build_network, built, check_folder, find_device, load_images
from autowidth.lab.result import Moment, Progress, Report, Result, silent
from autowidth.lab.resuming import ResumeError, Unfinished, check_anew, unfinished_at
from autowidth.lab.saved import description, save_run
from autowidth.lab.settings import Settings
from autowidth.lab.standing import Standing
from autowidth.lab.torchrun import Steps, evaluated, shared, wrapped
from autowidth.lab.weights import WeightsError
from autowidth.policy import Budget, Policy
from autowidth.review.batches import DivergedProbeError
from autowidth.review.review import Importance
from autowidth.signals import StopAsked, stop_asked
from autowidth.training import resume_

__all__ = ["DivergedError", "Method", "Watch", "train"]

PULSE = 20
"""Batches between two reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What takes the place of the settings' policy and of our worth; as it stands, it changes nothing.

    policy: None for that of the settings. importance: None for our worth. reconstruct: whether readers are refitted by
    least squares to what is left of their inputs, where filters are removed. rule: what is done to the weights while
    they train, until the policy's last review. teacher: a network whose scores are learnt beside the labels (Hinton et
    al. 2015), and stays as it is; taught: its share of the loss.
    """

    policy: Policy | None = None
    importance: Importance | None = None
    reconstruct: bool = True
    rule: TrainingRule | None = None
    teacher: nn.Module | None = None
    taught: float = Lesson.SHARE


Watch = Callable[[AutoWidth], None]
"""What looks at the engine after every step; whatever it does must leave the network as it was."""


def _nobody(engine: AutoWidth) -> None:
    """Does not look."""


def train(
    settings: Settings,
    *,
    report: Report = silent,
    watch: Watch = _nobody,
    method: Method | None = None,
    network: nn.Module | None = None,
    images: ImageSet | None = None,
    resume: Path | None = None,
    named: Path | None = None,
) -> Result:
    """Trains a network by these settings and returns what came out; with `out` set, writes it there.

    `method` says otherwise where it says something; `network` is what training starts from, None for a fresh one as
    the settings name it; `images` are those that the settings name, for callers who hold them already; `watch` is
    called with the engine after every step, behind the review if one took place. `resume` is the folder of a run that
    is gone on with (see `settings_to_resume`), `named` the folder by which people name the run, where it is part of
    another. Seeds the global generators of Python, numpy and torch.

    With `out`, the training is saved every few minutes, and Ctrl-C and SIGTERM save it too and raise Interrupted and
    Terminated. Where `out` takes no result, it is written to the rescue folder or a temporary one, and `Result.out`
    says where.

    Raises, before training: FolderError, LockedError, ResumeError, DeviceError, ModelError, UnknownModelError,
    DataError, UnknownDataError, TraceError, BudgetError, NothingToResizeError. Raises DivergedError, a
    FloatingPointError, where losses or gradients are not finite too often in a row or at the end, and NowhereError, an
    OSError with the result, where no disk takes it. A run that was in the folder is then as it was before.
    """
    if settings.out is not None:
        check_folder(settings.out)
    device = find_device(settings.device)
    with locked(settings.out):
        taken_up = _taken_up(settings, resume)
        images = (images or load_images(settings)).to(device)
        seed_everything(settings.seed)
        with cpu_threads(threads_of(settings, images)), fitted_convolutions():
            network = (network or _network(settings, images, taken_up)).to(device)
            run = _Run(settings, images, network, method or Method(), report, named or settings.out)
            return _followed(run, taken_up, watch)


def _followed(run: _Run, taken_up: Unfinished | None, watch: Watch) -> Result:
    """What a run comes to, from its start or from where it was saved."""
    try:
        with stop_asked() as asked:
            if taken_up is not None:
                run.go_on(taken_up)
            run.follow(watch, asked)
            return run.written()
    except BaseException:
        run.engine.abandon()
        raise


def _taken_up(settings: Settings, resume: Path | None) -> Unfinished | None:
    """The training that is gone on with. Raises ResumeError where there is none, or where one would be lost."""
    if resume is None:
        if settings.out is not None:
            check_anew(settings.out)
        return None
    found = unfinished_at(resume)
    if found is None:
        raise ResumeError(f"no training was saved in {resume}: train without --resume")
    return found


def _network(settings: Settings, images: ImageSet, taken_up: Unfinished | None) -> nn.Module:
    """The network that training starts from; of a run that goes on only its form, the content comes from the save."""
    if taken_up is None:
        return build_network(settings, images)
    classes = len(images.classes)
    return built(settings.model, images.image_shape, classes, width=settings.width, of=images.name)


class _Run:
    """The loop and what it holds."""

    def __init__(
        self, settings: Settings, images: ImageSet, network: nn.Module, method: Method, report: Report,
        named: Path | None,
    ) -> None:  # fmt: skip
        policy = method.policy or settings.policy
        self.settings, self.report, self.rule, self.named = settings, report, method.rule, named
        self.network = network
        self.device = images.train.images.device
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.model, self.steps = wrapped(network), Steps(named)
        self.images, self.about = images, str(images)
        self.batches = shared(images.training_batches(settings.batch_size, seed=settings.seed))
        self.part: Literal["held_out", "test"] = "held_out" if settings.holdout else "test"
        self.loss_fn = partial(F.cross_entropy, label_smoothing=settings.label_smoothing)
        self.taught = None if method.teacher is None else Lesson(method.teacher, self.loss_fn, share=method.taught)
        self.total_steps = settings.epochs * len(self.batches)
        self.optimizer = optimizer_of(network, settings)
        self.schedule = LambdaLR(self.optimizer, self._rate)
        self.paced = self._paced(policy) if settings.compile else None
        self.loss_of = self.paced or self._loss_of
        self.average = None if settings.ema is None else AveragedModel(
            network, multi_avg_fn=self._follow, use_buffers=True
        )  # fmt: skip
        self.outcome = network if self.average is None else self.average.module
        self.at_once = evaluated_at_once(settings, images)
        self.ruled = max(policy.reviews(self.total_steps), default=self.total_steps) if self.rule else 0
        self.engine = self._attached(policy, method)
        self.standing = Standing()
        self.is_written = False
        self.finite = FiniteCheck(network, most=settings.bad_steps, remedy=self._remedy, say=self._say)
        parts = {"loop": self.standing, "batches": self.batches, "schedule": self.schedule}
        self.keeper = Keeper(settings, self.engine, parts=parts, about=self._description, say=self._say, named=named)

    def _paced(self, policy: Policy) -> PacedLoss:
        """The training loss, compiled where that pays."""
        changes = (*sorted(policy.reviews(self.total_steps)), self.total_steps)
        return PacedLoss(
            self._loss_of, model=self.settings.model, share=self.settings.compile_share, total_steps=self.total_steps,
            say=self._say,
            layers=sum(parameter.dim() > 1 for parameter in self.network.parameters()),
            ahead=lambda: next(step for step in changes if step > self.engine.steps) - self.engine.steps,
        )  # fmt: skip

    def _attached(self, policy: Policy, method: Method) -> AutoWidth:
        """The engine on the network."""
        settings, images = self.settings, self.images
        if settings.weights is not None:
            _check_growth(policy)
        one = torch.zeros(1, *images.image_shape, device=self.device)
        return AutoWidth(
            self.network, self.optimizer, example_inputs=torch.zeros(2, *images.image_shape, device=self.device),
            probe=probe_batches(images, settings.seed, min(at_once(images, PROBED), self.at_once)),
            loss_fn=self.loss_fn, policy=policy,
            total_steps=self.total_steps, effort=settings.effort, seed=settings.seed,
            batch_size=settings.batch_size // self.steps.count,
            followers=[] if self.average is None else [self.average],
            importance=method.importance, reconstruct=method.reconstruct,
            latency_inputs=one.contiguous(memory_format=self.format),
        )  # fmt: skip

    # ---- how it goes on

    def go_on(self, taken_up: Unfinished) -> None:
        """Takes the training up as it was saved. Raises ResumeError, CheckpointError and StateError."""
        now = description(self.settings, self.images)
        for name in ("classes", "input_shape", "normalization"):
            if taken_up.about.get(name) != now[name]:
                raise ResumeError(f"the images are not those of the run: their {name} was {taken_up.about.get(name)}")
        longer = self.settings.epochs != taken_up.epochs
        resume_(
            taken_up.folder, self.engine, parts=self.keeper.parts, differing=("total_steps",) if longer else ()
        )  # fmt: skip
        self.keeper.first = taken_up.folder != self.keeper.folder
        self.finite.follow(self.network)
        epoch = self.standing.epoch
        self._say(f"going on at step {self.engine.steps} of {self.total_steps}, epoch {epoch + 1}")
        self._replan(taken_up)

    def _replan(self, taken_up: Unfinished) -> None:
        """Puts the learning rate where the settings want it, where epochs or rate are others now, and says so."""
        settings, was = self.settings, taken_up.settings
        if (settings.epochs, settings.lr) == (taken_up.epochs, was.lr):
            return
        before = self.optimizer.param_groups[0]["lr"]
        self.schedule.base_lrs = [settings.lr] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = settings.lr
            group["lr"] = settings.lr * self._rate(self.schedule.last_epoch)
        reviews = [step for step in self.engine.policy.reviews(self.total_steps) if step > self.engine.steps]
        self._say(
            f"from here on as if {settings.epochs} epochs had been planned instead of {taken_up.epochs}, with lr "
            f"{settings.lr:g}: the learning rate goes from {before:.3g} to {self.optimizer.param_groups[0]['lr']:.3g} "
            f"and falls to 0 by the new end, {len(reviews) or 'no'} review{'s' * (len(reviews) != 1)} to come"
        )

    def follow(self, watch: Watch, asked: StopAsked) -> None:
        """Trains, evaluates, reports after every epoch. Raises DivergedError, Interrupted, Terminated."""
        at, asked = self.standing, self.steps.listen(asked)
        if self.settings.weights is not None and at.accuracy_start is None:
            at.accuracy_start, _ = self._evaluated(asked)
        at.begin()
        self.report(self._progress("start", at.epoch, None))
        if shrinks_first(self.engine.policy) and not self.engine.steps:
            self._shrink()
        while at.epoch < self.settings.epochs:
            for x, y in self._batches_left():
                at.batch += 1
                event = self._stepped(x, y)
                watch(self.engine)
                at.measure()
                if event or at.batch % PULSE == 0 or at.batch == len(self.batches):
                    self.report(self._progress("review" if event else "batches", at.epoch + 1, at.mean()))
                self._look_up(asked)
            self._end_epoch(asked)
        if not at.evaluated_well:
            raise self.finite.diverged(f"the loss on the {self.part} images is {at.loss} at step {self.engine.steps}")

    def _shrink(self) -> None:
        """Meets the budget before the first step."""
        events = self.engine.shrink(
            batches=augmented_batches(self.images, self.settings.seed, self.at_once),
            effort=self.settings.effort or LOOKED_AT, report=lambda _: self.report(self._progress("review", 0, None)),
        )  # fmt: skip
        if any(event.maps for event in events):
            self.finite.follow(self.network)
            if self.paced is not None:
                self.paced.anew()

    def _batches_left(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of this epoch."""
        if self.standing.batch < len(self.batches):
            yield from self.batches

    def _stepped(self, x: Tensor, y: Tensor) -> Event | None:
        """One step of the network and of the engine; the event of a review, if one took place."""
        loss, finite = self._step(x, y)
        if finite:
            self.standing.add(loss)
        try:
            event = self.engine.step(finite=finite)
        except DivergedProbeError:
            self.finite.evaluation(math.nan, "the probe of a review", self.engine.steps)
            return None
        if event is not None and event.maps:
            self.finite.follow(self.network)
            if self.paced is not None:
                self.paced.anew()
        return event

    def _look_up(self, asked: StopAsked) -> None:
        """Between two steps: saves what is due, and leaves where somebody asked for it."""
        finite = self.finite.steps == 0 and self.standing.evaluated_well
        if asked.signal is not None:
            where = f"at step {self.engine.steps} of {self.total_steps}"
            self.keeper.stop(asked.signal, where, finite=finite)
        if finite and self.keeper.due():
            self.keeper.save()

    def _end_epoch(self, asked: StopAsked) -> None:
        """What follows the last batch of an epoch: the rule of a method, an evaluation, a report."""
        at, engine = self.standing, self.engine
        if self.rule and engine.steps < self.ruled and at.ruled <= at.epoch:
            self.rule.after_epoch(self.network, engine.channel_map, engine.steps / self.ruled)
            at.ruled = at.epoch + 1
        if self._looks_after(at.epoch + 1):
            at.accuracy, at.loss = self._evaluated(asked)
            what = f"the {self.part} images"
            at.evaluated_well = self.finite.evaluation(at.loss, what, engine.steps)
        mean = at.mean()
        at.next_epoch()
        self.report(self._progress("epoch", at.epoch, mean))

    def _evaluated(self, asked: StopAsked) -> tuple[float, float]:
        """Accuracy and loss of the network, or of its averaged copy, as it is now; leaves where that is asked for."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in self.images.plain_batches(self.part, self.at_once):
                self._look_up(asked)
                yield batch

        return evaluated(self.outcome, batches(), self.format, self.engine.ranks)

    def _looks_after(self, epoch: int) -> bool:
        """Whether the network is evaluated after this epoch; always after the last one."""
        looks, epochs = self.settings.looks or self.settings.epochs, self.settings.epochs
        return epoch * looks // epochs > (epoch - 1) * looks // epochs

    def _step(self, x: Tensor, y: Tensor) -> tuple[Tensor, bool]:
        """One optimizer step on images (B, C, H, W) and labels (B,); the loss, a scalar, and whether all was finite.

        Where it was not, nothing moves but the learning rate.
        """
        self.network.train()
        self.finite.before()
        with self.steps.taken():
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
                loss = self.loss_of(x.contiguous(memory_format=self.format), y)
            self.optimizer.zero_grad()
            loss.backward()
        loss = self.steps.mean(loss, self.engine.ranks)
        if finite := self.finite.step(loss, self.engine.steps + 1):
            self._moved()
        self.schedule.step()
        return loss, finite

    def _moved(self) -> None:
        """The optimizer's step, what a method's rule does around it, and the averaged copy."""
        ruled = self.rule if self.engine.steps < self.ruled else None
        if ruled:
            ruled.after_backward(self.network, self.engine.channel_map, self.engine.steps / self.ruled)
        self.optimizer.step()
        if ruled:
            rate = float(self.schedule.get_last_lr()[0])
            ruled.after_step(self.network, self.engine.channel_map, self.engine.steps / self.ruled, rate)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss, a scalar, of images (B, C, H, W) and labels (B,)."""
        scores = self.model(x)
        return self.loss_fn(scores, y) if self.taught is None else self.taught(scores, x, y)

    def _follow(
        self, averages: list[Tensor] | tuple[Tensor, ...], values: list[Tensor] | tuple[Tensor, ...], _: object
    ) -> None:
        """Moves the averages, all of one type, towards the values; counters, which have no mean, take them over."""
        assert self.settings.ema is not None, "called only where there is an average"
        kept = min(self.settings.ema, (1 + self.engine.steps) / (10 + self.engine.steps))
        with torch.no_grad():
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, values, 1 - kept)
            else:
                torch._foreach_copy_(averages, values)

    def _rate(self, step: int) -> float:
        """Share of the peak learning rate at this step, counted from 0 and over all cycles."""
        cycle = -(-self.total_steps // self.settings.cycles)
        warmup = self.settings.warmup if self.settings.schedule == "one-cycle" else 0.0
        return one_cycle((step % cycle + 1) / (cycle + 1), warmup)

    def _progress(self, moment: Moment, epoch: int, loss: float | None, *, notice: str | None = None) -> Progress:
        engine, at = self.engine, self.standing
        return Progress(
            moment=moment, data=self.about, epoch=epoch, epochs=self.settings.epochs, step=engine.steps,
            total_steps=self.total_steps, loss=loss, accuracy=at.accuracy, accuracy_start=at.accuracy_start,
            macs=engine.macs, macs_start=engine.macs_start, params=engine.params, params_start=engine.params_start,
            widths=engine.widths, seconds=at.seconds, reviews=len(engine.history),
            event=engine.history.events[-1] if len(engine.history) else None, notice=notice,
        )  # fmt: skip

    # ---- what it says and leaves

    def _say(self, sentence: str) -> None:
        """Tells the user something that is not as usual."""
        self.report(self._progress("notice", self.standing.epoch, None, notice=sentence))

    def _remedy(self) -> str:
        """What to do about a training that diverged."""
        lower = f"lower lr, which is {self.settings.lr:g}"
        if self.keeper.first:
            return lower
        return f"{lower}, from the last step that was saved: autowidth train --resume {self.named} --lr ..."

    def _description(self) -> dict[str, Any]:
        """What a save says of its run, beside what a finished one says."""
        at = {"step": self.engine.steps, "epoch": self.standing.epoch, "finished": self.is_written}
        return description(self.settings, self.images) | at

    def written(self) -> Result:
        """What came out, written to the folder of the run, or elsewhere if that takes nothing.

        Raises NowhereError, which holds the result.
        """
        result, settings = self.result(), self.settings
        if settings.out is None:
            return result

        def write(place: Path) -> Result:
            moved = replace(result, out=str(place))
            save_run(place, settings, self.images, moved)
            return moved

        try:
            place, result = anywhere(settings.out, settings.rescue, write)
        except NowhereError as error:
            error.result = result
            raise
        if place != settings.out:
            self._say(f"{settings.out} took nothing: the run was written to {place}")
        self.is_written = True
        self.keeper.save(last=True)
        return result

    def result(self) -> Result:
        """What came out, once `follow` has returned."""
        engine, history, settings, at = self.engine, self.engine.history, self.settings, self.standing
        assert at.accuracy is not None and at.loss is not None, "no epoch has been evaluated"
        return Result(
            model=settings.model, data=self.images.name, part=self.part, seed=settings.seed, epochs=settings.epochs,
            accuracy=at.accuracy, accuracy_start=at.accuracy_start, loss=at.loss, macs=engine.macs,
            macs_start=engine.macs_start,
            params=engine.params, params_start=engine.params_start, latency_ms=engine.latency_ms,
            latency_ms_start=engine.latency_ms_start, removed=history.removed_total,
            inserted=history.inserted_total, inserted_alive=history.inserted_alive,
            skipped=len(self.images.skipped), reviews=len(history),
            seconds=at.seconds, cpu_seconds=at.cpu_seconds, review_seconds=engine.review_seconds,
            device=str(self.device), threads=torch.get_num_threads(), widths_start=history.widths_start,
            widths=engine.widths, compile_seconds=0.0 if self.paced is None else self.paced.seconds,
            out=None if settings.out is None else str(settings.out),
            network=self.outcome, channel_map=engine.channel_map, history=history,
        )  # fmt: skip


def _check_growth(policy: Policy) -> None:
    """Raises WeightsError for a budget above the network that was brought."""
    if isinstance(policy, Budget) and not policy.is_absolute and policy.target > 1:
        raise WeightsError(
            f"{policy} asks for a larger network than the one whose weights are brought: give at most 1, or train "
            "from fresh weights"
        )
