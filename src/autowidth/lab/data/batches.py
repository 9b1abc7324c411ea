"""A split in batches: order, augmentation, and where the reading stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from autowidth.lab.data.augment import Augmentation
from autowidth.lab.data.errors import DataError
from autowidth.lab.data.pixels import scale
from autowidth.lab.data.splits import Split, generator_of


class Batches:
    """A split in batches of (images, labels): (B, C, H, W) float32, scaled, and (B,) int64, on the split's device.

    The order of an epoch and its augmentation depend on `seed` and the number of the epoch alone, on every device;
    the global generator is neither read nor moved. Each `for` runs through one epoch and the next one begins a new
    one, also after a `break`. `state_dict` says where the reading stands; after `load_state_dict` the next `for` goes
    on with the batch that would have followed, in the middle of an epoch as well.

    Raises DataError for a batch size that is not positive, or that leaves no batch when the last one is dropped,
    for a negative seed, and for images that are too small for the augmentation.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"the batch size is {batch_size}, allowed are 1 and more")
        if drop_last and batch_size > len(split):
            raise DataError(f"a batch of {batch_size} out of {len(split)} images leaves none when the last is dropped")
        if seed < 0:
            raise DataError(f"the seed is {seed}, allowed are 0 and more")
        self.split = split
        self.batch_size = batch_size
        self.augmentation = augmentation or Augmentation()
        self.augmentation.check(split.images.shape[2], split.images.shape[3])
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._mean = torch.tensor(mean, dtype=torch.float32, device=split.images.device)
        self._std = torch.tensor(std, dtype=torch.float32, device=split.images.device)
        self.part = (0, 1)
        """Number of this process, and how many share every batch: each takes its part of it."""
        self._epoch, self._batch, self._goes_on = 0, 0, False

    def __len__(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._batch and not self._goes_on:
            self._epoch, self._batch = self._epoch + 1, 0
        self._goes_on = False
        epoch, first = self._epoch, self._batch
        for number, batch in enumerate(self.at(epoch, first=first), first + 1):
            # Before the batch goes out: a state that is saved while the batch is in use points behind it.
            self._epoch, self._batch = (epoch, number) if number < len(self) else (epoch + 1, 0)
            yield batch

    def at(self, epoch: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from number `first` on, whatever was read before; the state stays as it is."""
        count, device = len(self.split), self.split.images.device
        generator = generator_of(self.seed, epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = self.augmentation.draw(count, generator).to(device)
        starts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        windows = [self._mine(start, min(start + self.batch_size, count)) for start in starts]
        for (start, stop), (images, labels) in zip(windows, self._taken(order, windows), strict=True):
            augmented = self.augmentation.apply(images, draws.slice(start, stop))
            yield scale(augmented, self._mean, self._std), labels

    def taken(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at these positions (int64), which may name one often, in batches and without augmentation."""
        starts = range(0, len(order), self.batch_size)
        for images, labels in self._taken(order, [(at, min(at + self.batch_size, len(order))) for at in starts]):
            yield scale(images, self._mean, self._std), labels

    def _mine(self, start: int, stop: int) -> tuple[int, int]:
        """The part of this process of the positions from `start` to `stop`."""
        (number, count), length = self.part, stop - start
        return start + length * number // count, start + length * (number + 1) // count

    def _taken(self, order: Tensor, windows: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at the positions in each window of the order, as the split holds them."""
        images, placed = self.split.images, order.to(self.split.images.device)
        taken: Iterator[Tensor]
        if isinstance(images, Tensor):
            taken = (images[placed[start:stop]] for start, stop in windows)
        else:
            taken = images.batches([order[start:stop] for start, stop in windows])
        for (start, stop), batch in zip(windows, taken, strict=True):
            yield batch, self.split.labels[placed[start:stop]]

    @property
    def dataset(self) -> Split:
        """What is read: the images and labels, as many as there are samples."""
        return self.split

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._epoch

    def state_dict(self) -> dict[str, int]:
        """Where the reading stands, in numbers that JSON can hold: enough to go on exactly."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "images": len(self.split),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to where `state` was taken. Raises DataError for one of other batches than these."""
        own = self.state_dict()
        if missing := [key for key in own if key not in state]:
            raise DataError(f"the state of batches has no entry {missing[0]!r}: take it from state_dict()")
        for key in ("seed", "batch_size", "images"):
            if state[key] != own[key]:
                raise DataError(f"the state of batches was taken with {key} {state[key]}, here it is {own[key]}")
        if state["epoch"] < 0 or not 0 <= state["batch"] < len(self):
            raise DataError(f"the state of batches is at epoch {state['epoch']}, batch {state['batch']} of {len(self)}")
        self._epoch, self._batch, self._goes_on = state["epoch"], state["batch"], True

    def begin_anew(self) -> None:
        """The epoch that was going on is over, as after a `break`: the next `for` begins a new one."""
        self._goes_on = False
