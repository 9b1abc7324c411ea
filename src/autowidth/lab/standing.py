"""Where the loop stands: epochs, batches, losses, seconds; what it needs to go on."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Standing:
    """Counters of a run that is going on, with a state that goes into a save.

    epoch: epochs that are over. batch: batches of the next one that are done. counted: those of them whose loss went
    into `total`. accuracy, loss: of the last evaluation, None before it. accuracy_start: of weights that were brought.
    evaluated_well: whether the last evaluation was finite. ruled: epochs after which the rule of a method was applied.
    """

    epoch: int = 0
    batch: int = 0
    counted: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    accuracy: float | None = None
    loss: float | None = None
    accuracy_start: float | None = None
    evaluated_well: bool = True
    ruled: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _clocks: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """Lets the clocks go on from the seconds that there are already."""
        self._clocks = (time.perf_counter() - self.seconds, time.process_time() - self.cpu_seconds)

    def measure(self) -> None:
        """Reads the clocks."""
        wall, worked = self._clocks
        self.seconds, self.cpu_seconds = time.perf_counter() - wall, time.process_time() - worked

    def add(self, loss: Tensor) -> None:
        """Counts the loss of a step, a scalar, for the mean of the epoch."""
        self.total = self.total.to(loss.device) + loss
        self.counted += 1

    def mean(self) -> float:
        """The mean training loss of this epoch so far, nats per image."""
        return self.total.item() / max(self.counted, 1)

    def next_epoch(self) -> None:
        """One more epoch is over."""
        self.epoch, self.batch, self.counted, self.total = self.epoch + 1, 0, 0, torch.zeros(())
        self.measure()

    def state_dict(self) -> dict[str, Any]:
        """All counters, in numbers and one tensor."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from these counters. Raises KeyError where one is missing."""
        for name in self.state_dict():
            setattr(self, name, state[name])
