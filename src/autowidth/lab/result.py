"""How a run stands while it goes on, and what it ended with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch import nn

from autowidth.channels import ChannelMap
from autowidth.history import Event, History

_log = logging.getLogger(__name__)

Moment = Literal["start", "batches", "review", "epoch", "notice"]
"""Why a report is made: training is about to start, some batches are done, a review took place, an epoch is over,
something is to be told that is not as usual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands.

    `data` names splits and class counts in a line. `loss` is the mean training loss of this epoch so far, `accuracy`
    that of the last evaluation, None before it; `accuracy_start` that of weights that were brought, before training.
    `event` is the last review's, None before the first. `notice` is the sentence that is to be told, if one is.
    """

    moment: Moment
    data: str
    epoch: int
    epochs: int
    step: int
    total_steps: int
    loss: float | None
    accuracy: float | None
    accuracy_start: float | None = None
    macs: int
    macs_start: int
    params: int
    params_start: int
    widths: dict[str, int]
    event: Event | None
    reviews: int
    seconds: float
    notice: str | None = None


Report = Callable[[Progress], None]
"""What is called as a run goes on."""


def silent(progress: Progress) -> None:
    """Tells nobody how a run goes on; what is not as usual is logged."""
    if progress.notice is not None:
        _log.warning(progress.notice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What became of a narrower network.

    aim, macs: shares of the whole network's MACs, as tried and as reached. epochs: that it was trained for. judged: how
    it stood beside the whole network, in words. stays: whether it was kept.
    """

    aim: float
    macs: float
    epochs: int
    judged: str
    stays: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a run promised, and how it knows that it kept it.

    points, nats: what was tolerated; one of them. accuracy: of the whole network, on the images of the result's own.
    difference: the result's accuracy less that one, a share; standard_error: of this difference, from image to image.
    seconds: that training the whole network took.
    """

    points: float | None
    nats: float | None
    accuracy: float
    difference: float
    standard_error: float
    attempts: tuple[Attempt, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        return asdict(self) | {"attempts": [asdict(attempt) for attempt in self.attempts]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """A network with its new widths, its channel map and what was done to it. A run is written of it."""

    network: nn.Module = field(repr=False, compare=False)
    channel_map: ChannelMap = field(repr=False, compare=False)
    history: History = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """All that JSON can hold: everything but the network and its channel map; of the history, its digest."""
        names = [f.name for f in fields(self) if f.name not in ("network", "channel_map", "history")]
        table = {name: getattr(self, name) for name in names}
        plain = {name: value.as_json() for name, value in table.items() if isinstance(value, Kept)}
        return table | plain | {"history": self.history.digest()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Resized):
    """What a run ended with. Accuracy is a share, loss in nats per image, MACs those of one image.

    `part` says on which images accuracy and loss were measured. `accuracy_start` is that of weights that were
    brought, before training, None where there were none. `seconds` is the wall time of the loop with its
    evaluations, `review_seconds` the part of it that reviews took, `compile_seconds` that of compiling,
    `cpu_seconds` the processor time of the loop, on which other processes of a busy machine weigh less.
    `latency_ms` is what a forward pass of one image takes, None where the policy does not bound it.
    `inserted_alive` counts inserted filters that are still there, `skipped` images that were left out because they
    cannot be read. `network` is the averaged copy where there is one. `kept` is what a run promised whose network is
    to be as small as costs nothing, else None.
    """

    model: str
    data: str
    part: str
    seed: int
    epochs: int
    accuracy: float
    accuracy_start: float | None
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
    compile_seconds: float = 0.0
    kept: Kept | None = None
