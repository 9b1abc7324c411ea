"""What a saved run says of single pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autowidth.lab.data import CorruptImageError, DataError, pooled, scale, unit
from autowidth.lab.data.decoding import HELD, UnreadableError, decode
from autowidth.lab.saved import Opened

AT_ONCE = 64
"""Pictures that are looked at together."""

GRAY = (0.299, 0.587, 0.114)
"""What red, green and blue weigh in a gray picture (ITU-R BT.601)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The likeliest classes of a picture, the likeliest first, each with its probability."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        return asdict(self)


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """The files that the paths name, and all files below those that are folders, hidden ones excepted.

    Raises DataError for a path where nothing is, and for a folder without files.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder")
        if not path.is_file() and not path.is_dir():
            raise DataError(f"{path}: a pipe or a device, expected a file or a folder")
        inside = (
            sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith(".")) if path.is_dir() else []
        )
        if path.is_dir() and not inside:
            raise DataError(f"{path}: the folder holds no file")
        files += inside or [path]
    return files


def predicted(opened: Opened, files: Sequence[Path], *, top: int = 1) -> Iterator[Prediction]:
    """What the run says of each picture, `top` classes of each. Raises CorruptImageError for a file that is no image.

    A picture is made upright, cut around its middle and resized to what the run takes.
    """
    if top < 1:
        raise DataError(f"top {top}: give at least 1 class per picture")
    rest = iter(files)
    _, height, width = opened.input_shape
    each = 3 * height * width * opened.settings.pool**2
    while some := list(islice(rest, max(1, min(AT_ONCE, HELD // each)))):
        images = torch.cat([_pixels(opened, file) for file in some])
        with torch.no_grad():
            chances = opened.network(images).float().softmax(1)
        found = chances.topk(min(top, len(opened.classes)))
        for file, values, labels in zip(some, found.values.tolist(), found.indices.tolist(), strict=True):
            classes = tuple(opened.classes[label] for label in labels)
            yield Prediction(file=str(file), classes=classes, probabilities=tuple(values))


def _pixels(opened: Opened, file: Path) -> Tensor:
    """The picture as the network takes it, (1, C, H, W)."""
    channels, height, width = opened.input_shape
    pool = opened.settings.pool
    whole = (height * pool, width * pool)
    try:
        pixels = decode(file, whole)
    except UnreadableError as error:
        raise CorruptImageError(f"{file}: {error}") from error
    image = pooled(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], pool)
    if channels == 1:
        image = (unit(image) * torch.tensor(GRAY)[:, None, None]).sum(1, keepdim=True)
    return scale(image, torch.tensor(opened.scaling.mean), torch.tensor(opened.scaling.std))
