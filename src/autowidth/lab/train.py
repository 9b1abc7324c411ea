"""One training run with the engine attached: settings, loop, evaluation, result.

The order of events:

    check the folder, the device, the data, the model    # what can be known to be wrong is said before training
    for every epoch:
        for every batch of augmented training images:
            forward, loss, backward, optimizer step, learning rate step
            move the averaged copy, if there is one
            engine.step()                                # now and then a review, which may change widths
        evaluate the network, or its averaged copy
    save the same, the history, the settings and the result
"""

from __future__ import annotations

import difflib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from autowidth.channels import ChannelMap
from autowidth.checkpoint import HISTORY, MODEL, RUN, save
from autowidth.engine import AutoWidth, Criterion, Effort
from autowidth.history import Event, History
from autowidth.lab.baselines.training import TrainingRule
from autowidth.lab.data import STREAM_ABOVE, Batches, ImageSet, Pictures, load
from autowidth.lab.models import MODELS, UnknownModelError, resolve, spec
from autowidth.policy import Auto, Budget, Never, Policy, Price


class SettingsError(ValueError):
    """Settings that are misspelt, of the wrong kind or out of bounds, or a file of settings that cannot be read."""


class DeviceError(ValueError):
    """A device that this machine does not have."""


class ModelError(ValueError):
    """A model that cannot be built, or that does not fit the images."""


class FolderError(ValueError):
    """A folder that a run cannot be written to."""


class DivergedError(FloatingPointError):
    """A loss that is not finite."""


# ---- settings --------------------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """Everything that decides what a run does, apart from the version of torch and the machine.

    Raises pydantic.ValidationError; `settings_from` says the same in one sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field("resnet20", description="a built-in model, or module:callable that returns an nn.Module")
    data: str = Field("digits", description="digits, cifar10:PATH, cifar100:PATH, folder:PATH or hf:NAME")
    width: float = Field(1.0, gt=0, description="factor on all widths of the starting network")
    edit: bool = Field(True, description="review and resize; without it the run is plain training")
    budget: Budget | None = Field(None, description="the policy that ends at a given cost")
    auto: Auto | None = Field(None, description="the policy that needs no target; what there is without any")
    price: Price | None = Field(None, description="the policy that ends where a MAC earns what it costs")
    effort: Effort | None = Field(
        None, description="how much a review looks at; not given: what takes a twentieth of the run"
    )
    epochs: int = Field(120, ge=1, description="passes over the training images")
    batch_size: int = Field(64, ge=1, description="images per optimizer step")
    lr: float = Field(0.1, gt=0, description="peak of the learning rate")
    schedule: Literal["one-cycle", "cosine"] = Field(
        "one-cycle", description="one-cycle: the learning rate rises, then falls; cosine: it falls from the start"
    )
    cycles: int = Field(1, ge=1, description="equal parts of the run, each with a learning rate cycle of its own")
    momentum: float = Field(0.9, gt=0, lt=1, description="Nesterov momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay, not applied to norms and biases")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of a one-cycle in which the learning rate rises")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the training loss")
    bf16: bool = Field(False, description="train under bfloat16 autocast")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="evaluate and save an exponential moving average of the weights: how much of it each step keeps, "
        "after n steps at most (1 + n) / (10 + n)",
    )
    compile: bool = Field(
        False, description="compile the forward pass and the loss; anew after every review that changes widths"
    )
    channels_last: bool = Field(False, description="keep images and weights in the channels_last memory format")
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto: cuda where there is one")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; not given: 1 for images below 16 x 16, else torch decides"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="decides weights, order, augmentation and probe")
    holdout: float = Field(
        0.0, ge=0, lt=1, description="evaluate on this share of the training images, not on the test"
    )
    looks: int | None = Field(
        None, ge=1, description="how often to evaluate, evenly spaced; not given: after every epoch"
    )
    limit: int | None = Field(None, ge=1, description="keep this many training images")
    pool: int = Field(1, ge=1, description="average this many pixels by as many into one")
    size: int | None = Field(None, ge=1, description="side to which images of a folder or of the hub are resized")
    skip_corrupt: bool = Field(False, description="leave out images that cannot be read, instead of refusing the data")
    stream_above: float = Field(
        STREAM_ABOVE, ge=0, description="MiB of decoded images above which a set is streamed from disk, not kept"
    )
    workers: int | None = Field(
        None, ge=0, description="processes that decode streamed images; not given: one per core, at most 8"
    )
    out: Path | None = Field(None, description="folder that the run is written to; None writes nothing")

    @model_validator(mode="after")
    def _one_policy(self) -> Settings:
        given = [name for name in ("budget", "price", "auto") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: keep one of them")
        return self

    @property
    def policy(self) -> Policy:
        """What decides on the widths by these settings."""
        return (self.budget or self.price or self.auto or Auto()) if self.edit else Never()


def settings_from(given: Mapping[str, object], *, config: Path | None = None) -> Settings:
    """The settings in the file `config` (TOML or JSON), overruled by those given; both by field, tables nested.

    Raises SettingsError, which names the field and where it stands.
    """
    merged = _merged(_read(config) if config else {}, given)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        where = f" in {config} or on the command line" if config else ""
        raise SettingsError("; ".join(_complaint(e, where) for e in error.errors()[:3])) from error


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second one overruling the first, tables merged."""
    both = dict(below)
    for name, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(name, {}), Mapping)
        both[name] = _merged(both.get(name, {}), value) if nested else value
    return both


def _read(path: Path) -> dict[str, Any]:
    """The table in a TOML or JSON file. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else _toml(text, path)
    except OSError as error:
        raise SettingsError(
            f"cannot read the configuration {path}: {error.strerror}; name a TOML or JSON file"
        ) from error
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise SettingsError(f"the configuration {path} is no {kind}: {error}") from error
    if not isinstance(table, dict):
        raise SettingsError(f"the configuration {path} holds a {type(table).__name__}, expected names with values")
    return table


def _toml(text: str, path: Path) -> dict[str, Any]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError as error:  # Python 3.10 has no reader for TOML of its own
        raise SettingsError(
            f"reading {path} needs Python 3.11 or the package tomli: install it, or write JSON"
        ) from error
    return tomllib.loads(text)


def _complaint(error: Any, where: str) -> str:
    """One of pydantic's errors for a person: the field, what was wrong, what was got."""
    name = ".".join(map(str, error["loc"])) or "policy"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _field_names()
        leaf = name.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(name, known, n=2)
        return f"no setting is named {name!r}{where}; " + (
            f"did you mean {' or '.join(close)}?" if close else f"allowed are {', '.join(known)}"
        )
    if error["type"] == "value_error":
        return f"setting {name!r}{where}: {error['ctx']['error']}"
    message = str(error["msg"]).removeprefix("Input ")
    return f"setting {name!r}{where} {message}, got {error['input']!r}"


def _field_names() -> list[str]:
    """All settings, those of tables behind a dot."""
    tables = {"auto": fields(Auto), "budget": fields(Budget), "price": fields(Price), "effort": fields(Effort)}
    flat = [name for name in Settings.model_fields if name not in tables]
    return flat + [f"{table}.{f.name}" for table, found in tables.items() for f in found]


# ---- what comes out --------------------------------------------------------------------------------------------------


Moment = Literal["start", "batches", "review", "epoch"]
"""Why a report is made: training is about to start, some batches are done, a review took place, an epoch is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands.

    `data` tells splits and class counts in a line. `loss` is the mean training loss of this epoch so far, `accuracy`
    that of the last evaluation, None before it.
    `event` is the last review's, None before the first.
    """

    moment: Moment
    data: str
    epoch: int
    epochs: int
    step: int
    total_steps: int
    loss: float | None
    accuracy: float | None
    macs: int
    macs_start: int
    params: int
    params_start: int
    widths: dict[str, int]
    event: Event | None
    reviews: int
    seconds: float


Report = Callable[[Progress], None]
"""What is told how a run goes on."""


def _silent(progress: Progress) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with. Accuracy is a share, loss in nats per image, MACs those of one image.

    `part` says on which images accuracy and loss were measured. `seconds` is the wall time of the loop with its
    evaluations, `review_seconds` the part of it that reviews took, `cpu_seconds` the processor time of the loop, on
    which other processes of a busy machine weigh less. `latency_ms` is what a forward pass of one image takes, None
    where the policy does not bound it. `inserted_alive` counts inserted filters that are still there, `skipped` images
    that were left out because they cannot be read. `network` is the averaged copy where there is one.
    """

    model: str
    data: str
    part: str
    seed: int
    epochs: int
    accuracy: float
    loss: float
    macs: int
    macs_start: int
    params: int
    params_start: int
    latency_ms: float | None
    latency_ms_start: float | None
    removed: int
    inserted: int
    inserted_alive: int
    skipped: int
    reviews: int
    seconds: float
    cpu_seconds: float
    review_seconds: float
    device: str
    threads: int
    widths_start: dict[str, int]
    widths: dict[str, int]
    out: str | None
    network: nn.Module = field(repr=False, compare=False)
    channel_map: ChannelMap = field(repr=False, compare=False)
    history: History = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """All that JSON can hold: everything but the network and its channel map; of the history, its digest."""
        names = [f.name for f in fields(self) if f.name not in ("network", "channel_map", "history")]
        return {name: getattr(self, name) for name in names} | {"history": self.history.digest()}


# ---- the run ---------------------------------------------------------------------------------------------------------

EVALUATED = 1000
"""Images that are evaluated at once."""

PROBED = 256
"""Images that a review looks at together."""

PULSE = 20
"""Batches between two looks at the loss. A look waits for the accelerator, so it is not taken after every batch."""

SMALL = 16
"""Images with fewer pixels on a side are trained in one thread if nothing else is asked for: several threads gain
little on them, and on a busy machine they wait for each other most of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What takes the place of the settings' policy and of our criterion; as it stands, it changes nothing.

    policy: None for that of the settings. criterion: None for our worth. compensate: whether peers take over what is
    removed. rule: what is done to the weights while they train, until the policy's last review.
    """

    policy: Policy | None = None
    criterion: Criterion | None = None
    compensate: bool = True
    rule: TrainingRule | None = None


def train(
    settings: Settings,
    *,
    report: Report = _silent,
    method: Method | None = None,
    network: nn.Module | None = None,
    images: ImageSet | None = None,
) -> Result:
    """Trains a network by these settings and returns what came out; with `out` set, writes it there.

    `method` says otherwise where it says something; `network` is what training starts from, None for a fresh one as
    the settings name it; `images` are those that the settings name, for callers who hold them already. Seeds the
    global generators of Python, numpy and torch.

    Raises, before training: FolderError, DeviceError, ModelError, UnknownModelError, DataError, UnknownDataError,
    TraceError, BudgetError, NothingToResizeError. Raises FloatingPointError where a loss is not finite, and OSError
    where the disk refuses the result. The folder is then as it was before.
    """
    if settings.out is not None:
        check_folder(settings.out)
    device = find_device(settings.device)
    images = (images or load_images(settings)).to(device)
    _seed_everything(settings.seed)
    with _threads(settings.threads or (1 if min(images.image_shape[1:]) < SMALL else None)), _fitted_convolutions():
        network = (network or build_network(settings, images)).to(device)
        run = _Run(settings, images, network, method or Method())
        run.follow(report)
        result = run.result()
    if settings.out is not None:
        extra = {"settings": settings.model_dump(mode="json"), "result": result.as_json()}
        save(settings.out, result.network, history=result.history, channel_map=result.channel_map, extra=extra)
    return result


class _Run:
    """The loop and what it holds."""

    def __init__(self, settings: Settings, images: ImageSet, network: nn.Module, method: Method) -> None:
        policy = method.policy or settings.policy
        if isinstance(policy, Auto) and policy.samples is None:
            policy = replace(policy, samples=len(images.train))
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
        streams = isinstance(images.train.images, Pictures)
        self.at_once = settings.batch_size if streams else EVALUATED  # large images may not fit in more
        self.ruled = max(policy.reviews(self.total_steps), default=self.total_steps) if self.rule else 0
        one = torch.zeros(1, *images.image_shape, device=self.device)
        self.engine = AutoWidth(
            network, self.optimizer, example_inputs=torch.zeros(2, *images.image_shape, device=self.device),
            probe=probe_batches(images, settings.seed, min(PROBED, self.at_once)), loss_fn=self.loss_fn, policy=policy,
            total_steps=self.total_steps, effort=settings.effort, seed=settings.seed,
            followers=[] if self.average is None else [self.average],
            criterion=method.criterion, compensate=method.compensate,
            latency_inputs=one.contiguous(memory_format=self.format),
        )  # fmt: skip
        if settings.effort is None:
            seen, reviews = self.total_steps * settings.batch_size, len(policy.reviews(self.total_steps))
            self.engine.effort = Effort.fitting(seen, reviews, groups=len(self.engine.channel_map.groups))
        self.accuracy: float | None = None
        self.loss: float | None = None
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def follow(self, report: Report) -> None:
        """Trains, evaluates, reports after every epoch. Raises FloatingPointError for a loss that is not finite."""
        began, worked = time.perf_counter(), time.process_time()
        report(self._progress("start", 0, None))
        for epoch in range(1, self.settings.epochs + 1):
            total = torch.zeros((), device=self.device)
            for number, (x, y) in enumerate(self.batches, 1):
                total += self._step(x, y)
                event = self.engine.step()
                if event or number % PULSE == 0 or number == len(self.batches):
                    mean = _finite(total.item() / number, "training loss", self.engine.steps, self.settings.lr)
                    self.seconds = time.perf_counter() - began
                    report(self._progress("review" if event else "batches", epoch, mean))
            if self.rule and self.engine.steps < self.ruled:
                self.rule.after_epoch(self.network, self.engine.channel_map, self.engine.steps / self.ruled)
            if self._looks_after(epoch):
                batches = self.images.plain_batches(self.part, self.at_once)
                self.accuracy, self.loss = evaluate(self.outcome, batches, self.format)
                _finite(self.loss, f"loss on the {self.part} images", self.engine.steps, self.settings.lr)
            self.seconds, self.cpu_seconds = time.perf_counter() - began, time.process_time() - worked
            report(self._progress("epoch", epoch, mean))

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
            total_steps=self.total_steps, loss=loss, accuracy=self.accuracy, macs=engine.macs,
            macs_start=engine.macs_start, params=engine.params, params_start=engine.params_start,
            widths=engine.widths, seconds=self.seconds, reviews=len(engine.history),
            event=engine.history.events[-1] if len(engine.history) else None,
        )  # fmt: skip

    def result(self) -> Result:
        """What came out, once `follow` has returned."""
        engine, history, settings = self.engine, self.engine.history, self.settings
        assert self.accuracy is not None and self.loss is not None, "no epoch has been evaluated"
        return Result(
            model=settings.model, data=self.images.name, part=self.part, seed=settings.seed, epochs=settings.epochs,
            accuracy=self.accuracy, loss=self.loss, macs=engine.macs, macs_start=engine.macs_start,
            params=engine.params, params_start=engine.params_start, latency_ms=engine.latency_ms,
            latency_ms_start=engine.latency.measured if engine.latency else None, removed=history.removed_total,
            inserted=history.inserted_total, inserted_alive=history.inserted_alive,
            skipped=len(self.images.skipped), reviews=len(history),
            seconds=self.seconds, cpu_seconds=self.cpu_seconds, review_seconds=engine.review_seconds,
            device=str(self.device), threads=torch.get_num_threads(), widths_start=history.widths_start,
            widths=engine.widths,
            out=None if settings.out is None else str(settings.out),
            network=self.outcome, channel_map=engine.channel_map, history=history,
        )  # fmt: skip


# ---- its parts -------------------------------------------------------------------------------------------------------


def one_cycle(progress: float, warmup: float) -> float:
    """Share of the peak learning rate after this share of the run: a straight rise, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def decayed_and_not(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights with decay, and norms and biases (one dim or none) without."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def probe_batches(images: ImageSet, seed: int, batch_size: int = PROBED) -> Batches:
    """Training images for reviews: not augmented, and shuffled by a generator that training does not share."""
    return Batches(
        images.train, batch_size=min(batch_size, len(images.train)), mean=images.mean, std=images.std, seed=seed + 2**32
    )


def evaluate(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], memory_format: torch.memory_format
) -> tuple[float, float]:
    """(Share of images that are classified rightly, mean cross-entropy in nats), in evaluation mode and float32."""
    network.eval()
    sums: list[Tensor] = []  # read at the end: a look at each would wait for the accelerator
    count = 0
    with torch.no_grad():
        for x, y in batches:
            scores = network(x.contiguous(memory_format=memory_format)).float()
            right = (scores.argmax(1) == y).sum()
            sums.append(torch.stack([right, F.cross_entropy(scores, y, reduction="sum")]).double())
            count += len(y)
    right_ones, total = sum(sums[1:], start=sums[0]).tolist()
    return right_ones / count, total / count


def load_images(settings: Settings) -> ImageSet:
    """The image set that the settings name. Raises as `autowidth.lab.data.load` does."""
    return load(
        settings.data, holdout=settings.holdout, limit=settings.limit, pool=settings.pool, size=settings.size,
        skip_corrupt=settings.skip_corrupt, stream_above=settings.stream_above, workers=settings.workers,
    )  # fmt: skip


def build_network(settings: Settings, images: ImageSet) -> nn.Module:
    """The starting network for these images, fresh weights out of the global generator, on the CPU.

    Raises UnknownModelError for a name that leads nowhere, ModelError where the network cannot be built or does not
    give one score per class.
    """
    channels, height, width = images.image_shape
    name, classes = settings.model, len(images.classes)
    if ":" not in name and min(height, width) < (least := spec(name).smallest):
        fitting = ", ".join(k for k, s in MODELS.items() if s.smallest <= min(height, width)) or "none built in"
        raise ModelError(
            f"{name} needs images of at least {least} x {least}, those of {images.name} are {height} x {width}; "
            f"models that take them: {fitting}"
        )
    try:
        network = resolve(name, num_classes=classes, in_channels=channels, width=settings.width)
    except UnknownModelError:
        raise
    except Exception as error:  # it is the user's code that runs here
        raise ModelError(f"cannot build the model {name}: {type(error).__name__}: {error}") from error
    _check_scores(name, network, torch.zeros(2, channels, height, width), classes)
    return network


def _check_scores(name: str, network: nn.Module, example: Tensor, classes: int) -> None:
    """Raises ModelError where the network does not turn images into one score per class."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            scores = network(example)
    except Exception as error:  # it is the user's code that runs here
        raise ModelError(
            f"{name} does not run on images of shape {tuple(example.shape)}: {type(error).__name__}: {error}"
        ) from error
    network.train(training)
    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if got != (len(example), classes):
        raise ModelError(
            f"{name} returns {got} for images of shape {tuple(example.shape)}, expected a tensor of shape "
            f"{(len(example), classes)}: one score per class"
        )


def find_device(text: str) -> torch.device:
    """The device of this name; `auto` is cuda where there is one. Raises DeviceError."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {text!r} is not known here; allowed are auto, cpu, cuda and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA device{'' if count == 1 else 's'}"
        raise DeviceError(f"device {text!r} is not there: torch {torch.__version__} sees {found}; use cpu or auto")
    return device


def check_folder(out: Path) -> None:
    """Raises FolderError where a run cannot be written to `out`, or where something that is no run lies there.

    Leaves nothing behind, not even the folder.
    """
    if out.exists() and not out.is_dir():
        raise FolderError(f"cannot write a run to {out}: it is a file; name a folder")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        names = [] if missing else os.listdir(out)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise FolderError(f"cannot write a run to {out}: {error.strerror}; name a folder you may write to") from error
    finally:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()
    # Files with such names are a run, or what a run left whose saving was cut short.
    if names and not any(file in name for name in names for file in (RUN, MODEL, HISTORY)):
        raise FolderError(
            f"{out} is not empty and holds no {RUN}, so it is no folder of a run: name a new or an empty folder"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """This many CPU threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _fitted_convolutions() -> Iterator[None]:
    """Lets cuDNN time its algorithms for every new shape, and afterwards is as it was. Without effect on a CPU.

    Between two reviews all shapes stay the same, so that what the search takes is soon won back.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compiled(loss_of: Callable[[Tensor, Tensor], Tensor], model: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The same function, compiled for each shape when it is first called. Calls raise ModelError where it cannot be."""
    from torch._dynamo.exc import TorchDynamoException  # here: half a second to import

    quick = torch.compile(loss_of, dynamic=False)

    def called(x: Tensor, y: Tensor) -> Tensor:
        try:
            return quick(x, y)
        except TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"torch cannot compile {model} here: {reason}; train with compile = false") from error

    return called


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _finite(loss: float, what: str, step: int, lr: float) -> float:
    """The loss itself. Raises DivergedError where it is not finite."""
    if not math.isfinite(loss):
        raise DivergedError(f"the {what} is {loss} at step {step}: training has diverged; lower lr, which is {lr:g}")
    return loss
