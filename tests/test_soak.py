"""Very many reviews whose plans are drawn by chance: nothing leaks, nothing drifts, the history says what is there."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth import AutoWidth, Effort, History, IndexMap
from autowidth.policy import Decision, Limits, Schedule, Situation, Start
from test_checkpoint import block

WIDEST = 10
"""Channels that a group of the network may come to have."""


class Small(nn.Module):
    """A stem, a block with a shortcut, a depthwise convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = block(3, 6), block(6, 5), block(5, 6)
        self.wide, self.depthwise = block(6, 7), block(7, 7, groups=7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(x))
        return self.head(self.depthwise(self.wide(x)).mean((2, 3)))


@dataclass(kw_only=True)
class ByChance:
    """Reviews after every step, and removes, inserts, repeats and permutes channels of some groups by chance."""

    chance: random.Random
    schedule: Schedule = field(default_factory=Schedule)
    limits: Limits = field(default_factory=Limits)
    unit: str = "macs"
    aim: str = "drawn by chance"

    def check(self, start: Start) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        return tuple(range(1, total_steps + 1))

    def decide(self, situation: Situation) -> Decision:
        names = [name for name in situation.widths if self.chance.random() < 0.5]
        return Decision(plan={name: self.drawn(situation.widths[name]) for name in names})

    def drawn(self, width: int) -> IndexMap:
        """Any index map from this width to one of 2 to `WIDEST`."""
        kept = self.chance.sample(range(width), self.chance.randint(1, width))
        if self.chance.random() < 0.8:
            kept.sort()
        more = [self.chance.choice((-1, -1, -1, *kept)) for _ in range(self.chance.randint(0, 4))]
        source = (*kept, *more, *(-1,) * (2 - len(kept) - len(more)))[:WIDEST]
        return IndexMap(source, width)


def resident() -> float:
    """Memory of this process now, in MB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What was found after one review."""

    step: int
    widths: dict[str, int]
    loss: float


class Soak:
    """A network that is trained with a review after every step, with an EMA copy and Adam."""

    def __init__(self, count: int, history: Path) -> None:
        torch.manual_seed(0)
        self.model, self.follower = Small(), Small()
        self.follower.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        draw = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(8, 3, 6, 6, generator=draw), torch.randint(0, 4, (8,), generator=draw)) for _ in range(4)
        ]
        self.engine = AutoWidth(
            self.model, self.optimizer, example_inputs=self.batches[0][0][:2], probe=self.batches[:2],
            loss_fn=F.cross_entropy, policy=ByChance(chance=random.Random(2)), total_steps=count,
            followers=[self.follower], effort=Effort(probe_samples=8, audit_samples=8, audit_filters=1),
            history=history,
        )  # fmt: skip
        self.count = count

    def moments(self) -> Iterator[Moment]:
        """Trains, and yields what is there after each review."""
        for step in range(1, self.count + 1):
            x, y = self.batches[step % len(self.batches)]
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.engine.step()
            self.check_state()
            yield Moment(step=step, widths=self.live(), loss=loss.item())

    def live(self) -> dict[str, int]:
        """The widths that the tensors themselves have."""
        weights = {name: len(tensor) for name, tensor in self.model.named_parameters()}
        return {name: weights[f"{name}.weight"] for name in self.engine.widths}

    def check_state(self) -> None:
        """Optimizer and EMA copy have the shapes of the parameters, and everything is finite."""
        parameters = dict(self.model.named_parameters())
        assert {id(p) for p in parameters.values()} == {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        for name, parameter in self.follower.named_parameters():
            assert parameter.shape == parameters[name].shape
        for parameter in parameters.values():
            state = self.optimizer.state[parameter]
            for value in (parameter, state["exp_avg"], state["exp_avg_sq"]):
                assert value.shape == parameter.shape
                assert torch.isfinite(value).all()
            assert (state["exp_avg_sq"] >= 0).all()
        assert len(self.optimizer.state) == len(parameters)


def soaked(count: int, place: Path) -> list[float]:
    """Runs that many reviews and checks each; returns the memory after each tenth of them, in MB."""
    soak = Soak(count, place / "history.jsonl")
    seen, memory = [], []
    for moment in soak.moments():
        assert moment.widths == soak.engine.widths
        assert math.isfinite(moment.loss)
        seen.append((moment.step, moment.widths))
        if moment.step % (count // 10) == 0:
            memory.append(resident())
    assert list(soak.engine.history.replay()) == seen
    assert list(History.read(place / "history.jsonl").replay()) == seen
    assert len({tuple(widths.values()) for _, widths in seen}) > min(count / 3, 300)  # there are 729
    events = soak.engine.history.events
    print(
        f"{len(events)} reviews, {soak.engine.history.removed_total} channels removed, "
        f"{soak.engine.history.inserted_total} inserted, {sum(e.seconds_total for e in events):.0f} s; "
        f"memory {', '.join(f'{m:.0f}' for m in memory)} MB"
    )
    return memory


def test_thirty_reviews_with_random_plans(tmp_path: Path) -> None:
    soaked(30, tmp_path)


@pytest.mark.slow
def test_two_thousand_reviews_with_random_plans_take_no_more_memory(tmp_path: Path) -> None:
    memory = soaked(2000, tmp_path)
    assert max(memory[1:]) <= 1.05 * memory[0]
