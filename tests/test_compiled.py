"""Compiled models: they stay compiled through surgery, reviews look through what is compiled, EMA copies follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autowidth.channels import IndexMap
from autowidth.checkpoint import load_, save
from autowidth.cost import count_macs
from autowidth.engine import AutoWidth, resize_
from autowidth.lab.data import digits
from autowidth.policy import Budget, Schedule
from autowidth.review.effort import Effort
from autowidth.shrink import shrink_
from autowidth.trace import trace
from autowidth.unwrapping import inner_model

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # torch's own, when it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch compiles a part, and warns of itself
]

CE = F.cross_entropy
DATA: list[tuple[Tensor, Tensor]] = list(digits(limit=256).plain_batches("train", 32))
IMAGE = torch.zeros(2, 1, 8, 8)


class Net(nn.Module):
    """Three convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        out: Tensor = self.head(F.relu(self.third(x)).mean((2, 3)))
        return out


class Counter:
    """A backend of torch.compile that runs the graph as it is, and counts: graphs made, and times that one has run."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, **options: Any) -> AutoWidth:
    """An engine that reviews at every step but the first."""
    return AutoWidth(
        model, optimizer, example_inputs=IMAGE, probe=DATA[:3], loss_fn=CE, total_steps=total_steps,
        policy=Budget(macs=0.3, schedule=Schedule(count=total_steps - 1, begin=1.5 / total_steps, end=1.0)),
        effort=Effort(probe_samples=64, audit_samples=32, audit_filters=2), **options,
    )  # fmt: skip


def whole(model: nn.Module, counter: Counter) -> tuple[nn.Module, Callable[..., Tensor]]:
    compiled: Any = torch.compile(model, backend=counter)
    return compiled, compiled


def in_place(model: nn.Module, counter: Counter) -> tuple[nn.Module, Callable[..., Tensor]]:
    model.compile(backend=counter)
    return model, model


def in_part(model: nn.Module, counter: Counter) -> tuple[nn.Module, Callable[..., Tensor]]:
    model.second = torch.compile(model.second, backend=counter)  # type: ignore[assignment]
    return model, model


def around(model: nn.Module, counter: Counter) -> tuple[nn.Module, Callable[..., Tensor]]:
    called: Callable[..., Tensor] = torch.compile(lambda x: model(x), backend=counter)
    return model, called


@pytest.mark.parametrize("way", [whole, in_place, in_part, around])
def test_a_compiled_model_stays_compiled_through_more_surgeries_than_torch_bears(way: Any) -> None:
    counter = Counter()
    model, forward = way(net(), counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    engine = attached(model, optimizer, 13, followers=[])
    surgeries = 0
    for x, y in [*DATA, *DATA][:13]:
        ran = counter.ran
        optimizer.zero_grad()
        CE(forward(x), y).backward()
        assert counter.ran == ran + 1, f"after {surgeries} surgeries the model is not compiled any more"
        optimizer.step()
        seen = counter.made, counter.ran
        event = engine.step()
        assert (counter.made, counter.ran) == seen  # a review compiles nothing, and runs what was written
        surgeries += bool(event and event.maps)
    assert surgeries > torch._dynamo.config.recompile_limit
    assert engine.model is inner_model(model)


def test_a_compiled_run_with_an_averaged_copy_is_the_eager_run() -> None:
    def run(compiled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, int]]]:
        counter, model = Counter(), net()
        given: Any = torch.compile(model, backend=counter) if compiled else model
        average = AveragedModel(given, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.AdamW(given.parameters(), lr=3e-3)
        engine = attached(given, optimizer, 6, followers=[average])
        for x, y in DATA[:6]:
            optimizer.zero_grad()
            CE(given(x), y).backward()
            optimizer.step()
            average.update_parameters(given)
            engine.step()
        assert counter.ran == (6 if compiled else 0)
        assert any(event.maps for event in engine.history)
        assert average(IMAGE).shape == (2, 10)
        return (
            inner_model(given).state_dict(),
            inner_model(average.module).state_dict(),
            [event.widths for event in engine.history],
        )

    for of_compiled, of_eager in zip(run(True), run(False), strict=True):
        if isinstance(of_eager, list):
            assert of_compiled == of_eager
        else:
            assert of_compiled.keys() == of_eager.keys()
            assert all(torch.allclose(of_compiled[k], of_eager[k], atol=1e-6) for k in of_eager)


def test_every_door_looks_through_a_compiled_model(tmp_path: Path) -> None:
    model, counter = net(), Counter()
    compiled: Any = torch.compile(model, backend=counter)
    assert trace(compiled, IMAGE) == trace(net(), IMAGE)
    assert count_macs(compiled, IMAGE) == count_macs(net(), IMAGE)
    resize_(compiled, {"first": IndexMap.removing([0, 1], 16)}, example_inputs=IMAGE)
    assert model.first.out_channels == 14
    shrink_(compiled, example_inputs=IMAGE, batches=DATA, loss_fn=CE, policy=Budget(macs=0.6), reviews=1)
    assert counter.made == 0
    save(tmp_path / "run", compiled)
    fresh = net()
    again: Any = torch.compile(fresh, backend=counter)
    load_(again, tmp_path / "run", example_inputs=IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(again.eval()(DATA[0][0]), compiled.eval()(DATA[0][0]))
    assert counter.ran == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_inductor_keeps_up_with_surgery() -> None:
    """With torch's own backend, about a minute: the compiled network is the one that surgery has left."""
    model = net()
    compiled: Any = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    engine = attached(compiled, optimizer, 4)
    for x, y in DATA[:4]:
        optimizer.zero_grad()
        loss = CE(compiled(x), y)
        assert loss.item() == pytest.approx(CE(copy.deepcopy(model).train()(x), y).item(), rel=1e-4)
        loss.backward()
        optimizer.step()
        engine.step()
    assert engine.macs < engine.macs_start
