"""A trained network made smaller and trained on for the same epochs, by every method that is compared."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from autowidth.lab.data import ImageSet
from autowidth.lab.fine_tuning import SCHEDULE
from autowidth.lab.loop import Method, train
from autowidth.lab.methods import Task, fresh_network, uniform
from autowidth.lab.policies import budget_of
from autowidth.lab.removing import METHODS, Removal
from autowidth.lab.result import Result
from autowidth.lab.settings import Settings
from autowidth.policy import Never, Schedule

FROM_SCRATCH = {"lr": 0.1, "schedule": "one-cycle", "weights": None}
"""What controls that start from fresh weights train by: the rate of fine-tuning would leave them unfinished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What a method has to do: make a network smaller, to this share of its MACs, and train it by these settings.

    The network is in evaluation mode, and may be trained.
    """

    settings: Settings
    images: ImageSet
    network: nn.Module
    macs: float

    def trained(self, network: nn.Module, method: Method) -> Result:
        """The run of a network on the images."""
        return train(self.settings, images=self.images, network=network, method=method)

    def from_scratch(self) -> Task:
        """The same task for a network with fresh weights."""
        settings = self.settings.model_copy(update=FROM_SCRATCH)
        return Task(settings=settings, macs=self.macs, images=self.images)


PLAINLY = Method(policy=Never())


def dense(task: Tuning, *, taught: bool = False) -> Result:
    """The network as it was brought, trained on."""
    return task.trained(task.network, _by(task, PLAINLY, taught))


def ours(task: Tuning, *, taught: bool = False) -> Result:
    """What `autowidth train --weights` does, with the target as its budget."""
    return task.trained(task.network, _by(task, Method(policy=budget_of(task.settings, macs=task.macs)), taught))


def on_the_way(task: Tuning, *, taught: bool = False) -> Result:
    """The same with reviews in the first part of the run, instead of before it."""
    policy = replace(budget_of(task.settings, macs=task.macs), schedule=Schedule(**SCHEDULE))
    return task.trained(task.network, _by(task, Method(policy=policy), taught))


def _by(task: Tuning, method: Method, taught: bool) -> Method:
    """The method, taught by the network that was brought if so asked."""
    return replace(method, teacher=copy.deepcopy(task.network).eval()) if taught else method


def shrunk_first(task: Tuning, *, name: str, taught: bool = False) -> Result:
    """Made smaller at once by a method of the table without training, then trained on."""
    method = _by(task, PLAINLY, taught)
    began, worked = time.perf_counter(), time.process_time()
    removal = Removal(network=task.network, images=task.images, macs=task.macs, seed=task.settings.seed)
    network = METHODS[name](removal)
    seconds, busy = time.perf_counter() - began, time.process_time() - worked
    found = task.trained(network, method)
    return replace(found, seconds=found.seconds + seconds, cpu_seconds=found.cpu_seconds + busy, review_seconds=seconds)


def our_widths_from_scratch(task: Tuning) -> Result:
    """The widths that our run ended with, from fresh weights, for as many epochs."""
    found, scratch = ours(task), task.from_scratch()
    network = fresh_network(scratch, lambda _: found.widths)
    return scratch.trained(network=network, method=PLAINLY)


def uniform_from_scratch(task: Tuning) -> Result:
    """The uniformly narrowed network, from fresh weights, for as many epochs."""
    (finish,) = uniform(task.from_scratch())
    return finish.result


SHRUNK: Mapping[str, Callable[..., Result]] = {
    name: partial(shrunk_first, name=name)
    for name in METHODS
    if name not in ("dense", "autowidth") and not name.endswith("-reconstructed")
}
"""The methods that remove at once, before training."""

TEACHABLE: Mapping[str, Callable[..., Result]] = {
    "dense": dense,
    "autowidth": ours,
    "autowidth-on-the-way": on_the_way,
    **SHRUNK,
}
"""The methods that start from the network that is brought, and may learn from it."""

TAUGHT = "-taught"
"""Behind the name of a method: it learns from the network that was brought as well as from labels."""

TUNED: Mapping[str, Callable[[Tuning], Result]] = {
    **TEACHABLE,
    **{name + TAUGHT: partial(method, taught=True) for name, method in TEACHABLE.items()},
    "retrained": our_widths_from_scratch,
    "uniform": uniform_from_scratch,
}
"""The methods by name, as in the comparisons of runs; `autowidth-on-the-way` removes while it trains, not before."""
