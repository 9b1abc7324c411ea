"""The one trial: what the loss is without some channels, asked of the network itself, and everything put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.ranks import ALONE, Ranks
from autowidth.review.batches import Batches, Loss, mean_loss, samples_in
from autowidth.review.reconstruct import Reconstruction, Removed, readers_without
from autowidth.review.replay import mean_losses
from autowidth.review.state import (
    NormShift,
    batch_norms,
    corrected_norms,
    named_tensors,
    precise_norms,
    swapped,
)

Norms = Literal["kept", "batch", "precise"]
"""Which statistics norms use in a trial.

kept: their running ones, as they are. Right for a single filter, of which little changes behind it.
batch: those of the held-out batch at hand. Right for many filters at once, at the price of one forward pass; batches of
    one sample are left out.
precise: plain averages over the scoring data, estimated without the channels. What surgery leaves behind in training.
"""

NormsAfter = Literal["precise", "corrected"]
"""Which statistics norms have once channels have been removed.

precise: while a network trains, its running statistics lag behind its weights (docs/decisions/003).
corrected: those of a trained network are of all that training saw, and a review sees little of that
    (docs/decisions/013).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A network on trial: what to measure it with, and what stands in for channels that go.

    scoring: batches for norm statistics; held_out: batches on which losses are measured, apart from those; trained:
    the modules in training mode, whose norms may take other statistics; known: the reconstruction, empty for none.
    held: samples of the held-out batches on all ranks, None for those here; ranks: who looks at a share of the data.
    shifts: what norms hold beside what the scoring data show of them, for "corrected"; empty where nothing is.
    """

    model: nn.Module
    channel_map: ChannelMap
    loss: Loss
    scoring: Batches
    held_out: Batches
    trained: frozenset[nn.Module]
    known: Reconstruction
    shifts: tuple[NormShift, ...] = ()
    held: int | None = None
    ranks: Ranks = ALONE

    @property
    def measures(self) -> bool:
        """Whether there are held-out samples, on any rank."""
        return bool(self.held_out) if self.held is None else self.held > 0

    def loss_without(self, removed: Removed, *, norms: Norms = "kept") -> float:
        """The mean loss on the held-out data without these channels, nats per sample; with none removed, the whole's.

        Zeroing what the readers make of a channel has the effect of removing it, norms across channels excepted. The
        model is afterwards as it was, bit for bit.
        """
        with self._without(removed), self._norms(norms):
            return mean_loss(self.model, self._batches(norms), self.loss, self.ranks)

    def corrected_loss_without(self, removed: Removed) -> tuple[float, list[tuple[Tensor, Tensor]]]:
        """The same with corrected norms, and what `corrected_without` returns.

        Running statistics, moved by as much as the removal moves the averages over the scoring data: what surgery
        leaves behind in a trained network.
        """
        with self._corrected(removed) as found:
            return mean_loss(self.model, self.held_out, self.loss, self.ranks), found

    def losses_without(self, many: Sequence[Removed], *, norms: Literal["kept", "batch"] = "kept") -> list[float]:
        """`loss_without` of each of these, where norms need no look at scoring data; what passes share is done once."""
        tensors = named_tensors(self.model)
        others = [readers_without(removed, self.channel_map, self.known, tensors) for removed in many]
        with self._norms(norms):
            return mean_losses(self.model, self._batches(norms), self.loss, others, self.ranks)

    def _batches(self, norms: Norms) -> Batches:
        """The held-out batches that can be looked at with such norms."""
        if norms != "batch":
            return self.held_out
        return [batch for batch in self.held_out if samples_in(batch) > 1] or self.held_out

    def corrected_without(self, removed: Removed) -> list[tuple[Tensor, Tensor]]:
        """(buffer, what it should hold without these channels) of corrected norms; the model is left alone."""
        with self._corrected(removed) as found:
            return found

    @contextmanager
    def _corrected(self, removed: Removed) -> Iterator[list[tuple[Tensor, Tensor]]]:
        corrected = corrected_norms(self.model, self.scoring, self.loss, self.shifts, ranks=self.ranks)
        with self._without(removed), corrected as found:
            yield found

    @contextmanager
    def _without(self, removed: Removed) -> Iterator[None]:
        tensors = readers_without(removed, self.channel_map, self.known, named_tensors(self.model))
        with swapped(self.model, tensors):
            yield

    @contextmanager
    def _norms(self, norms: Norms) -> Iterator[None]:
        if norms == "precise":
            with precise_norms(self.model, self.scoring, self.loss, among=self.trained, ranks=self.ranks):
                yield
        elif norms == "batch" and any(samples_in(batch) > 1 for batch in self.held_out):
            with batch_norms(self.model, among=self.trained):
                yield
        else:
            yield
