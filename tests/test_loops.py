"""The engine in the loops that people have: accumulation, mixed precision, compiled models; misplaced calls refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from autowidth.boundaries import LoopError
from autowidth.engine import DROPPED, AutoWidth, resize_
from autowidth.lab.data import digits
from autowidth.policy import Budget, Schedule
from autowidth.review.effort import Effort

pytestmark = pytest.mark.filterwarnings("error")

CE = F.cross_entropy
Batch = tuple[Tensor, Tensor]
DATA: list[Batch] = list(digits(limit=512).plain_batches("train", 64))
IMAGE = torch.zeros(1, 1, 8, 8)
EFFORT = Effort(probe_samples=128, audit_samples=128, audit_filters=4)


class Small(nn.Module):
    """Two convolutions with norms: small enough to be compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def attached(model: nn.Module, optimizer: Any, total_steps: int = 8, **options: Any) -> AutoWidth:
    """An engine that reviews at every step from the second on, while it is not said otherwise."""
    options.setdefault("policy", Budget(macs=0.5, schedule=Schedule(count=total_steps, begin=0.2, end=1.0)))
    options.setdefault("loss_fn", None if "loss" in options else CE)
    return AutoWidth(
        model, optimizer, example_inputs=IMAGE, probe=DATA[:4], total_steps=total_steps, effort=EFFORT, **options
    )


def stream() -> Iterator[Batch]:
    while True:
        yield from DATA


# ---- where in the loop -----------------------------------------------------------------------------------------------


def test_calls_for_every_micro_batch_review_only_where_gradients_have_been_used() -> None:
    """The same network comes out as where the engine is called once behind every optimizer step."""

    def run(always: bool) -> tuple[list[int], list[int], dict[str, Tensor]]:
        model = small()
        optimizer, batches, reviewed = sgd(model), stream(), []
        engine = attached(model, optimizer, 6)
        for number in range(1, 25):
            x, y = next(batches)
            (CE(model(x), y) / 4).backward()
            boundary = number % 4 == 0
            if boundary:
                optimizer.step()
            event = engine.step() if always or boundary else None
            if event is not None:
                reviewed.append(number)
            if boundary:
                optimizer.zero_grad()
        assert engine.steps == 6
        return reviewed, list(engine.widths.values()), model.state_dict()

    (seen, widths, weights), (seen_once, widths_once, weights_once) = run(True), run(False)
    assert seen == seen_once
    assert seen and all(number % 4 == 0 for number in seen)
    assert widths == widths_once
    assert all(torch.equal(weights[name], weights_once[name]) for name in weights)


def test_a_review_in_front_of_the_optimizer_step_says_what_it_drops() -> None:
    model = small()
    optimizer = sgd(model)
    engine = attached(model, optimizer)

    def misplaced(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        CE(model(x), y).backward()
        engine.step()
        optimizer.step()

    misplaced(*DATA[0])
    for batch in DATA[1:3]:
        with pytest.warns(UserWarning, match=r"gradients that no optimizer has used, and a review drops them: call it"):
            misplaced(*batch)
    misplaced(*DATA[3])
    assert len(engine.history)
    assert all(event.notes[0] == DROPPED for event in engine.history)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_used_and_zeroed_gradients_are_nothing_that_is_dropped(set_to_none: bool) -> None:
    model = small()
    optimizer = sgd(model)
    engine = attached(model, optimizer)
    for x, y in DATA:
        CE(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        engine.step()
    assert engine.steps == len(DATA)
    assert len(engine.history) > 4
    assert not any(DROPPED in event.notes for event in engine.history)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_review_between_forward_and_backward_is_refused(autocast: bool) -> None:
    model = small()
    optimizer = sgd(model)
    engine = attached(model, optimizer)
    before = engine.widths
    for x, y in DATA:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = CE(model(x), y)
        if engine.steps == 1:
            with pytest.raises(LoopError, match=r"a forward pass since the last optimizer step waits for its backward"):
                engine.step()
            break
        engine.step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.widths == before
    loss.backward()  # and still can


def test_graphs_that_no_one_goes_back_through_do_no_harm() -> None:
    """Losses and outputs that are kept, with their graphs, from earlier steps."""
    model = small()
    optimizer, kept = sgd(model), []
    engine = attached(model, optimizer)
    for x, y in DATA:
        kept.append(model(x).mean())  # looked at without torch.no_grad
        kept.append(CE(model(x), y))
        kept[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    assert any(event.maps for event in engine.history)
    assert all(math.isfinite(float(value.detach())) for value in kept)


def test_a_backward_pass_through_a_graph_from_before_the_review_is_refused() -> None:
    """A network without a norm under autocast: its graph keeps copies only, so that the review cannot see it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    optimizer = sgd(model)
    engine = attached(model, optimizer, 4)
    (x, y), *_ = DATA
    for _ in range(2):
        CE(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = CE(model(x), y)
        event = engine.step()
    assert event is not None and event.maps
    with pytest.raises(LoopError, match=r"from before the review at step 2, which has changed the widths"):
        loss.backward()
    CE(model(x), y).backward()


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    model = small()
    optimizer = sgd(model)
    engine = attached(model, optimizer, 4)
    with torch.inference_mode():
        with pytest.raises(LoopError, match=r"engine.step\(\) is called inside of torch.inference_mode"):
            engine.step()
        with pytest.raises(LoopError, match=r"engine.review\(\) is called inside"):
            engine.review()
        with pytest.raises(LoopError, match=r"resize_ is called inside"):
            resize_(model, {}, example_inputs=IMAGE)
        with pytest.raises(LoopError, match=r"AutoWidth\(...\) is called inside"):
            attached(small(), optimizer)
    with torch.no_grad():
        assert engine.review().maps


def test_a_second_engine_is_refused_while_the_first_is_under_way() -> None:
    model = small()
    optimizer = sgd(model)
    first, second = attached(model, optimizer), attached(model, optimizer)
    x, y = DATA[0]
    CE(model(x), y).backward()
    optimizer.step()
    first.step()
    words = r"Small has an engine already, at step 1 of 8 and with \d reviews ahead, .* call abandon\(\) of the other"
    with pytest.raises(LoopError, match=words):
        attached(model, optimizer)
    with pytest.raises(LoopError, match=words):
        second.step()
    first.abandon()
    second.step()


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_event_says_how_many_bytes_surgery_gives_back(kind: type[torch.optim.Optimizer]) -> None:
    """Counted by hand: four bytes for each number of the model, its two moments or one, and its averaged copy."""
    model = small()
    optimizer = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    average = AveragedModel(model)
    engine = attached(model, optimizer, followers=[average])

    def counted() -> int:
        numbers, steps = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        state = numbers * 4 if kind is torch.optim.SGD else 2 * numbers * 4 + steps * 4
        return numbers * 4 + buffers + state + numbers * 4 + buffers + 8  # the copy counts its updates

    expected = 0
    for x, y in DATA[:4]:
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        expected = counted()
        event = engine.step()
        if event is not None:
            assert event.memory == {"before": expected, "after": counted()}
    assert event is not None
    assert engine.history.events[0].memory["before"] > engine.history.events[-1].memory["after"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_accelerator_gets_back_what_surgery_frees() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4096, 3), nn.ReLU(), nn.Conv2d(4096, 4096, 3), nn.ReLU(), nn.Conv2d(4096, 8, 1))
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).cuda()
    optimizer = sgd(model)
    data = [(x[:8].cuda(), y[:8].cuda()) for x, y in DATA]
    engine = AutoWidth(
        model, optimizer, example_inputs=IMAGE.cuda(), probe=data, loss_fn=CE, policy=Budget(macs=0.3), total_steps=4,
        effort=Effort(probe_samples=8, audit_samples=8, audit_filters=1),
    )  # fmt: skip
    CE(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    memory = engine.review().memory
    freed = memory["before"] - memory["after"]
    assert freed > 0
    assert memory["reserved_before"] - memory["reserved"] > freed / 2
    assert memory["peak"] >= memory["before"]
