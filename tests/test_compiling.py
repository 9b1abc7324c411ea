"""When the laboratory compiles: against a clock that is told what steps and compiling take."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from autowidth.lab.compiling import EAGER, PER_LAYER, PacedLoss


@dataclass
class World:
    """Seconds of an eager step, of a compiled one, and of compiling; what was called."""

    eager: float
    quick: float
    compiling: float
    now: float = 0.0
    made: bool = False
    called: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.now += self.eager
        self.called.append("eager")
        return x

    def compiler(self, loss: object, model: str) -> object:
        def quick(x: Tensor, y: Tensor) -> Tensor:
            self.now += self.quick + (0 if self.made else self.compiling)
            self.made = True
            self.called.append("quick")
            return x

        return quick

    def run(self, steps: int, *, share: float = 0.1, layers: int = 10, reviews: int = 0) -> PacedLoss:
        """A run with so many changes of the widths, evenly spaced."""
        length, done = steps // (reviews + 1), 0
        paced = PacedLoss(
            self.loss, model="net", share=share, layers=layers, total_steps=steps, clock=lambda: self.now,
            ahead=lambda: length - done % length, compiler=self.compiler, say=self.told.append,  # type: ignore[arg-type]
        )  # fmt: skip
        one = torch.ones(1)
        for done in range(steps):
            if done and done % length == 0:
                self.made = False
                paced.anew()
            paced(one, one)
        return paced


def test_a_short_run_is_not_compiled_and_says_why() -> None:
    world = World(eager=0.01, quick=0.005, compiling=40)
    assert world.run(3000, reviews=3).seconds == 0
    assert set(world.called) == {"eager"}
    (sentence,) = world.told
    assert f"not compiled: that takes about {10 * PER_LAYER:.0f} s, and 10% of a run of about 30 s" in sentence


def test_a_long_run_is_compiled_after_every_change_of_widths() -> None:
    world = World(eager=0.1, quick=0.05, compiling=30)
    paced = world.run(90_000, reviews=8)
    assert paced.seconds == pytest.approx(9 * 30, rel=0.01)
    assert world.called.count("eager") == EAGER
    assert paced.seconds < 0.1 * world.now


def test_compiling_stops_when_its_share_is_used_up() -> None:
    world = World(eager=0.1, quick=0.04, compiling=90)
    paced = world.run(45_000, reviews=8)
    assert paced.seconds == pytest.approx(2 * 90, rel=0.01)
    assert world.called.count("eager") > 30_000
    assert paced.seconds < 0.1 * world.now


def test_nothing_is_compiled_for_a_few_steps() -> None:
    """Twenty seconds are not won back in the 100 steps between two reviews."""
    world = World(eager=0.1, quick=0.05, compiling=20)
    assert world.run(20_000, reviews=199).seconds == 0


def test_without_a_share_it_is_compiled_from_the_first_step_on() -> None:
    world = World(eager=0.01, quick=0.005, compiling=40)
    assert world.run(20, share=1, reviews=1).seconds == pytest.approx(80, rel=0.01)
    assert set(world.called) == {"quick"}
