"""What a trained network answers itself, softened, in place of labels: a review that asks what changes the network.

A network that knows its training images by heart has next to no loss on them, and next to no gradient: whatever is
removed seems to cost nothing, and the loss on labels says little of what other images lose. Its answers say more. With
labels drawn from softmax(scores / T), T being TEMPERATURE, the loss

    T^2 cross-entropy(scores / T, drawn labels)

has a gradient of mean 0, and the squares that the worths add up are the Fisher information of the softened answers,
which is the curvature of the divergence KL(before || after) that a trial then measures (Martens 2020; softened answers:
Hinton et al. 2015). Only inputs are needed. docs/decisions/013 has what it wins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.review.batches import ProbeError, count, on_device_of

TEMPERATURE = 4.0
"""By which scores are divided before they become probabilities."""


def answers_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of scores (B, classes, ...) and drawn labels (B, ...), in nats of softened answers."""
    return F.cross_entropy(scores.float() / TEMPERATURE, labels) * TEMPERATURE**2


class Answered:
    """Batches, each as a pair (inputs, labels that a network as it is now would give), drawn anew but alike each time.

    batches: tensors of inputs, or tuples and lists whose first part they are. A copy of the network is kept.
    """

    def __init__(self, batches: Iterable[Any], network: nn.Module, *, seed: int) -> None:
        self.batches, self.network, self.seed = batches, copy.deepcopy(network).eval(), seed

    @property
    def dataset(self) -> Any:
        """What there is, as loaders tell it, so that samples can be counted."""
        if isinstance(self.batches, list | tuple):
            return range(count(self.batches))
        return self.batches.dataset  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        source = torch.Generator().manual_seed(self.seed)
        for batch in self.batches:
            inputs = on_device_of(self.network, _inputs_of(batch))
            yield inputs, self._drawn(inputs, source)

    def _drawn(self, inputs: Any, source: torch.Generator) -> Tensor:
        """A label for each sample and position of the scores. Raises ProbeError for what is no score of classes."""
        with torch.no_grad():
            scores = self.network(inputs)
        if not isinstance(scores, Tensor) or scores.dim() < 2 or scores.size(1) < 2:
            what = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ProbeError(
                f"the model gives {what}, and not scores of shape (samples, classes): say what counts by loss_fn=, or "
                "by loss=, a function of (model, batch)"
            )
        shares = (scores.float() / TEMPERATURE).softmax(1).movedim(1, -1).cpu()
        drawn = torch.multinomial(shares.flatten(0, -2), 1, generator=source)
        return drawn.reshape(shares.shape[:-1]).to(scores.device)


def _inputs_of(batch: Any) -> Any:
    """The inputs of a batch. Raises ProbeError where it is not clear which they are."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    raise ProbeError(
        f"the probe gives a {type(batch).__name__}, and the inputs of the model are not its first part: pass loss=, a "
        "function of (model, batch)"
    )
