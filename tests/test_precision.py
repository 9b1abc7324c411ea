"""Mixed precision: reviews under autocast, with a GradScaler, and of networks whose weights are half precision."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.engine import AutoWidth
from autowidth.history import Event
from autowidth.lab.data import digits
from autowidth.lab.models import build
from autowidth.policy import Budget, Decision, Limits, Schedule, Situation, Start, Unit
from autowidth.review.effort import Effort

pytestmark = pytest.mark.filterwarnings("error")

CE = F.cross_entropy
HALVES = (torch.bfloat16, torch.float16)
EFFORT = Effort(probe_samples=256, audit_samples=256, audit_filters=8)


@functools.cache
def data() -> list[tuple[Tensor, Tensor]]:
    return list(digits(limit=640).plain_batches("train", 64))


@functools.cache
def trained() -> nn.Module:
    """A ResNet-8 after four epochs: its worths are of all sizes."""
    torch.manual_seed(0)
    model = build("resnet8", in_channels=1, width=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data() * 4:
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return model


@dataclass(frozen=True)
class Spy:
    """A policy that looks and decides nothing."""

    seen: list[Situation] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    unit: Unit = "macs"
    aim: str = "to look"

    def check(self, start: Start) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        return (1,)

    def decide(self, situation: Situation) -> Decision:
        self.seen.append(situation)
        return Decision(plan={})


def reviewed(
    *,
    dtype: torch.dtype | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **loss: Any,
) -> tuple[np.ndarray, Event]:
    """All worths, nats per sample, and the event of a review inside of `around`, where a batch has been trained on."""
    model = copy.deepcopy(trained()).to(dtype or torch.float32)
    batches = [(x.to(dtype or torch.float32), y) for x, y in data()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    spy = Spy()
    engine = AutoWidth(
        model, optimizer, example_inputs=batches[0][0][:2], probe=batches, policy=spy, total_steps=4, effort=EFFORT,
        **(loss or {"loss_fn": CE}),
    )  # fmt: skip
    with around():
        CE(model(batches[0][0]).float(), batches[0][1]).backward()  # an autocast block now holds casts of the weights
        optimizer.step()
        event = engine.step()
    assert event is not None
    return np.concatenate([group.worth for group in spy.seen[0].groups]), event


@functools.cache
def single() -> tuple[np.ndarray, Event]:
    return reviewed()


def difference(worths: np.ndarray) -> float:
    """How far worths are off those in float32: the sum of all differences, as a share of the sum of all worths."""
    return float(np.abs(worths - single()[0]).sum() / single()[0].sum())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_review_inside_of_an_autocast_block_is_the_one_outside(dtype: torch.dtype) -> None:
    worths, event = reviewed(around=lambda: torch.autocast("cpu", dtype))
    assert (worths == single()[0]).all()
    assert event.fidelity == single()[1].fidelity
    assert event.loss == single()[1].loss


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outer", [False, True])
def test_a_loss_that_opens_an_autocast_block_of_its_own_gives_nearly_the_same_worths(
    dtype: torch.dtype, outer: bool
) -> None:
    """Its casts of the weights would hide every ablation if they were kept from one question to the next."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):
            return CE(model(batch[0]), batch[1])

    around = (lambda: torch.autocast("cpu", dtype)) if outer else nullcontext
    worths, event = reviewed(loss=loss, around=around)
    assert difference(worths) < 0.05
    assert event.fidelity is not None and event.fidelity.slope is not None
    assert event.fidelity.slope > 1  # ablations were seen: nothing else makes the loss rise


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.05), (torch.bfloat16, 0.1)])
def test_a_network_of_half_precision_throughout_is_judged(dtype: torch.dtype, bound: float) -> None:
    worths, event = reviewed(dtype=dtype)
    assert difference(worths) < bound
    assert event.fidelity is not None
    assert event.loss == pytest.approx(single()[1].loss, rel=0.02)


def test_small_gradients_survive_float16() -> None:
    """Without a scale most of these gradients are below the smallest number of float16, and worths are zero."""

    def faint(model: nn.Module, batch: tuple[Tensor, Tensor], *, autocast: bool = True) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return CE(model(batch[0]), batch[1]) / 4096

    expected, _ = reviewed(loss=functools.partial(faint, autocast=False))
    worths, _ = reviewed(loss=faint)
    assert np.abs(worths - expected).sum() < 0.1 * np.abs(expected).sum()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_training_with_a_scaler_goes_on_through_reviews(dtype: torch.dtype, inside: bool) -> None:
    """The scale, its growth and a step that was left out are the same with and without reviews."""

    def run(reviews: bool) -> tuple[list[float], AutoWidth]:
        model = copy.deepcopy(trained())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        policy = Budget(macs=0.6, schedule=Schedule(count=4 if reviews else 1, begin=0.2, end=0.9))
        engine = AutoWidth(
            model, optimizer, example_inputs=data()[0][0][:2], probe=data(), loss_fn=CE, policy=policy,
            total_steps=10, effort=EFFORT,
        )  # fmt: skip
        scales = []
        for number, (x, y) in enumerate(data()):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = CE(model(x), y) * (float("inf") if number == 4 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            with torch.autocast("cpu", dtype) if inside else nullcontext():
                engine.step()
            scales.append(scaler.get_scale())
        return scales, engine

    (scales, engine), (plain, _) = run(True), run(False)
    assert scales == plain
    assert scales[4] == scales[3] / 2
    assert engine.steps == len(data()) - 1  # the step that was left out counts for nothing
    assert engine.macs <= 0.6 * engine.macs_start
    assert all(torch.isfinite(p).all() for p in engine.model.parameters())
