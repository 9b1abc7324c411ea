"""Ablate a few filters for real, refit the criterion, say how well it predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import Tensor, nn

import autowidth.profit as profits
from autowidth.channels import ChannelMap

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
    folded: Fold | None = None,
) -> list[Ablation]:
    """Takes each picked (group, channel) from its readers, measures the loss on the batches, and puts it back.

    Zeroing what the readers make of a channel has the effect of removing it, norms across channels excepted. With
    `folded`, which tells the readers' tensors after a removal, its peers stand in for it. `before` is the loss of the
    whole network on the batches, if it is known already.
    """
    if before is None:
        before = mean_loss(model, batches, loss_fn)
    fold = folded or partial(profits.folded, channel_map=channel_map, known={}, weights=named_tensors(model))
    found = []
    for name, channel in picks:
        with standing_in(model, fold({name: [channel]})):
            found.append(Ablation(name, channel, mean_loss(model, batches, loss_fn) - before))
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


Fold = Callable[[Mapping[str, Sequence[int]]], Mapping[str, Tensor]]
"""Removed channels by group -> the readers' tensors without them, by parameter name (see profit.folded)."""


@contextmanager
def standing_in(model: nn.Module, tensors: Mapping[str, Tensor], *, stay: bool = False) -> Iterator[None]:
    """While it lasts, parameters and buffers of these names hold other values of the same shape.

    Afterwards they are as they were; with `stay` only if what it encloses raises.
    """
    targets = named_tensors(model)
    saved = {name: targets[name].data.clone() for name in tensors}
    done = False
    try:
        for name, content in tensors.items():
            targets[name].data.copy_(content)
        yield
        done = True
    finally:
        for name, content in saved.items() if not (stay and done) else ():
            targets[name].data.copy_(content)


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

    `normal` (2, 2) and `moment` (2,) are the sums of x x' and x y over audited filters, older ones forgotten by a
    fifth at each review; rows are divided by their own size first, so that it is relative errors that count. The prior
    is that the own-layer profit is the worth: it predicts removal as it is made, with peers that stand in.
    """

    coefficients: tuple[float, ...] = (0.0, 1.0)
    normal: tuple[tuple[float, ...], ...] = ((16.0, 0.0), (0.0, 16.0))
    moment: tuple[float, ...] = (0.0, 16.0)

    def vector(self) -> Array:
        return np.array(self.coefficients)


FORGET = 0.8
"""How much an audit counts at the next review: one audit of a dozen filters is mostly noise (docs/decisions/007)."""


def refit(calibration: Calibration, parts: Array, changes: Array) -> Calibration:
    """Refits the coefficients to measured loss changes.

    `parts` (m, 2) are the profits predicted for the m audited filters, `changes` (m,) what was measured. Solves
    min |A c - b| with c >= 0 (Lawson and Hanson 1974) over the remembered evidence; the first audit is weighed
    against the prior that the own-layer profit alone is right.
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
