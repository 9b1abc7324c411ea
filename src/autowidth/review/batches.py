"""What a batch is: whatever the user's loader gives, with a loss that is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autowidth.errors import AutoWidthError
from autowidth.ranks import ALONE, Ranks

Loss = Callable[[nn.Module, Any], Tensor]
"""loss(model, batch): a scalar, the mean over the samples of the batch."""

Batches = Sequence[Any]


class ProbeError(AutoWidthError, ValueError):
    """The probe has no usable data, or cannot see what a layer reads."""


class DivergedProbeError(AutoWidthError, FloatingPointError):
    """A loss on probe data that is not finite."""


def of_pairs(loss_fn: Callable[[Any, Any], Tensor]) -> Loss:
    """The loss for batches that are pairs: loss_fn(model(inputs), target), both moved to the model's device."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise ProbeError(
                f"the probe gives a {kind}, and loss_fn takes pairs (inputs, target): pass loss=, a function of "
                "(model, batch), instead"
            )
        inputs, target = on_device_of(model, batch)
        return loss_fn(*_in_single((model(inputs), target)))

    return loss


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """The batch with its tensors where the first parameter of the model is."""
    if not isinstance(model, nn.Module):  # a function of the inputs, as torch.func makes them
        return batch
    home = next(model.parameters()).device
    return tree_map_only(Tensor, lambda tensor: tensor if tensor.device == home else tensor.to(home), batch)


def _in_single(values: Any) -> Any:
    """Half precision as float32, all else as it is: a loss near 2 nats has steps of 0.008 in bfloat16."""
    halves = (torch.float16, torch.bfloat16)
    if not any(isinstance(leaf, Tensor) and leaf.dtype in halves for leaf in tree_leaves(values)):
        return values
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype in halves else tensor, values)


def samples_in(batch: Any) -> int:
    """The number of samples in a batch: the length of the first tensor in it that has one. Raises ProbeError."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise ProbeError(
        f"a batch of the probe is a {type(batch).__name__} without a tensor: its samples cannot be counted"
    )


def count(batches: Batches) -> int:
    """The number of samples in several batches."""
    return sum(map(samples_in, batches))


def take(stream: Iterator[Any], samples: int) -> list[Any]:
    """The next batches, until they hold this many samples or the data end; the last one cut where it can be."""
    taken: list[Any] = []
    missing = samples
    while missing > 0 and (batch := next(stream, None)) is not None:
        taken.append(_cut(batch, missing))
        missing -= samples_in(taken[-1])
    return taken


def _cut(batch: Any, most: int) -> Any:
    """The first samples of a batch, `most` of them; the whole batch where its parts are not all tensors of a length."""
    if samples_in(batch) <= most or not cuttable(batch):
        return batch
    return tree_map_only(Tensor, lambda tensor: tensor[:most], batch)


def cuttable(batch: Any) -> bool:
    """Whether a batch consists of tensors of one length, so that some of its samples are a batch too."""
    length = samples_in(batch)
    return all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == length for leaf in tree_leaves(batch))


def samples_of(probe: Iterable[Any]) -> int | None:
    """The number of samples that a loader or list runs through; None where only iterating would tell."""
    dataset = getattr(probe, "dataset", None)
    if isinstance(dataset, Sized):
        return len(dataset)
    if isinstance(probe, list | tuple):
        return count(probe)
    return None


def mean_loss(model: nn.Module, batches: Batches, loss: Loss, ranks: Ranks = ALONE) -> float:
    """The mean loss over all samples of all ranks, nats per sample. The caller sets evaluation mode; no gradients."""
    (mean,) = means(batches, lambda batch: [float(loss(model, batch))], 1, ranks)
    return mean


def means(batches: Batches, values: Callable[[Any], Sequence[float]], count: int, ranks: Ranks = ALONE) -> list[float]:
    """The means over all samples of all ranks of `count` values, which are means over a batch; no gradients."""
    totals, samples = [0.0] * count, 0
    with torch.no_grad():
        for batch in batches:
            length = samples_in(batch)
            totals = [total + value * length for total, value in zip(totals, values(batch), strict=True)]
            samples += length
    of_all = [ranks.totals(total, samples) for total in totals]
    return [total / max(everyone, 1) for total, everyone in of_all]
