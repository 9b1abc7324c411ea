"""An image set: its splits, its classes, and how its images are scaled and augmented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from autowidth.lab.data.augment import Augmentation, Level, augmentation_of
from autowidth.lab.data.batches import Batches
from autowidth.lab.data.errors import DataError
from autowidth.lab.data.splits import Part, Split
from autowidth.lab.data.streaming import Pictures

_LISTED = 12  # classes that are listed one by one where a set is described


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """A classification task: its splits, its class names, and how its images are scaled and augmented.

    `mean` and `std` are per channel, of the pixels (0 to 1) of the training split. `skipped` names the files or rows
    that held no readable image and were left out on request, `resized` says why images were brought to another size.
    `str` tells splits, size, augmentation and class counts in a line.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    held_out: Split | None
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    skipped: tuple[str, ...] = ()
    resized: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def class_counts(self) -> dict[str, int]:
        """Training images of each class."""
        counts = torch.bincount(self.train.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def __str__(self) -> str:
        """Splits, class counts and what was left out, in one line for people."""
        splits = {"training": self.train, "held-out": self.held_out, "test": self.test}
        *most, last = [f"{len(split)} {name}" for name, split in splits.items() if split is not None]
        parts = [f"{self.name}: {', '.join(most)} and {last} images of {' x '.join(map(str, self.image_shape))}"]
        if isinstance(self.train.images, Pictures):
            parts.append(f"streamed by {self.train.images.workers} workers")
        parts += [self.resized] if self.resized else []
        parts.append(f"training images {self.augmentation}")
        parts.append(_counted(self.class_counts))
        if self.skipped:
            parts.append(f"{len(self.skipped)} unreadable left out, the first is {self.skipped[0]}")
        return "; ".join(parts)

    def part(self, name: Part) -> Split:
        """One of the splits. Raises DataError for a held-out part that was not asked for when the set was loaded."""
        splits: dict[Part, Split | None] = {"train": self.train, "held_out": self.held_out, "test": self.test}
        if name not in splits:
            raise DataError(f"{self.name} has no part {name!r}, allowed are train, held_out and test")
        if (split := splits[name]) is None:
            raise DataError(
                f"{self.name} was loaded without a held-out part: load it with holdout=0.1 or another share"
            )
        return split

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with all splits on this device."""
        held_out = None if self.held_out is None else self.held_out.to(device)
        return replace(self, train=self.train.to(device), held_out=held_out, test=self.test.to(device))

    def augmented(self, level: Level | None) -> ImageSet:
        """The same set with its training images varied this much; None leaves it as it is."""
        if level is None:
            return self
        _, height, width = self.image_shape
        return replace(self, augmentation=augmentation_of(level, height, width, self.augmentation.edge))

    def training_batches(self, batch_size: int, *, seed: int, drop_last: bool = True) -> Batches:
        """The training split in shuffled and augmented batches."""
        return Batches(
            self.train,
            batch_size=batch_size,
            mean=self.mean,
            std=self.std,
            augmentation=self.augmentation,
            seed=seed,
            drop_last=drop_last,
        )

    def plain_batches(self, part: Part, batch_size: int) -> Batches:
        """A split in its own order, without augmentation, all of it. Raises DataError as `part` does."""
        return Batches(self.part(part), batch_size=batch_size, mean=self.mean, std=self.std, shuffle=False)


def _counted(counts: Mapping[str, int]) -> str:
    """Training images by class: each of them, or of many classes the smallest and the largest."""
    if len(counts) <= _LISTED:
        return "training images by class: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    least, most = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    return f"{len(counts)} classes of {counts[least]} ({least}) to {counts[most]} ({most}) training images"
