"""Augmentation of batches: what chance decides for each image, and what is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from autowidth.lab.data.errors import DataError
from autowidth.lab.data.pixels import Edge, crop, flip

Level: TypeAlias = Literal["none", "light", "standard"]
"""How much training images are varied: not at all, moved, or moved and half of them flipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What chance decided for N images, each (N,): moves of the window in pixels (int64), heads for a flip (bool)."""

    down: Tensor
    right: Tensor
    flip: Tensor

    def slice(self, start: int, stop: int) -> Draws:
        """The draws of the images from start to stop."""
        return Draws(down=self.down[start:stop], right=self.right[start:stop], flip=self.flip[start:stop])

    def to(self, device: torch.device | str) -> Draws:
        """The same draws on this device."""
        return Draws(down=self.down.to(device), right=self.right.to(device), flip=self.flip.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random crop out of an image padded by `padding` pixels on every side, and flips of half of the images.

    Raises DataError for a negative padding and an unknown edge.
    """

    padding: int = 0
    edge: Edge = "reflect"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise DataError(f"a crop is padded by {self.padding} pixels, allowed are 0 and more")
        if self.edge not in ("reflect", "zero"):
            raise DataError(f"the edge of a crop is {self.edge!r}, allowed are 'reflect' and 'zero'")

    def __str__(self) -> str:
        """What is done to training images, for people."""
        moved = f"moved by up to {self.padding} pixel{'s' * (self.padding != 1)}" if self.padding else ""
        return " and ".join(filter(None, (moved, "flipped at random" * self.flip))) or "as they are"

    def check(self, height: int, width: int) -> None:
        """Raises DataError where an image of this extent is too small to be mirrored that far."""
        if self.edge == "reflect" and self.padding >= min(height, width):
            raise DataError(
                f"images of {height} x {width} cannot be reflected by {self.padding} pixels: "
                f"pad by at most {min(height, width) - 1}, or with the edge 'zero'"
            )

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Chances for `count` images. The same number of values is drawn whatever the settings are."""
        span = 2 * self.padding + 1
        moves = torch.randint(span, (2, count), generator=generator) - self.padding
        heads = torch.rand(count, generator=generator) < 0.5
        return Draws(down=moves[0], right=moves[1], flip=heads)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """The augmented images, a pure function of the images (N, C, H, W) and the draws for them."""
        if self.padding:
            images = crop(images, draws.down, draws.right, edge=self.edge)
        return flip(images, draws.flip) if self.flip else images


def augmentation_of(level: Level, height: int, width: int, edge: Edge = "reflect") -> Augmentation:
    """The augmentation of this level for images of an extent.

    An eighth of the shorter side is the usual crop of CIFAR (4 of 32), kept in proportion for other sizes.
    """
    if level == "none":
        return Augmentation(edge=edge)
    return Augmentation(padding=min(height, width) // 8, edge=edge, flip=level == "standard")
