"""Image sets of the laboratory: every split one tensor on the device, cropped, flipped and scaled in batches.

A set that would be too large for that stays encoded, and worker processes decode its batches ahead of time; whoever
reads batches sees no difference. Letters in shapes: N images, C channels, H rows, W columns. A pixel is a fraction of
full scale, 0 to 1, as float32, or its 255-fold as uint8. Nothing is cached on disk.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_log = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "held_out", "test"]
"""A split of an image set: `held_out` is taken from the training images, for choices that the test set must not see."""

Edge: TypeAlias = Literal["reflect", "zero"]
"""What a crop sees beyond the border: the image mirrored at its outermost pixels, or black."""

FORMS = ("digits", "cifar10:PATH", "cifar100:PATH", "folder:PATH", "hf:NAME[:CONFIG]")
"""The texts that `load` takes."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

STREAM_ABOVE = 2048
"""MiB of decoded images, all splits together, above which a set is streamed unless another limit is given."""

_CHUNK = 4096  # images that are turned into floats at once: bounds the memory, not the result
_SURVEYED = 64  # images that a worker looks at before it reports
_LISTED = 12  # classes that are listed one by one where a set is described


class DataError(ValueError):
    """Data that are missing, malformed, or do not fit what was asked of them."""


class CorruptImageError(DataError):
    """A file or row that holds no readable image of the expected extent."""


class UnknownDataError(ValueError):
    """A text that names no data set."""


# --- image sets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Images that stay encoded until a batch of them is wanted: (N, C, H, W) in uint8, once decoded.

    `encoded` holds image files as bytes or paths, and `where` says where each of them is, for people. They are resized
    to squares of `side` where one is given, their extent is then (H, W) as `extent` says, and `pool` makes it smaller.
    `workers` processes decode them, 0 for none but this one; batches are for `device`.
    """

    encoded: Sequence[bytes | Path | None]
    where: Sequence[str]
    side: int | None
    extent: tuple[int, int]
    pool: int
    workers: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the decoded images."""
        return len(self), 3, self.extent[0] // self.pool, self.extent[1] // self.pool

    def __getitem__(self, index: Tensor) -> Pictures:
        """The pictures at these positions (int64), in this order, still encoded."""
        chosen = index.tolist()
        return replace(self, encoded=_Picked(self.encoded, chosen), where=_Picked(self.where, chosen))

    def to(self, device: torch.device | str) -> Pictures:
        """The same pictures, for batches on this device."""
        return replace(self, device=torch.device(device))

    def decoded(self, positions: Sequence[int]) -> Tensor:
        """(len(positions), C, H, W) in uint8, in this process, on the CPU. Raises CorruptImageError."""
        pixels = []
        for position in positions:
            try:
                pixels.append(_pixels(self.encoded[position], self.side, self.extent))
            except _UNREADABLE as error:
                where = self.where[position]
                raise CorruptImageError(f"{where}: {_reason(error)}; it was readable when it was loaded") from error
        return pooled(_stacked(pixels), self.pool)

    def batches(self, index: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each of these tensors of positions the images there, decoded ahead of time, on the device.

        Raises CorruptImageError where a file has been damaged or taken away since it was loaded.
        """
        pinned = self.device.type == "cuda"  # only out of such memory is a copy to a GPU made while it computes
        chunks = [positions.tolist() for positions in index]
        for images in _worked(_Decoded(self), chunks, workers=self.workers, pinned=pinned):
            if isinstance(images, str):
                raise CorruptImageError(images)
            yield images.to(self.device, non_blocking=True)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """A classification task: its splits, its class names, and how its images are scaled and augmented.

    `mean` and `std` are per channel, of the pixels (0 to 1) of the training split. `skipped` names the files or rows
    that held no readable image and were left out on request. `str` tells splits and class counts in a line.
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


# --- pure functions of pixels ---------------------------------------------------------------------------------------


def unit(images: Tensor) -> Tensor:
    """The pixels as float32 from 0 to 1: (N, C, H, W) in uint8 or float32 -> the same shape."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def scale(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel - mean) / std in float32: (N, C, H, W) in uint8 or float32, mean and std (C,) -> (N, C, H, W)."""
    return (unit(images) - mean[:, None, None]) / std[:, None, None]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's pixels (0 to 1), images (N, C, H, W).

    A channel that never changes gets the standard deviation 1, so that dividing by it does no harm.
    """
    count = images.numel() // images.shape[1]
    total = torch.zeros(2, images.shape[1], dtype=torch.float64, device=images.device)
    for chunk in torch.split(images, _CHUNK):
        pixels = unit(chunk).double()
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
    return _mean_and_std(*(total / count))


def _mean_and_std(mean: Tensor, square: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel from the means of its values and of their squares, (C,) each."""
    variance = square - mean.square()
    std = torch.where(variance > 1e-12, variance, torch.ones_like(variance)).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def pooled(images: Tensor, factor: int) -> Tensor:
    """Averages of factor x factor pixels, rounded in uint8: (N, C, H, W) -> (N, C, H / factor, W / factor).

    Raises DataError where `factor` is no positive divisor of H and W.
    """
    height, width = images.shape[2:]
    if factor < 1 or height % factor or width % factor:
        raise DataError(f"cannot pool images of {height} x {width} by {factor}: give a common divisor of both sides")
    if factor == 1:
        return images
    return torch.cat([_averages(chunk, factor) for chunk in torch.split(images, _CHUNK)])


def _averages(images: Tensor, factor: int) -> Tensor:
    n, c, height, width = images.shape
    mean = images.reshape(n, c, height // factor, factor, width // factor, factor).float().mean((3, 5))
    return mean.round().to(images.dtype) if images.dtype == torch.uint8 else mean


def crop(images: Tensor, down: Tensor, right: Tensor, *, edge: Edge) -> Tensor:
    """Each image seen through a window of its own extent that is moved `down` and `right` by whole pixels.

    Images (N, C, H, W), down and right (N,) int64 -> (N, C, H, W). This is the crop at a random place of a padded
    image, without the padded copy. With the edge "reflect" no window may leave its image by more than H-1 or W-1.
    """
    rows, inside_rows = _window(down, images.shape[2], edge)
    columns, inside_columns = _window(right, images.shape[3], edge)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    seen = images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    if edge == "reflect":
        return seen
    return seen * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


def _window(offset: Tensor, length: int, edge: Edge) -> tuple[Tensor, Tensor]:
    """Positions seen by each window and whether they lie inside: offset (N,) -> two of (N, length)."""
    position = offset[:, None] + torch.arange(length, device=offset.device)
    inside = (position >= 0) & (position < length)
    if edge == "reflect":
        return (length - 1) - ((length - 1) - position.abs()).abs(), inside
    return position.clamp(0, length - 1), inside


def flip(images: Tensor, which: Tensor) -> Tensor:
    """The images (N, C, H, W), mirrored left to right where `which` (N,) is true."""
    return torch.where(which[:, None, None, None], images.flip(3), images)


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


# --- batches --------------------------------------------------------------------------------------------------------


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
        generator = _generator(self.seed, epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = self.augmentation.draw(count, generator).to(device)
        starts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        windows = [(start, min(start + self.batch_size, count)) for start in starts]
        for (start, stop), (images, labels) in zip(windows, self._taken(order, windows), strict=True):
            augmented = self.augmentation.apply(images, draws.slice(start, stop))
            yield scale(augmented, self._mean, self._std), labels

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


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for every pair of numbers; close pairs are as unlike as distant ones."""
    words = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


# --- loading --------------------------------------------------------------------------------------------------------


def load(
    text: str,
    *,
    holdout: float = 0.0,
    limit: int | None = None,
    pool: int = 1,
    size: int | None = None,
    split_seed: int = 0,
    skip_corrupt: bool = False,
    stream_above: float = STREAM_ABOVE,
    workers: int | None = None,
) -> ImageSet:
    """The image set that `text` names: `digits`, `cifar10:PATH`, `cifar100:PATH`, `folder:PATH`, `hf:NAME[:CONFIG]`.

    `limit` keeps the first training images of a fixed permutation, so that a smaller limit is part of a larger one;
    `holdout` is the share of each class of those that is set apart for choices. `pool` averages that many pixels by as
    many into one. `size` is the side to which images of a folder (32 if not given) or of the hub are resized.
    All splits depend on `split_seed` alone. A file or row without a readable image is refused, or with `skip_corrupt`
    left out, logged, and named in `skipped`.

    Images that would be more than `stream_above` MiB when decoded are not kept but streamed by `workers` processes
    (None: one per core, at most 8), once they have all been looked at. The batches are the same, whatever the number
    of workers.

    Raises UnknownDataError for another text, DataError where the data do not fit what is asked, and CorruptImageError.
    """
    options = _Options(
        holdout=holdout, limit=limit, pool=pool, size=size, split_seed=split_seed, skip_corrupt=skip_corrupt,
        stream_above=stream_above, workers=_cores() if workers is None else workers,
    )  # fmt: skip
    kind, _, rest = text.partition(":")
    if size is not None and kind in ("digits", "cifar10", "cifar100"):
        raise DataError(f"images of {kind} have a size of their own: give no size, use pool to make them smaller")
    if text == "digits":
        return _finish(_digits(), options)
    if rest and kind in _READERS:
        return _finish(_READERS[kind](rest), options)
    close = difflib.get_close_matches(kind, [form.split(":")[0] for form in FORMS], n=1)
    hint = f"; did you mean {close[0]}?" if close and close[0] != kind else ""
    raise UnknownDataError(f"no data set is named {text!r}; allowed are {', '.join(FORMS)}{hint}")


def digits(split_seed: int = 0, *, holdout: float = 0.0, limit: int | None = None, pool: int = 1) -> ImageSet:
    """The 1797 handwritten digits that come with scikit-learn, 1 x 8 x 8, float32; a fifth of each class is the test.

    They are augmented by moves of up to one pixel with black beyond the border, and never flipped.
    The keywords, and what is raised, are those of `load`.
    """
    return load("digits", holdout=holdout, limit=limit, pool=pool, split_seed=split_seed)


def cifar10(
    path: str | Path,
    *,
    holdout: float = 0.0,
    limit: int | None = None,
    pool: int = 1,
    split_seed: int = 0,
    skip_corrupt: bool = False,
) -> ImageSet:
    """CIFAR-10 or CIFAR-100 out of a folder: Parquet files train*.parquet and test*.parquet, or the binary batches.

    Parquet: a column `img` or `image` of encoded images, and `label`, `fine_label` or, where there is neither,
    `coarse_label`. Binary: data_batch_*.bin and test_batch.bin, or train.bin and test.bin of CIFAR-100 with its fine
    labels; the Python version is refused, because it is pickle. Images are 3 x H x W, uint8. Where they come as lossy
    JPEG, the name of the set says so. The keywords, and what is raised, are those of `load`.
    """
    return load(
        f"cifar10:{path}", holdout=holdout, limit=limit, pool=pool, split_seed=split_seed, skip_corrupt=skip_corrupt
    )


def folder(
    path: str | Path,
    *,
    size: int = 32,
    holdout: float = 0.0,
    limit: int | None = None,
    pool: int = 1,
    split_seed: int = 0,
    skip_corrupt: bool = False,
) -> ImageSet:
    """A folder with one sub-folder of images per class, each cut to a square and resized to size x size, 3 channels.

    With sub-folders train and test (or val) that hold the classes, these are the splits; otherwise a fifth of each
    class is the test. Hidden files are passed over, every other file must be an image.
    The keywords, and what is raised, are those of `load`.
    """
    return load(
        f"folder:{path}",
        size=size,
        holdout=holdout,
        limit=limit,
        pool=pool,
        split_seed=split_seed,
        skip_corrupt=skip_corrupt,
    )


# --- from a source to an image set ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The keywords of `load`."""

    holdout: float
    limit: int | None
    pool: int
    size: int | None
    split_seed: int
    skip_corrupt: bool
    stream_above: float
    workers: int

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise DataError(f"the held-out share is {self.holdout}, allowed are 0 (none) to below 1")
        if self.size is not None and self.size < 1:
            raise DataError(f"images cannot be resized to {self.size} pixels, allowed are 1 and more")
        if self.pool < 1:
            raise DataError(f"images cannot be pooled by {self.pool}, allowed are 1 and more")
        if not self.stream_above >= 0 or self.workers < 0:
            got = f"{self.stream_above} MiB by {self.workers} workers"
            raise DataError(f"images cannot be streamed above {got}: both are 0 or more")


@dataclass(frozen=True, slots=True)
class _Picked(Sequence[Any]):
    """The items at some positions of a sequence, fetched when they are asked for."""

    items: Sequence[Any]
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: Any) -> Any:
        return self.items[self.positions[number]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """A split before it is decoded: an image file's bytes or its path, its label (N,), and where it is, for people."""

    images: Sequence[bytes | Path | None]
    labels: Tensor
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> _Encoded:
        chosen = index.tolist()
        images, where = _Picked(self.images, chosen), _Picked(self.where, chosen)
        return _Encoded(images=images, labels=self.labels[index], where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What a reader found; without a test split a fifth of each class becomes one.

    `size` is the side to which its images are resized unless another is asked for; None keeps them as they are.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | _Encoded
    test: Split | _Encoded | None
    augmentation: Augmentation | None = None
    size: int | None = None


_TEST_STREAM, _LIMIT_STREAM, _HOLDOUT_STREAM = range(3)
_TEST_SHARE = 0.2


def _finish(source: _Source, options: _Options) -> ImageSet:
    """Splits, decodes or surveys, pools, measures."""
    side = options.size or source.size
    parts = _parts(source, options)
    read = _surveyed if _too_large(parts.values(), side, options) else _decoded
    found = {part: read(raw, side, options) for part, raw in parts.items()}
    shapes = {part: tuple(it.split.images.shape[1:]) for part, it in found.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the splits of {source.name} hold images of different shapes: {shapes}")
    height, width = shapes["train"][1:]
    skipped = tuple(item for it in found.values() for item in it.skipped)
    if skipped:
        count, whole = len(skipped), sum(len(raw) for raw in parts.values())
        _log.warning("left out %d of %d images of %s; the first is %s: %s", count, whole, source.name, *skipped[0])
    mean, std = found["train"].statistics
    return ImageSet(
        name=source.name if options.pool == 1 else f"{source.name}, pooled to {height} x {width}",
        classes=source.classes,
        train=found["train"].split,
        held_out=found["held_out"].split if "held_out" in found else None,
        test=found["test"].split,
        mean=mean,
        std=std,
        # An eighth of the side is the usual crop of CIFAR (4 of 32), kept in proportion for other sizes.
        augmentation=source.augmentation or Augmentation(padding=min(height, width) // 8, flip=True),
        skipped=tuple(where for where, _ in skipped),
    )


def _parts(source: _Source, options: _Options) -> dict[Part, Split | _Encoded]:
    """The splits before they are decoded, train first."""
    seed = options.split_seed
    train, test = source.train, source.test
    if test is None:
        rest, apart = _set_apart(train.labels, _TEST_SHARE, _generator(seed, _TEST_STREAM))
        train, test = train.take(rest), train.take(apart)
    if options.limit is not None:
        train = train.take(_first(len(train), options.limit, _generator(seed, _LIMIT_STREAM)))
    parts: dict[Part, Split | _Encoded] = {"train": train, "test": test}
    if options.holdout:
        rest, apart = _set_apart(train.labels, options.holdout, _generator(seed, _HOLDOUT_STREAM))
        parts["train"], parts["held_out"] = train.take(rest), train.take(apart)
    return parts


def _set_apart(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of the rest and of this share of every class, rounded, both in rising order: labels (N,)."""
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        chosen[members[: round(share * len(members))]] = True
    if not chosen.any() or chosen.all():
        raise DataError(f"a share of {share} of each class of {len(labels)} images is none or all of them")
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def _first(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """The first `limit` positions of a permutation of `count`."""
    if not 1 <= limit <= count:
        raise DataError(f"the limit is {limit} training images, allowed are 1 to {count}")
    return torch.randperm(count, generator=generator)[:limit]


# --- image files ----------------------------------------------------------------------------------------------------

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What pillow raises for bytes that are no image, or half of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A split once its images have been read, its mean and deviation by channel, and what was left out and why."""

    split: Split
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    skipped: Sequence[tuple[str, str]] = ()


def _decoded(raw: Split | _Encoded, side: int | None, options: _Options) -> _Found:
    """The split in memory. Raises CorruptImageError where nothing may be left out."""
    if isinstance(raw, Split):
        assert isinstance(raw.images, Tensor), "no reader makes pictures"
        return _in_memory(raw.images, raw.labels, options)
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    for number, data in enumerate(raw.images):
        try:
            pixels.append(_pixels(data, side, pixels[0].shape[:2] if pixels else None))
            kept.append(number)
        except _UNREADABLE as error:
            skipped.append(_left_out(raw.where[number], _reason(error), options))
    if not pixels:
        raise DataError(f"none of {len(raw)} images can be read; the first is {raw.where[0]}")
    return _in_memory(_stacked(pixels), raw.labels[kept], options, skipped)


def _in_memory(images: Tensor, labels: Tensor, options: _Options, skipped: Sequence[tuple[str, str]] = ()) -> _Found:
    split = Split(images=(smaller := pooled(images, options.pool)), labels=labels)
    return _Found(split=split, statistics=channel_statistics(smaller), skipped=skipped)


def _left_out(where: str, reason: str, options: _Options) -> tuple[str, str]:
    """The place and the reason. Raises CorruptImageError where nothing may be left out."""
    if not options.skip_corrupt:
        raise CorruptImageError(f"{where}: {reason}; mend it, or skip corrupt images (skip_corrupt)")
    _log.info("left out %s: %s", where, reason)
    return where, reason


def _stacked(pixels: Sequence[np.ndarray]) -> Tensor:
    """n images (H, W, 3) in uint8 -> (n, 3, H, W)."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def _pixels(data: bytes | Path | None, side: int | None, extent: Sequence[int] | None = None) -> np.ndarray:
    """The image as RGB, (H, W, 3) in uint8; upright, cut to a square and resized where a side is given.

    Raises one of `_UNREADABLE`, also for an image of another extent (H, W) where one is expected.
    """
    if data is None:
        raise ValueError("there are no bytes")
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        if side is None:
            pixels = np.asarray(image.convert("RGB"))
        else:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels = np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.BILINEAR))
    if extent is not None and pixels.shape[:2] != tuple(extent):
        got, expected = (" x ".join(map(str, found)) for found in (pixels.shape[:2], extent))
        raise ValueError(f"its extent is {got}, that of the images before it is {expected}")
    return pixels


def _reason(error: BaseException) -> str:
    """What is wrong with an image, without pillow's account of the buffer that it was in."""
    return "no readable image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


# --- sets that are too large for the memory ------------------------------------------------------------------------


def _cores() -> int:
    """Processes that decode unless another number is given: one per core, at most 8."""
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(8, len(ours))


def _too_large(parts: Iterable[Split | _Encoded], side: int | None, options: _Options) -> bool:
    """Whether the decoded images of all parts together would take more than the options allow."""
    encoded = [raw for raw in parts if isinstance(raw, _Encoded)]
    extent = _extent(encoded[0], side) if encoded else None
    if extent is None:  # in memory already, or nothing can be read, which is said elsewhere
        return False
    each = 3 * math.prod(length // options.pool for length in extent)
    return each * sum(map(len, encoded)) > options.stream_above * 2**20


def _extent(raw: _Encoded, side: int | None) -> tuple[int, int] | None:
    """(H, W) of the first image that can be read, None where none can."""
    if side is not None:
        return side, side
    for data in raw.images:
        try:
            height, width = _pixels(data, None).shape[:2]
            return height, width
        except _UNREADABLE:
            continue
    return None


def _surveyed(raw: Split | _Encoded, side: int | None, options: _Options) -> _Found:
    """The split, still encoded, after every image has been decoded once. Raises CorruptImageError as `_decoded` does.

    A damaged file is thereby named before training starts, and the length of an epoch is known.
    """
    if isinstance(raw, Split) or (extent := _extent(raw, side)) is None:
        return _decoded(raw, side, options)
    pooled(torch.zeros(1, 1, *extent), options.pool)  # raises where it cannot be
    survey = _Survey(raw.images, side, extent, options.pool)
    chunks = [range(n, min(n + _SURVEYED, len(raw))) for n in range(0, len(raw), _SURVEYED)]
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    counts = np.zeros((3, 256), dtype=np.int64)
    for chunk, (reasons, more) in zip(chunks, _worked(survey, chunks, workers=options.workers), strict=True):
        for number, reason in zip(chunk, reasons, strict=True):
            if reason is None:
                kept.append(number)
            else:
                skipped.append(_left_out(raw.where[number], reason, options))
        counts += more
    if not kept:
        raise DataError(f"none of {len(raw)} images can be read; the first is {raw.where[0]}")
    left = raw.take(torch.tensor(kept))
    pictures = Pictures(
        encoded=left.images, where=left.where, side=side, extent=extent, pool=options.pool, workers=options.workers,
        device=torch.device("cpu"),
    )  # fmt: skip
    shares = torch.from_numpy(counts / counts.sum(1, keepdims=True))
    levels = unit(torch.arange(256, dtype=torch.uint8)).double()
    statistics = _mean_and_std(shares @ levels, shares @ levels.square())
    return _Found(split=Split(images=pictures, labels=left.labels), statistics=statistics, skipped=skipped)


class _Survey(Dataset[tuple[list[str | None], np.ndarray]]):
    """For a list of positions: of each image why it is unreadable, or None; and how often which pixels occur.

    The pixels are counted by channel and value after pooling, (C, 256) in int64.
    """

    def __init__(
        self, encoded: Sequence[bytes | Path | None], side: int | None, extent: tuple[int, int], pool: int
    ) -> None:
        self.encoded, self.side, self.extent, self.pool = encoded, side, extent, pool

    def __getitem__(self, positions: Sequence[int]) -> tuple[list[str | None], np.ndarray]:
        counts = np.zeros((3, 256), dtype=np.int64)
        return [self._count(self.encoded[position], counts) for position in positions], counts

    def _count(self, data: bytes | Path | None, counts: np.ndarray) -> str | None:
        """Adds the pixels of an image to the counts, or says why it is unreadable."""
        try:
            image = pooled(_stacked([_pixels(data, self.side, self.extent)]), self.pool)[0]
        except _UNREADABLE as error:
            return _reason(error)
        counts += np.stack([np.bincount(channel, minlength=256) for channel in image.flatten(1).numpy()])
        return None


class _Decoded(Dataset[Tensor | str]):
    """For a list of positions the decoded images; a sentence where one cannot be read.

    A sentence, because an exception would come out of a worker with a traceback inside its message.
    """

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __getitem__(self, positions: Sequence[int]) -> Tensor | str:
        try:
            return self.pictures.decoded(positions)
        except CorruptImageError as error:
            return str(error)


def _worked(
    dataset: Dataset[Any], chunks: Sequence[Sequence[int]], *, workers: int, pinned: bool = False
) -> Iterator[Any]:
    """What the data set gives for every chunk, in order, made ahead of time by worker processes."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=chunks,
        num_workers=min(workers, len(chunks)),
        collate_fn=_as_it_is,
        pin_memory=pinned,
        generator=torch.Generator(),  # without one the loader would move the global generator
    )
    yield from loader


def _as_it_is(batch: Any) -> Any:
    return batch


# --- readers --------------------------------------------------------------------------------------------------------

_JPEG = b"\xff\xd8\xff"


def _digits() -> _Source:
    from sklearn.datasets import load_digits  # here: scikit-learn takes a second to import

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # grey levels are 0 to 16
    everything = Split(images=images, labels=torch.from_numpy(bunch.target).long())
    augmentation = Augmentation(padding=1, edge="zero")
    return _Source(name="digits", classes=_numbered(10), train=everything, test=None, augmentation=augmentation)


def _cifar(text: str) -> _Source:
    place = _existing_folder(text)
    for inner in (place, place / "cifar-10-batches-bin", place / "cifar-100-binary"):
        if (inner / "test_batch.bin").exists():
            return _binary("CIFAR-10", inner, "data_batch_*.bin", "test_batch.bin", CIFAR10_CLASSES, label_bytes=1)
        if (inner / "test.bin").exists():
            return _binary("CIFAR-100", inner, "train.bin", "test.bin", _numbered(100), label_bytes=2)
    train_files, test_files = _parquet_files(place, "train"), _parquet_files(place, "test")
    if not train_files or not test_files:
        _refuse_pickle(place)
        missing = "test*.parquet" if train_files else "train*.parquet"
        raise DataError(f"{place} holds no {missing} and no binary batches of CIFAR: give the folder that does")
    train, test = _Table.read(train_files), _Table.read(test_files)
    classes = train.classes(test)
    name = {10: "CIFAR-10", 100: "CIFAR-100"}.get(len(classes), place.name)
    lossy = any(isinstance(data, bytes) and data.startswith(_JPEG) for data in train.encoded.images)
    return _Source(name=f"{name} (JPEG)" if lossy else name, classes=classes, train=train.encoded, test=test.encoded)


_PICKLED = {"CIFAR-10": ("cifar-10-batches-py", "data_batch_1"), "CIFAR-100": ("cifar-100-python", "train")}
"""The folder and a file of the Python version."""


def _refuse_pickle(place: Path) -> None:
    """Raises DataError where the Python version of CIFAR lies."""
    for name, (inner, file) in _PICKLED.items():
        if found := next((folder for folder in (place, place / inner) if (folder / file).is_file()), None):
            raise DataError(
                f"{found} holds the Python version of {name}, which is pickle and would run what code is in it: "
                f"take the binary version, {name.lower()}-binary.tar.gz"
            )


def _cifar100(text: str) -> _Source:
    source = _cifar(text)
    if (count := len(source.classes)) not in (100, 20):
        raise DataError(
            f"{text} holds {count} classes, those of CIFAR-100 are 100 or, coarsely, 20: try cifar10:{text}"
        )
    return source


def _folder(text: str) -> _Source:
    place = _existing_folder(text)
    tests = [place / name for name in ("test", "val") if (place / name).is_dir()]
    if not (place / "train").is_dir() or not tests:
        classes = _class_folders(place)
        return _Source(name=place.name, classes=classes, train=_class_files(place, classes), test=None, size=32)
    classes = _class_folders(place / "train")
    if unknown := set(_class_folders(tests[0])) - set(classes):
        raise DataError(f"{tests[0]} holds the class {min(unknown)!r}, which {place / 'train'} does not have")
    train, test = _class_files(place / "train", classes), _class_files(tests[0], classes)
    return _Source(name=place.name, classes=classes, train=train, test=test, size=32)


def _hub(text: str) -> _Source:
    try:
        import datasets  # here: an extra, and slow to import
    except ImportError as error:
        remedy = "pip install 'autowidth[hub]'"
        raise DataError(f"hf:{text} needs the package datasets, which is not installed: {remedy}") from error
    name, _, configuration = text.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load hf:{text}: {error}") from error
    if "train" not in found:
        raise DataError(f"hf:{text} has the splits {', '.join(found)}, expected one named train")
    features = found["train"].features
    image, label = _columns(list(features), f"hf:{text}")
    if not isinstance(features[label], datasets.ClassLabel):
        raise DataError(f"the column {label!r} of hf:{text} is {features[label]}, expected class labels")
    encoded = {}
    for part in [part for part in ("train", "test", "validation") if part in found]:
        rows = found[part].cast_column(image, datasets.Image(decode=False)).select_columns([image])
        encoded[part] = _encoded(_HubImages(rows, image), found[part][label], f"hf:{text} {part}")
    test = encoded.get("test", encoded.get("validation"))
    return _Source(name=name, classes=tuple(features[label].names), train=encoded["train"], test=test)


_READERS: Mapping[str, Callable[[str], _Source]] = {
    "cifar10": _cifar,
    "cifar100": _cifar100,
    "folder": _folder,
    "hf": _hub,
}


@dataclass(frozen=True, slots=True)
class _HubImages(Sequence[Any]):
    """The encoded images in a column of a hub's table, which stays on the disk until they are asked for."""

    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return _content(self.rows[number][self.column])


def _existing_folder(text: str) -> Path:
    place = Path(text).expanduser()
    if not place.is_dir():
        raise DataError(f"there is no folder {place}" + (": it is a file, give its folder" if place.exists() else ""))
    return place.resolve()


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _class_folders(place: Path) -> tuple[str, ...]:
    """Names of the sub-folders, in order. Raises DataError where there are none."""
    found = sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{place} holds no folder: expected one per class with its images in it")
    return tuple(found)


def _class_files(place: Path, classes: Sequence[str]) -> _Encoded:
    """All files of the class folders in `place`. Raises DataError for a class folder without files."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = (place / name).rglob("*") if (place / name).is_dir() else ()
        found = sorted(entry for entry in entries if entry.is_file() and not entry.name.startswith("."))
        if not found:
            raise DataError(f"the class folder {place / name} holds no file: put images into it or remove the class")
        files += found
        labels += [label] * len(found)
    return _Encoded(images=files, labels=torch.tensor(labels), where=[str(file) for file in files])


def _encoded(images: Sequence[bytes | Path | None], labels: Iterable[int | None], place: str) -> _Encoded:
    """Rows of a table. Raises DataError for a missing label."""
    numbers = []
    for row, label in enumerate(labels):
        if label is None or label < 0:
            raise DataError(f"{place}, row {row} has the label {label}, expected a number from 0 on")
        numbers.append(label)
    where = [f"{place}, row {row}" for row in range(len(numbers))]
    return _Encoded(images=images, labels=torch.tensor(numbers), where=where)


def _content(image: object) -> bytes | Path | None:
    """The image in a row of a table: bytes, or a mapping with bytes or a path; None where there is neither."""
    if isinstance(image, Mapping):
        if image.get("bytes") is None and image.get("path"):
            return Path(str(image["path"]))
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


_CIFAR100_LABELS = {"fine_label": 100, "coarse_label": 20}
"""Columns of labels of CIFAR-100, and how many classes each tells apart. The first that is there counts."""


def _columns(present: Sequence[str], place: str) -> tuple[str, str]:
    """The names of the image and label columns. Raises DataError where one is missing."""
    image = next((name for name in ("img", "image") if name in present), None)
    label = next((name for name in ("label", *_CIFAR100_LABELS) if name in present), None)
    if image is None or label is None:
        wanted = "img or image" if image is None else "label, fine_label or coarse_label"
        raise DataError(f"{place} has the columns {', '.join(present)}, expected one named {wanted}")
    return image, label


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Parquet files of one split; `names` of the classes where the files tell them."""

    encoded: _Encoded
    names: tuple[str, ...] | None

    @classmethod
    def read(cls, files: Sequence[Path]) -> _Table:
        """All rows, still encoded. Raises DataError for a file that is not Parquet or lacks a column."""
        import pyarrow
        from pyarrow import parquet  # here: half a second to import

        parts: list[_Encoded] = []
        names: tuple[str, ...] | None = None
        for file in files:
            try:
                schema = parquet.read_schema(file)
                image, label = _columns(schema.names, str(file))
                table = parquet.read_table(file, columns=[image, label])
            except pyarrow.ArrowException as error:
                raise DataError(f"{file} is no readable Parquet file: {error}") from error
            names = names or _label_names(schema.metadata, label)
            if names is None and label in _CIFAR100_LABELS:
                names = _numbered(_CIFAR100_LABELS[label])
            images = [_content(row) for row in table[image].to_pylist()]
            parts.append(_encoded(images, table[label].to_pylist(), file.name))
        contents = [content for part in parts for content in part.images]
        where = [place for part in parts for place in part.where]
        labels = torch.cat([part.labels for part in parts])
        return cls(encoded=_Encoded(images=contents, labels=labels, where=where), names=names)

    def classes(self, other: _Table) -> tuple[str, ...]:
        """The classes of this and the other split. Raises DataError, with the row, where a label has no class."""
        names = self.names or other.names
        highest = int(max(self.encoded.labels.max(), other.encoded.labels.max()))
        if names is None:
            return CIFAR10_CLASSES if highest < 10 else _numbered(highest + 1)
        for encoded in (self.encoded, other.encoded):
            for where, label in zip(encoded.where, encoded.labels.tolist(), strict=True):
                if label >= len(names):
                    raise DataError(f"{where} has the label {label}, allowed are 0 to {len(names) - 1}")
        return names


def _parquet_files(place: Path, part: str) -> list[Path]:
    """The files of one split, in the folder or in one below it. Raises DataError where several folders hold some."""
    found = sorted(place.glob(f"{part}*.parquet")) or sorted(place.glob(f"*/{part}*.parquet"))
    if len({file.parent for file in found}) > 1:
        homes = ", ".join(sorted({file.parent.name for file in found}))
        raise DataError(f"{place} holds {part}*.parquet in several folders ({homes}): give one of them")
    return found


def _label_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Class names that the datasets library left in a Parquet schema, if it did."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return None


def _binary(name: str, place: Path, train: str, test: str, classes: tuple[str, ...], *, label_bytes: int) -> _Source:
    """CIFAR's binary records: label bytes, the last of which counts, then 3 x 32 x 32 pixels."""
    files = sorted(place.glob(train))
    if not files:
        raise DataError(f"{place} holds {test} but no {train}: put all binary batches into one folder")
    parts = [_records(file, classes=len(classes), label_bytes=label_bytes) for file in files]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    last = _records(place / test, classes=len(classes), label_bytes=label_bytes)
    train_split, test_split = Split(images=images, labels=labels), Split(images=last[0], labels=last[1])
    return _Source(name=name, classes=classes, train=train_split, test=test_split)


def _records(file: Path, *, classes: int, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Images and labels in one file."""
    pixels = 3 * 32 * 32
    content = np.fromfile(file, dtype=np.uint8)
    if not content.size or content.size % (label_bytes + pixels):
        raise DataError(f"{file} has {content.size} bytes, expected a multiple of {label_bytes + pixels}")
    rows = content.reshape(-1, label_bytes + pixels)
    labels = rows[:, label_bytes - 1].astype(np.int64)
    if (bad := np.flatnonzero(labels >= classes)).size:
        raise DataError(f"{file}, row {bad[0]} has the label {labels[bad[0]]}, allowed are 0 to {classes - 1}")
    images = torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels)
