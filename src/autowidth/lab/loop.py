"""The training loop with the engine attached.

The order of events:

    check the folder, the device, the data, the model    # what can be known to be wrong is refused before training
    for every epoch:
        for every batch of augmented training images:
            forward, loss, backward, optimizer step, learning rate step
            move the averaged copy, if there is one
            engine.step()                                # now and then a review, which may change widths
            watch(engine), if somebody watches
        evaluate the network, or its averaged copy
    save the same, the history, the settings and the result
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from autowidth.engine import AutoWidth
from autowidth.errors import AutoWidthError
from autowidth.lab.baselines.registry import TrainingRule
from autowidth.lab.data import ImageSet
from autowidth.lab.loop_parts import (
    PROBED,
    compiled,
    cpu_threads,
    decayed_and_not,
    evaluate,
    evaluated_at_once,
    fitted_convolutions,
    one_cycle,
    probe_batches,
    seed_everything,
    threads_of,
)
from autowidth.lab.prepare import build_network, check_folder, find_device, load_images
from autowidth.lab.result import Moment, Progress, Report, Result, silent
from autowidth.lab.saved import save_run
from autowidth.lab.settings import Settings
from autowidth.lab.weights import WeightsError
from autowidth.policy import Budget, Policy
from autowidth.review.review import Importance


class DivergedError(AutoWidthError, FloatingPointError):
    """A loss that is not finite."""


PULSE = 20
"""Batches between two looks at the loss. A look waits for the accelerator, so it is not taken after every batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What takes the place of the settings' policy and of our worth; as it stands, it changes nothing.

    policy: None for that of the settings. importance: None for our worth. reconstruct: whether readers are refitted by
    least squares to what is left of their inputs, where filters are removed. rule: what is done to the weights while
    they train, until the policy's last review.
    """

    policy: Policy | None = None
    importance: Importance | None = None
    reconstruct: bool = True
    rule: TrainingRule | None = None


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
) -> Result:
    """Trains a network by these settings and returns what came out; with `out` set, writes it there.

    `method` says otherwise where it says something; `network` is what training starts from, None for a fresh one as
    the settings name it; `images` are those that the settings name, for callers who hold them already; `watch` is
    called with the engine after every step, behind the review if one took place. Seeds the global generators of Python,
    numpy and torch.

    Raises, before training: FolderError, DeviceError, ModelError, UnknownModelError, DataError, UnknownDataError,
    TraceError, BudgetError, NothingToResizeError. Raises FloatingPointError where a loss is not finite, and OSError
    where the disk refuses the result. The folder is then as it was before.
    """
    if settings.out is not None:
        check_folder(settings.out)
    device = find_device(settings.device)
    images = (images or load_images(settings)).to(device)
    seed_everything(settings.seed)
    with cpu_threads(threads_of(settings, images)), fitted_convolutions():
        network = (network or build_network(settings, images)).to(device)
        run = _Run(settings, images, network, method or Method())
        try:
            run.follow(report, watch)
        except BaseException:
            run.engine.abandon()
            raise
        result = run.result()
    if settings.out is not None:
        save_run(settings.out, settings, images, result)
    return result


class _Run:
    """The loop and what it holds."""

    def __init__(self, settings: Settings, images: ImageSet, network: nn.Module, method: Method) -> None:
        policy = method.policy or settings.policy
        self.settings = settings
        self.rule = method.rule
        self.network = network
        self.device = images.train.images.device
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.images = images
        self.about = str(images)
        self.batches = images.training_batches(settings.batch_size, seed=settings.seed)
        self.part: Literal["held_out", "test"] = "held_out" if settings.holdout else "test"
        self.loss_fn = partial(F.cross_entropy, label_smoothing=settings.label_smoothing)
        self.total_steps = settings.epochs * len(self.batches)
        self.optimizer = SGD(
            decayed_and_not(network, settings.weight_decay), settings.lr, settings.momentum, nesterov=True
        )
        self.schedule = LambdaLR(self.optimizer, self._rate)
        self.loss_of = compiled(self._loss_of, settings.model) if settings.compile else self._loss_of
        self.average = None if settings.ema is None else AveragedModel(
            network, multi_avg_fn=self._follow, use_buffers=True
        )  # fmt: skip
        self.outcome = network if self.average is None else self.average.module
        self.at_once = evaluated_at_once(settings, images)
        self.ruled = max(policy.reviews(self.total_steps), default=self.total_steps) if self.rule else 0
        self.engine = self._attached(policy, method)
        self.accuracy: float | None = None
        self.accuracy_start: float | None = None
        self.loss: float | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def _attached(self, policy: Policy, method: Method) -> AutoWidth:
        """The engine on the network."""
        settings, images = self.settings, self.images
        if settings.weights is not None:
            _check_growth(policy)
        one = torch.zeros(1, *images.image_shape, device=self.device)
        return AutoWidth(
            self.network, self.optimizer, example_inputs=torch.zeros(2, *images.image_shape, device=self.device),
            probe=probe_batches(images, settings.seed, min(PROBED, self.at_once)), loss_fn=self.loss_fn, policy=policy,
            total_steps=self.total_steps, effort=settings.effort, batch_size=settings.batch_size, seed=settings.seed,
            followers=[] if self.average is None else [self.average],
            importance=method.importance, reconstruct=method.reconstruct,
            latency_inputs=one.contiguous(memory_format=self.format),
        )  # fmt: skip

    def follow(self, report: Report, watch: Watch) -> None:
        """Trains, evaluates, reports after every epoch. Raises FloatingPointError for a loss that is not finite."""
        if self.settings.weights is not None:
            self.accuracy_start, _ = self._evaluated()
        began, worked = time.perf_counter(), time.process_time()
        report(self._progress("start", 0, None))
        for epoch in range(1, self.settings.epochs + 1):
            total = torch.zeros((), device=self.device)
            for number, (x, y) in enumerate(self.batches, 1):
                total += self._step(x, y)
                event = self.engine.step()
                watch(self.engine)
                if event or number % PULSE == 0 or number == len(self.batches):
                    mean = _finite(total.item() / number, "training loss", self.engine.steps, self.settings.lr)
                    self.seconds = time.perf_counter() - began
                    report(self._progress("review" if event else "batches", epoch, mean))
            if self.rule and self.engine.steps < self.ruled:
                self.rule.after_epoch(self.network, self.engine.channel_map, self.engine.steps / self.ruled)
            if self._looks_after(epoch):
                self.accuracy, self.loss = self._evaluated()
                _finite(self.loss, f"loss on the {self.part} images", self.engine.steps, self.settings.lr)
            self.seconds, self.cpu_seconds = time.perf_counter() - began, time.process_time() - worked
            report(self._progress("epoch", epoch, mean))

    def _evaluated(self) -> tuple[float, float]:
        """Accuracy and loss of the network, or of its averaged copy, as it is now."""
        return evaluate(self.outcome, self.images.plain_batches(self.part, self.at_once), self.format)

    def _looks_after(self, epoch: int) -> bool:
        """Whether the network is evaluated after this epoch; always after the last one."""
        looks, epochs = self.settings.looks or self.settings.epochs, self.settings.epochs
        return epoch * looks // epochs > (epoch - 1) * looks // epochs

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on images (B, C, H, W) and labels (B,); returns the loss, a scalar."""
        self.network.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
            loss = self.loss_of(x.contiguous(memory_format=self.format), y)
        self.optimizer.zero_grad()
        loss.backward()
        ruled = self.rule if self.engine.steps < self.ruled else None
        if ruled:
            ruled.after_backward(self.network, self.engine.channel_map, self.engine.steps / self.ruled)
        self.optimizer.step()
        if ruled:
            rate = float(self.schedule.get_last_lr()[0])
            ruled.after_step(self.network, self.engine.channel_map, self.engine.steps / self.ruled, rate)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return loss.detach()

    def _loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss, a scalar, of images (B, C, H, W) and labels (B,)."""
        return self.loss_fn(self.network(x), y)

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

    def _progress(self, moment: Moment, epoch: int, loss: float | None) -> Progress:
        engine = self.engine
        return Progress(
            moment=moment, data=self.about, epoch=epoch, epochs=self.settings.epochs, step=engine.steps,
            total_steps=self.total_steps, loss=loss, accuracy=self.accuracy, accuracy_start=self.accuracy_start,
            macs=engine.macs, macs_start=engine.macs_start, params=engine.params, params_start=engine.params_start,
            widths=engine.widths, seconds=self.seconds, reviews=len(engine.history),
            event=engine.history.events[-1] if len(engine.history) else None,
        )  # fmt: skip

    def result(self) -> Result:
        """What came out, once `follow` has returned."""
        engine, history, settings = self.engine, self.engine.history, self.settings
        assert self.accuracy is not None and self.loss is not None, "no epoch has been evaluated"
        return Result(
            model=settings.model, data=self.images.name, part=self.part, seed=settings.seed, epochs=settings.epochs,
            accuracy=self.accuracy, accuracy_start=self.accuracy_start, loss=self.loss, macs=engine.macs,
            macs_start=engine.macs_start,
            params=engine.params, params_start=engine.params_start, latency_ms=engine.latency_ms,
            latency_ms_start=engine.latency_ms_start, removed=history.removed_total,
            inserted=history.inserted_total, inserted_alive=history.inserted_alive,
            skipped=len(self.images.skipped), reviews=len(history),
            seconds=self.seconds, cpu_seconds=self.cpu_seconds, review_seconds=engine.review_seconds,
            device=str(self.device), threads=torch.get_num_threads(), widths_start=history.widths_start,
            widths=engine.widths,
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


def _finite(loss: float, what: str, step: int, lr: float) -> float:
    """The loss itself. Raises DivergedError where it is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"the {what} is {loss} at step {step}: training has diverged; lower lr, which is {lr:g}")
    return loss
