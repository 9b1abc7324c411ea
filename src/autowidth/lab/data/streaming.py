"""Images that stay encoded until a batch of them is wanted: worker processes decode them ahead of time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autowidth.lab.data.decoding import HELD, Picked, Side, UnreadableError, decode, stacked
from autowidth.lab.data.errors import CorruptImageError, DataError
from autowidth.lab.data.pixels import pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Images that stay encoded until a batch of them is wanted: (N, C, H, W) in uint8, once decoded.

    `encoded` holds image files as bytes or paths, and `where` says where each of them is, for people. They are resized
    to `side` where one is given, their extent is then (H, W) as `extent` says, and `pool` makes it smaller.
    `workers` processes decode them, 0 for none but this one; batches are for `device`.
    """

    encoded: Sequence[bytes | Path | None]
    where: Sequence[str]
    side: Side
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
        return replace(self, encoded=Picked(self.encoded, chosen), where=Picked(self.where, chosen))

    def to(self, device: torch.device | str) -> Pictures:
        """The same pictures, for batches on this device."""
        return replace(self, device=torch.device(device))

    def decoded(self, positions: Sequence[int]) -> Tensor:
        """(len(positions), C, H, W) in uint8, in this process, on the CPU. Raises CorruptImageError."""
        pixels = []
        for position in positions:
            try:
                pixels.append(decode(self.encoded[position], self.side, self.extent))
            except UnreadableError as error:
                raise CorruptImageError(
                    f"{self.where[position]}: {error}; it was readable when it was loaded"
                ) from error
        return pooled(stacked(pixels), self.pool)

    def batches(self, index: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each of these tensors of positions the images there, decoded ahead of time, on the device.

        Raises CorruptImageError where a file has been damaged or taken away since it was loaded, and DataError for
        batches that would fill the memory.
        """
        largest = max(map(len, index), default=0)
        if (needed := largest * 3 * math.prod(self.extent)) > HELD:
            raise DataError(
                f"a batch of {largest} images of {self.extent[0]} x {self.extent[1]} would take "
                f"{needed / 2**30:.1f} GiB decoded, allowed are {HELD / 2**30:.0f}: ask for smaller ones"
            )
        pinned = self.device.type == "cuda"  # only out of such memory is a copy to a GPU made while it computes
        chunks = [positions.tolist() for positions in index]
        for images in worked(_Decoded(self), chunks, workers=self.workers, pinned=pinned):
            if isinstance(images, str):
                raise CorruptImageError(images)
            yield images.to(self.device, non_blocking=True)


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


class Survey(Dataset[tuple[list[str | None], np.ndarray]]):
    """For a list of positions: of each image why it is unreadable, or None; and how often which pixels occur.

    The pixels are counted by channel and value after pooling, (C, 256) in int64.
    """

    def __init__(self, encoded: Sequence[bytes | Path | None], side: Side, extent: tuple[int, int], pool: int) -> None:
        self.encoded, self.side, self.extent, self.pool = encoded, side, extent, pool

    def __getitem__(self, positions: Sequence[int]) -> tuple[list[str | None], np.ndarray]:
        counts = np.zeros((3, 256), dtype=np.int64)
        return [self._count(self.encoded[position], counts) for position in positions], counts

    def _count(self, data: bytes | Path | None, counts: np.ndarray) -> str | None:
        """Adds the pixels of an image to the counts, or says why it is unreadable."""
        try:
            image = pooled(stacked([decode(data, self.side, self.extent)]), self.pool)[0]
        except UnreadableError as error:
            return str(error)
        counts += np.stack([np.bincount(channel, minlength=256) for channel in image.flatten(1).numpy()])
        return None


def worked(
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
