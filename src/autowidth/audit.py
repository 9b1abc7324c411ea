"""Ablate a few filters for real, refit the criterion, say how well it predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import Tensor, nn

from autowidth.channels import ChannelGroup, ChannelMap

Batches = Sequence[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ablation:
    """What really happened when one filter was taken from its readers: the change of the loss, nats per sample."""

    group: str
    channel: int
    change: float


def mean_loss(model: nn.Module, batches: Batches, loss_fn: Loss) -> float:
    """The mean loss over all samples. The caller sets evaluation mode; no gradients."""
    total, samples = 0.0, 0
    with torch.no_grad():
        for inputs, target in batches:
            total += float(loss_fn(model(inputs), target)) * inputs.size(0)
            samples += inputs.size(0)
    return total / max(samples, 1)


def ablate(
    model: nn.Module,
    channel_map: ChannelMap,
    picks: Iterable[tuple[str, int]],
    batches: Batches,
    loss_fn: Loss,
    *,
    before: float | None = None,
) -> list[Ablation]:
    """Takes each picked (group, channel) from its readers, measures the loss on the batches, and puts it back.

    Zeroing what the readers make of a channel has the effect of removing it, norms across channels excepted.
    `before` is the loss of the whole network on the batches, if it is known already.
    """
    if before is None:
        before = mean_loss(model, batches, loss_fn)
    weights: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = []
    for name, channel in picks:
        with _without(weights, channel_map.group(name), channel):
            found.append(Ablation(name, channel, mean_loss(model, batches, loss_fn) - before))
    return found


@contextmanager
def _without(weights: Mapping[str, Tensor], group: ChannelGroup, channel: int) -> Iterator[None]:
    """While it lasts, the readers' weights of one channel are zero."""
    saved = []
    with torch.no_grad():
        for place in group.with_role("read"):
            weight, dim = weights[place.axis.name].data, place.axis.dim
            index = torch.tensor(place.index[channel], device=weight.device)
            saved.append((weight, dim, index, weight.index_select(dim, index)))
            weight.index_fill_(dim, index, 0.0)
    try:
        yield
    finally:
        for weight, dim, index, content in reversed(saved):
            weight.index_copy_(dim, index, content)


def sample(worths: Mapping[str, Array], count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Picks filters for the audit, stratified over worth: from the ranking of all filters, one of each stretch.

    Returns at most `count` pairs (group, channel), each filter at most once.
    """
    everyone = [(float(w), name, c) for name, values in worths.items() for c, w in enumerate(values)]
    if not count:
        return []
    everyone.sort(key=lambda item: item[0])
    stretches = np.array_split(np.arange(len(everyone)), min(count, len(everyone)))
    return [everyone[int(rng.choice(stretch))][1:] for stretch in stretches if len(stretch)]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The non-negative coefficients of (next-layer, own-layer) and the evidence behind them.

    `normal` (2, 2) and `moment` (2,) are the sums of x x' and x y over audited filters, older ones forgotten by half
    at each review; rows are divided by their own size first, so that it is relative errors that count.
    """

    coefficients: tuple[float, ...] = (1.0, 0.0)
    normal: tuple[tuple[float, ...], ...] = ((1.0, 0.0), (0.0, 1.0))
    moment: tuple[float, ...] = (1.0, 0.0)

    def vector(self) -> Array:
        return np.array(self.coefficients)


FORGET = 0.5
"""How much an audit counts at the next review."""


def refit(calibration: Calibration, parts: Array, changes: Array) -> Calibration:
    """Refits the coefficients to measured loss changes.

    `parts` (m, 2) are the profits predicted for the m audited filters, `changes` (m,) what was measured. Solves
    min |A c - b| with c >= 0 (Lawson and Hanson 1974) over the remembered evidence; the first audit is weighed
    against the prior that the next-layer profit alone is right.
    """
    usable = np.isfinite(parts).all(axis=1) & np.isfinite(changes)
    parts, changes = parts[usable], changes[usable]
    if not len(changes):
        return calibration
    size = np.abs(parts).sum(axis=1) + np.abs(changes)
    scale = size + np.median(size) + np.finfo(float).tiny
    x, y = parts / scale[:, None], changes / scale
    normal = FORGET * np.array(calibration.normal) + x.T @ x
    moment = FORGET * np.array(calibration.moment) + x.T @ y
    root = np.linalg.cholesky(normal + 1e-9 * np.trace(normal) * np.eye(2))
    coefficients, _ = nnls(root.T, np.linalg.solve(root, moment))
    if not coefficients.any():
        coefficients = calibration.vector()
    return Calibration(tuple(coefficients.tolist()), tuple(map(tuple, normal.tolist())), tuple(moment.tolist()))


def agreement(predicted: Array, measured: Array) -> tuple[float | None, float | None]:
    """How well predictions held: Spearman's rank correlation, and the slope of measured on predicted through 0.

    None where a figure is not defined: fewer than three filters, or no spread.
    """
    usable = np.isfinite(predicted) & np.isfinite(measured)
    p, m = predicted[usable], measured[usable]
    if len(p) < 3 or np.ptp(p) == 0 or np.ptp(m) == 0:
        return None, None
    return float(spearmanr(p, m).statistic), float((p @ m) / (p @ p))
