"""Image sets of the laboratory: every split one tensor on the device, cropped, flipped and scaled in batches.

Letters in shapes: N images, C channels, H rows, W columns. A pixel is a fraction of full scale, 0 to 1, as float32, or
its 255-fold as uint8. Nothing is cached on disk.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_log = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "held_out", "test"]
"""A split of an image set: `held_out` is taken from the training images, for choices that the test set must not see."""

Edge: TypeAlias = Literal["reflect", "zero"]
"""What a crop sees beyond the border: the image mirrored at its outermost pixels, or black."""

FORMS = ("digits", "cifar10:PATH", "folder:PATH", "hf:NAME[:CONFIG]")
"""The texts that `load` takes."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CHUNK = 4096  # images that are turned into floats at once: bounds the memory, not the result


class DataError(ValueError):
    """Data that are missing, malformed, or do not fit what was asked of them."""


class CorruptImageError(DataError):
    """A file or row that holds no readable image of the expected extent."""


class UnknownDataError(ValueError):
    """A text that names no data set."""


# --- image sets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images (N, C, H, W) in float32 or uint8 and their labels (N,) in int64, on one device.

    Raises DataError where the tensors do not fit each other, or hold no image.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.float32, torch.uint8):
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
    that held no readable image and were left out on request.
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
    mean, square = total / count
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
        order = order.to(device)
        draws = self.augmentation.draw(count, generator).to(device)
        for start in range(first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            stop = min(start + self.batch_size, count)
            batch = self.split.take(order[start:stop])
            images = self.augmentation.apply(batch.images, draws.slice(start, stop))
            yield scale(images, self._mean, self._std), batch.labels

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
) -> ImageSet:
    """The image set that `text` names: `digits`, `cifar10:PATH`, `folder:PATH`, `hf:NAME[:CONFIG]`.

    `limit` keeps the first training images of a fixed permutation, so that a smaller limit is part of a larger one;
    `holdout` is the share of each class of those that is set apart for choices. `pool` averages that many pixels by as
    many into one. `size` is the side to which images of a folder (32 if not given) or of the hub are resized.
    All splits depend on `split_seed` alone. A file or row without a readable image is refused, or with `skip_corrupt`
    left out, logged, and named in `skipped`.
    Raises UnknownDataError for another text, DataError where the data do not fit what is asked, and CorruptImageError.
    """
    options = _Options(
        holdout=holdout, limit=limit, pool=pool, size=size, split_seed=split_seed, skip_corrupt=skip_corrupt
    )
    kind, _, rest = text.partition(":")
    if size is not None and kind in ("digits", "cifar10"):
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

    Parquet: a column `img` or `image` of encoded images, and `label` or `fine_label`. Binary: data_batch_*.bin and
    test_batch.bin, or train.bin and test.bin of CIFAR-100 with its fine labels. Images are 3 x H x W, uint8. Where they
    come as lossy JPEG, the name of the set says so. The keywords, and what is raised, are those of `load`.
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

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise DataError(f"the held-out share is {self.holdout}, allowed are 0 (none) to below 1")
        if self.size is not None and self.size < 1:
            raise DataError(f"images cannot be resized to {self.size} pixels, allowed are 1 and more")


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
        images, where = [self.images[i] for i in chosen], [self.where[i] for i in chosen]
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
    """Splits, decodes, pools, measures."""
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
    splits: dict[Part, Split] = {}
    skipped: list[str] = []
    for part, raw in parts.items():
        split, left_out = _decoded(raw, options.size or source.size, skip_corrupt=options.skip_corrupt)
        splits[part] = replace(split, images=pooled(split.images, options.pool))
        skipped += left_out
    shapes = {part: tuple(split.images.shape[1:]) for part, split in splits.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the splits of {source.name} hold images of different shapes: {shapes}")
    height, width = splits["train"].images.shape[2:]
    mean, std = channel_statistics(splits["train"].images)
    return ImageSet(
        name=source.name if options.pool == 1 else f"{source.name}, pooled to {height} x {width}",
        classes=source.classes,
        train=splits["train"],
        held_out=splits.get("held_out"),
        test=splits["test"],
        mean=mean,
        std=std,
        # An eighth of the side is the usual crop of CIFAR (4 of 32), kept in proportion for other sizes.
        augmentation=source.augmentation or Augmentation(padding=min(height, width) // 8, flip=True),
        skipped=tuple(skipped),
    )


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


def _decoded(raw: Split | _Encoded, size: int | None, *, skip_corrupt: bool) -> tuple[Split, list[str]]:
    """The split, and what was left out of it. Raises CorruptImageError where nothing may be left out."""
    if isinstance(raw, Split):
        return raw, []
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    skipped: list[str] = []
    for number, (data, where) in enumerate(zip(raw.images, raw.where, strict=True)):
        try:
            image = _pixels(data, size)
            if pixels and image.shape != pixels[0].shape:
                got, expected = (f"{a.shape[0]} x {a.shape[1]}" for a in (image, pixels[0]))
                raise ValueError(f"its extent is {got}, that of the images before it is {expected}")
        except _UNREADABLE as error:
            if not skip_corrupt:
                raise CorruptImageError(f"{where}: {_reason(error)}; mend it, or skip corrupt images") from error
            _log.warning("left out %s: %s", where, _reason(error))
            skipped.append(where)
            continue
        pixels.append(image)
        kept.append(number)
    if not pixels:
        raise DataError(f"none of {len(raw)} images can be read; the first is {raw.where[0]}")
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Split(images=images, labels=raw.labels[kept]), skipped


def _pixels(data: bytes | Path | None, size: int | None) -> np.ndarray:
    """The image as RGB, (H, W, 3) in uint8; upright, cut to a square and resized where a size is given."""
    if data is None:
        raise ValueError("there are no bytes")
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        if size is None:
            return np.asarray(image.convert("RGB"))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))


def _reason(error: BaseException) -> str:
    """What is wrong with an image, without pillow's account of the buffer that it was in."""
    return "no readable image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


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
        missing = "test*.parquet" if train_files else "train*.parquet"
        raise DataError(f"{place} holds no {missing} and no binary batches of CIFAR: give the folder that does")
    train, test = _Table.read(train_files), _Table.read(test_files)
    classes = train.classes(test)
    name = {10: "CIFAR-10", 100: "CIFAR-100"}.get(len(classes), place.name)
    lossy = any(isinstance(data, bytes) and data.startswith(_JPEG) for data in train.encoded.images)
    return _Source(name=f"{name} (JPEG)" if lossy else name, classes=classes, train=train.encoded, test=test.encoded)


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
        rows = found[part].cast_column(image, datasets.Image(decode=False))
        encoded[part] = _encoded(rows[image], rows[label], f"hf:{text} {part}")
    test = encoded.get("test", encoded.get("validation"))
    return _Source(name=name, classes=tuple(features[label].names), train=encoded["train"], test=test)


_READERS: Mapping[str, Callable[[str], _Source]] = {"cifar10": _cifar, "folder": _folder, "hf": _hub}


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


def _encoded(images: Iterable[object], labels: Iterable[int | None], place: str) -> _Encoded:
    """Rows of a table: an image is bytes, or a mapping with bytes or a path. Raises DataError for a missing label."""
    where, contents, numbers = [], [], []
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label is None or label < 0:
            raise DataError(f"{place}, row {row} has the label {label}, expected a number from 0 on")
        where.append(f"{place}, row {row}")
        contents.append(_content(image))
        numbers.append(label)
    return _Encoded(images=contents, labels=torch.tensor(numbers), where=where)


def _content(image: object) -> bytes | Path | None:
    if isinstance(image, Mapping):
        if image.get("bytes") is None and image.get("path"):
            return Path(str(image["path"]))
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


def _columns(present: Sequence[str], place: str) -> tuple[str, str]:
    """The names of the image and label columns. Raises DataError where one is missing."""
    image = next((name for name in ("img", "image") if name in present), None)
    label = next((name for name in ("label", "fine_label") if name in present), None)
    if image is None or label is None:
        wanted = "img or image" if image is None else "label or fine_label"
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
            if names is None and label == "fine_label":
                names = _numbered(100)
            parts.append(_encoded(table[image].to_pylist(), table[label].to_pylist(), file.name))
        images = [image for part in parts for image in part.images]
        where = [place for part in parts for place in part.where]
        labels = torch.cat([part.labels for part in parts])
        return cls(encoded=_Encoded(images=images, labels=labels, where=where), names=names)

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
    parts = [_records(file, classes=len(classes), label_bytes=label_bytes) for file in (*files, place / test)]
    images = torch.cat([part.images for part in parts[:-1]])
    joined = Split(images=images, labels=torch.cat([part.labels for part in parts[:-1]]))
    return _Source(name=name, classes=classes, train=joined, test=parts[-1])


def _records(file: Path, *, classes: int, label_bytes: int) -> Split:
    pixels = 3 * 32 * 32
    content = np.fromfile(file, dtype=np.uint8)
    if not content.size or content.size % (label_bytes + pixels):
        raise DataError(f"{file} has {content.size} bytes, expected a multiple of {label_bytes + pixels}")
    rows = content.reshape(-1, label_bytes + pixels)
    labels = rows[:, label_bytes - 1].astype(np.int64)
    if (bad := np.flatnonzero(labels >= classes)).size:
        raise DataError(f"{file}, row {bad[0]} has the label {labels[bad[0]]}, allowed are 0 to {classes - 1}")
    images = torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return Split(images=images, labels=torch.from_numpy(labels))
