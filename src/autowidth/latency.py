"""Measured latency: narrowed copies of a model are timed, and a cost is fitted that says what a channel takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn
from torch.utils.benchmark import Timer

from autowidth.channels import ChannelMap, IndexMap
from autowidth.cost import Cost, called, elements_cost, macs_cost
from autowidth.ranks import ALONE, Ranks
from autowidth.surgery import apply_

Array = NDArray[np.float64]

COPIES = 12
"""Narrowed copies that are timed: the fit has three numbers to find."""

ROUNDS = 9
"""How often every copy is timed, in turns; the fastest time counts, since other work can only slow a call down."""

LEAST_SECONDS = 0.01
"""How long a timing takes at least: fast networks are called several times for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds of one forward pass: overhead + per_mac x MACs + per_element x elements that the weights write.

    MACs and elements are those of one sample; the pass is that of the inputs that were timed, all samples of them.
    measured: milliseconds of the model as it was; fitted: what the formula says of it; error: median relative error of
    the formula on the timed copies.
    """

    overhead: float
    per_mac: float
    per_element: float
    measured: float
    fitted: float
    error: float

    def cost_through(self, channel_map: ChannelMap, now: float) -> Cost:
        """Milliseconds as a function of the widths, right for the present network, which takes `now`.

        The formula is off by what it does not know of kernels and caches. The line that it is bent to goes through the
        present measurement and, if its slope stays within a factor of two of their ratio, through that of the start.
        """
        cost = self.cost(channel_map)
        fitted = cost.at(channel_map.widths)
        ratio = now / max(fitted, 1e-9)
        slope = (self.measured - now) / (self.fitted - fitted) if abs(self.fitted - fitted) > 1e-9 else ratio
        slope = min(max(slope, ratio / 2), 2 * ratio)
        factor = cost.factor * slope
        factor[0] += now - slope * fitted
        return replace(cost, factor=factor)

    def cost(self, channel_map: ChannelMap) -> Cost:
        """Milliseconds as a function of the widths, by the formula; its first term is the overhead."""
        macs, elements = macs_cost(channel_map), elements_cost(channel_map)
        constant = Cost(
            names=macs.names, factor=np.array([self.overhead]), base=np.ones((1, 2)),
            copies=np.zeros((1, 2, len(macs.names))),
        )  # fmt: skip
        terms = (
            constant,
            replace(macs, factor=macs.factor * self.per_mac),
            replace(elements, factor=elements.factor * self.per_element),
        )
        return Cost(
            names=macs.names,
            factor=np.concatenate([term.factor for term in terms]),
            base=np.concatenate([term.base for term in terms]),
            copies=np.concatenate([term.copies for term in terms]),
        )


def fit_latency(
    model: nn.Module, channel_map: ChannelMap, example_inputs: object, *, multiple: int = 1, seed: int = 0
) -> Latency:
    """Times copies of the model with random widths, and fits the three numbers by non-negative least squares.

    Widths of the copies are multiples of `multiple` where they differ from the model's.

    The inputs are those that the latency is wanted for: their batch, device and memory format count. Residuals are
    relative, so that narrow networks count as much as wide ones. The model is not touched.
    """
    rng = np.random.default_rng(seed)
    copies = [(copy.deepcopy(model), channel_map)]
    copies += [_narrowed(model, channel_map, share, multiple, rng) for share in np.linspace(0.15, 0.9, COPIES).tolist()]
    milliseconds = 1000 * np.array(timed([network for network, _ in copies], example_inputs))
    rows = np.array([_terms(found) for _, found in copies])
    scale = np.maximum(rows.max(axis=0), 1.0)
    solution, _ = nnls(rows / scale / milliseconds[:, None], np.ones(len(rows)))
    found = solution / scale
    error = float(np.median(np.abs(rows @ found / milliseconds - 1)))
    overhead, per_mac, per_element = map(float, found)
    return Latency(
        overhead=overhead,
        per_mac=per_mac,
        per_element=per_element,
        measured=float(milliseconds[0]),
        fitted=float(rows[0] @ found),
        error=error,
    )


def timed(networks: list[nn.Module], example_inputs: object) -> list[float]:
    """Seconds of one forward pass of each network in evaluation mode: the fastest of several, taken in turns.

    By torch.utils.benchmark, which waits for an accelerator, and with as many threads as torch has now.
    """
    args, kwargs = called(example_inputs)
    modes = [{module: module.training for module in network.modules()} for network in networks]
    try:
        timers = [_timer(network.eval(), args, kwargs) for network in networks]
        with torch.inference_mode():
            calls = [_calls(timer) for timer in timers]
            rounds = [[t.timeit(n).mean for t, n in zip(timers, calls, strict=True)] for _ in range(ROUNDS)]
    finally:
        for before in modes:
            for module, training in before.items():
                module.training = training
    return [min(found) for found in zip(*rounds, strict=True)]


def _timer(network: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Timer:
    return Timer(
        "network(*args, **kwargs)",
        globals={"network": network, "args": args, "kwargs": kwargs},
        num_threads=torch.get_num_threads(),
    )


def _calls(timer: Timer) -> int:
    """How many calls one timing needs."""
    return max(1, round(LEAST_SECONDS / max(timer.timeit(1).mean, 1e-6)))


def _narrowed(
    model: nn.Module, channel_map: ChannelMap, share: float, multiple: int, rng: np.random.Generator
) -> tuple[nn.Module, ChannelMap]:
    """A copy in which every group keeps about this share of its channels, give or take a third of what is left."""
    network = copy.deepcopy(model)
    plan = {}
    for group in channel_map.groups:
        wanted = group.width * share * rng.uniform(0.67, 1.33)
        width = min(group.width, max(1, round(wanted / multiple)) * multiple)
        if width < group.width:
            plan[group.name] = IndexMap.removing(range(width, group.width), group.width)
    return network, apply_(network, channel_map, plan) if plan else channel_map


def _terms(channel_map: ChannelMap) -> tuple[float, float, float]:
    widths = channel_map.widths
    return 1.0, macs_cost(channel_map).at(widths), elements_cost(channel_map).at(widths)


class LatencyMeter:
    """The latency of one model: a formula fitted at the start, and a stopwatch.

    The model is timed with these inputs, in evaluation mode; widths of the copies that are timed for the fit are
    multiples of `multiple` where they differ from the model's. Of several ranks the first one is timed, for all.
    """

    def __init__(
        self, model: nn.Module, channel_map: ChannelMap, example_inputs: object, *, multiple: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._model = model
        self._inputs = example_inputs
        self._ranks = ranks
        self.fit = ranks.made_by_first(lambda: fit_latency(model, channel_map, example_inputs, multiple=multiple))

    def now(self) -> float:
        """Milliseconds of one forward pass of the model as it is, timed now."""
        return 1000 * timed([self._model], self._inputs)[0]

    def cost(self, channel_map: ChannelMap) -> Cost:
        """Milliseconds as a function of the widths, right at the present ones, which are timed once more."""
        return self.fit.cost_through(channel_map, self._ranks.made_by_first(self.now))
