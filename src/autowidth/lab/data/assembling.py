"""From what a reader found to an image set: splits, decodes or surveys, pools, measures."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autowidth.lab.data.augment import augmentation_of
from autowidth.lab.data.decoding import MOST_PIXELS, Encoded, Side, UnreadableError, decode, extent_of, stacked
from autowidth.lab.data.errors import CorruptImageError, DataError
from autowidth.lab.data.extents import chosen_side
from autowidth.lab.data.overlap import warn_of_overlap
from autowidth.lab.data.pixels import channel_statistics, mean_and_std, pooled, unit
from autowidth.lab.data.sets import ImageSet
from autowidth.lab.data.sources import Source
from autowidth.lab.data.splits import Part, Split, first_of, generator_of, set_apart
from autowidth.lab.data.streaming import Pictures, Survey, worked

_log = logging.getLogger(__name__)

_SURVEYED = 64  # images that a worker looks at before it reports


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The keywords of `load`."""

    holdout: float
    limit: int | None
    pool: int
    size: Side
    split_seed: int
    skip_corrupt: bool
    stream_above: float
    workers: int

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise DataError(f"the held-out share is {self.holdout}, allowed are 0 (none) to below 1")
        if self.size is not None and np.min(self.size) < 1:
            raise DataError(f"images cannot be resized to {self.size} pixels, allowed are 1 and more")
        if self.size is not None and np.max(self.size) ** 2 > MOST_PIXELS:
            most = math.isqrt(MOST_PIXELS)
            raise DataError(f"images cannot be resized to {self.size} pixels, allowed are at most {most}")
        if self.pool < 1:
            raise DataError(f"images cannot be pooled by {self.pool}, allowed are 1 and more")
        if not self.stream_above >= 0 or self.workers < 0:
            got = f"{self.stream_above} MiB by {self.workers} workers"
            raise DataError(f"images cannot be streamed above {got}: both are 0 or more")


_TEST_STREAM, _LIMIT_STREAM, _HOLDOUT_STREAM = range(3)
_TEST_SHARE = 0.2


def assembled(source: Source, options: Options) -> ImageSet:
    """Splits, decodes or surveys, pools, measures."""
    if len(source.classes) < 2:
        raise DataError(
            f"{source.name} has one class only, {', '.join(source.classes)}: a network would be right without looking; "
            "give images of at least two"
        )
    parts = _parts(source, options)
    encoded = [raw for raw in parts.values() if isinstance(raw, Encoded)]
    chosen, resized = chosen_side(encoded) if source.any_size and options.size is None else (None, "")
    side = options.size or chosen
    read = _surveyed if _too_large(parts.values(), side, options) else _decoded
    found = {part: read(raw, side, options) for part, raw in parts.items()}
    shapes = {part: tuple(it.split.images.shape[1:]) for part, it in found.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"the splits of {source.name} hold images of different shapes: {shapes}")
    height, width = shapes["train"][1:]
    warn_of_overlap(source.name, [it.split for part, it in found.items() if part != "test"], found["test"].split)
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
        augmentation=source.augmentation or augmentation_of("standard", height, width),
        skipped=tuple(where for where, _ in skipped),
        resized=resized,
    )


def _parts(source: Source, options: Options) -> dict[Part, Split | Encoded]:
    """The splits before they are decoded, train first."""
    seed = options.split_seed
    train, test = source.train, source.test
    if test is None:
        rest, apart = set_apart(train.labels, _TEST_SHARE, generator_of(seed, _TEST_STREAM))
        train, test = train.take(rest), train.take(apart)
    if options.limit is not None:
        train = train.take(first_of(len(train), options.limit, generator_of(seed, _LIMIT_STREAM)))
    parts: dict[Part, Split | Encoded] = {"train": train, "test": test}
    if options.holdout:
        rest, apart = set_apart(train.labels, options.holdout, generator_of(seed, _HOLDOUT_STREAM))
        parts["train"], parts["held_out"] = train.take(rest), train.take(apart)
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A split once its images have been read, its mean and deviation by channel, and what was left out and why."""

    split: Split
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    skipped: Sequence[tuple[str, str]] = ()


def _decoded(raw: Split | Encoded, side: Side, options: Options) -> _Found:
    """The split in memory. Raises CorruptImageError where nothing may be left out."""
    if isinstance(raw, Split):
        assert isinstance(raw.images, Tensor), "no reader makes pictures"
        return _in_memory(raw.images, raw.labels, options)
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    for number, data in enumerate(raw.images):
        try:
            pixels.append(decode(data, side, pixels[0].shape[:2] if pixels else None))
            kept.append(number)
        except UnreadableError as error:
            skipped.append(_left_out(raw.where[number], str(error), options))
    if not pixels:
        raise DataError(f"none of {len(raw)} images can be read; the first is {raw.where[0]}")
    return _in_memory(stacked(pixels), raw.labels[kept], options, skipped)


def _in_memory(images: Tensor, labels: Tensor, options: Options, skipped: Sequence[tuple[str, str]] = ()) -> _Found:
    split = Split(images=(smaller := pooled(images, options.pool)), labels=labels)
    return _Found(split=split, statistics=channel_statistics(smaller), skipped=skipped)


def _left_out(where: str, reason: str, options: Options) -> tuple[str, str]:
    """The place and the reason. Raises CorruptImageError where nothing may be left out."""
    if not options.skip_corrupt:
        raise CorruptImageError(f"{where}: {reason}; mend it, or skip corrupt images (skip_corrupt)")
    _log.info("left out %s: %s", where, reason)
    return where, reason


def _too_large(parts: Iterable[Split | Encoded], side: Side, options: Options) -> bool:
    """Whether the decoded images of all parts together would take more than the options allow."""
    encoded = [raw for raw in parts if isinstance(raw, Encoded)]
    extent = extent_of(encoded[0], side) if encoded else None
    if extent is None:  # in memory already, or nothing can be read, which is said elsewhere
        return False
    each = 3 * math.prod(length // options.pool for length in extent)
    return each * sum(map(len, encoded)) > options.stream_above * 2**20


def _surveyed(raw: Split | Encoded, side: Side, options: Options) -> _Found:
    """The split, still encoded, after every image has been decoded once. Raises CorruptImageError as `_decoded` does.

    A damaged file is thereby named before training starts, and the length of an epoch is known.
    """
    if isinstance(raw, Split) or (extent := extent_of(raw, side)) is None:
        return _decoded(raw, side, options)
    pooled(torch.zeros(1, 1, *extent), options.pool)  # raises where it cannot be
    survey = Survey(raw.images, side, extent, options.pool)
    chunks = [range(n, min(n + _SURVEYED, len(raw))) for n in range(0, len(raw), _SURVEYED)]
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    counts = np.zeros((3, 256), dtype=np.int64)
    for chunk, (reasons, more) in zip(chunks, worked(survey, chunks, workers=options.workers), strict=True):
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
    statistics = mean_and_std(shares @ levels, shares @ levels.square())
    return _Found(split=Split(images=pictures, labels=left.labels), statistics=statistics, skipped=skipped)
