"""A split of an image set, and how images are divided into splits by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from autowidth.lab.data.errors import DataError
from autowidth.lab.data.streaming import Pictures

Part: TypeAlias = Literal["train", "held_out", "test"]
"""A split of an image set: `held_out` is taken from the training images, for choices that the test set must not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images (N, C, H, W) in float32 or uint8 and their labels (N,) in int64, on one device.

    The images are one tensor, or `Pictures` where they are streamed.
    Raises DataError where they do not fit each other, or where there is no image.
    """

    images: Tensor | Pictures
    labels: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.images, Tensor) and (
            self.images.ndim != 4 or self.images.dtype not in (torch.float32, torch.uint8)
        ):
            got = f"{self.images.dtype} of shape {tuple(self.images.shape)}"
            raise DataError(f"images of a split are {got}, expected float32 or uint8 of shape (N, C, H, W)")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            got = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise DataError(f"labels of a split are {got}, expected int64 of shape ({len(self.images)},)")
        if not len(self.labels):
            raise DataError("a split holds no image: give at least one")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Split:
        """The images at these positions (int64), in this order."""
        return Split(images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> Split:
        """The same split on this device."""
        return Split(images=self.images.to(device), labels=self.labels.to(device))


def set_apart(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of the rest and of this share of every class, rounded, both in rising order: labels (N,)."""
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        chosen[members[: round(share * len(members))]] = True
    if not chosen.any() or chosen.all():
        raise DataError(f"a share of {share} of each class of {len(labels)} images is none or all of them")
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def first_of(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """The first `limit` positions of a permutation of `count`."""
    if not 1 <= limit <= count:
        raise DataError(f"the limit is {limit} training images, allowed are 1 to {count}")
    return torch.randperm(count, generator=generator)[:limit]


def generator_of(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for every pair of numbers; close pairs are as unlike as distant ones."""
    words = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)
