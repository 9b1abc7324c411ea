"""Image files and their pixels: which formats are read, and what is said of a file that cannot be."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from autowidth.lab.data.errors import packages_for
from autowidth.reading import ReadError, open_regular

if TYPE_CHECKING:  # pillow belongs to an extra, and is imported where an image is read
    from PIL.Image import Image as PillowImage

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What an image file may be, whatever its name says. Pillow knows more formats, and hands some of them to programs
that it finds on the machine: EPS to Ghostscript, which runs what is written in the file."""


MOST_PIXELS = 50_000_000
"""Pixels that an image may have: decoding takes 6 to 12 bytes for each, whatever the file takes. A PNG of 21 kB can
hold so many that a machine runs out of memory."""

FILE_LIMIT = 1 << 28
"""Bytes that an image file may have."""

HELD = 2 << 30
"""Bytes of decoded images that one process holds for one batch."""

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)
"""The EXIF tag that says how a picture is turned, and its values where height and width change places."""


class UnreadableError(ValueError):
    """An image that cannot be read; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Picked(Sequence[Any]):
    """The items at some positions of a sequence, fetched when they are asked for."""

    items: Sequence[Any]
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: Any) -> Any:
        return self.items[self.positions[number]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A split before it is decoded: an image file's bytes or its path, its label (N,), and where it is, for people.

    Raises DataError where pillow, which decodes, is not installed: here, before a worker process needs it.
    """

    images: Sequence[bytes | Path | None]
    labels: Tensor
    where: Sequence[str]

    def __post_init__(self) -> None:
        with packages_for("an image file"):
            import PIL  # noqa: F401

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Encoded:
        chosen = index.tolist()
        images, where = Picked(self.images, chosen), Picked(self.where, chosen)
        return Encoded(images=images, labels=self.labels[index], where=where)


Side: TypeAlias = "int | tuple[int, int] | None"
"""What images are cut and resized to: a square of this side, a rectangle (H, W), or nothing, which leaves them."""


def decode(data: bytes | Path | None, side: Side, extent: Sequence[int] | None = None) -> np.ndarray:
    """The image as RGB, (H, W, 3) in uint8, upright; cut and resized where a side is given.

    Raises UnreadableError for what is no image in one of `FORMATS`, or half of one, for one of more than `MOST_PIXELS`,
    before it is decoded, and for an image of another extent (H, W) where one is expected.
    """
    with _image(data) as image:
        _check_extent(_upright(image), None if side else extent)
        return _rgb(image, side)


@contextmanager
def _image(data: bytes | Path | None) -> Iterator[PillowImage]:
    """The image, of which only the header has been read. Raises UnreadableError, also for what is done with it."""
    from PIL import Image, UnidentifiedImageError

    if data is None:
        raise UnreadableError("there are no bytes")
    try:
        with _opened(data) as file, _quiet(), Image.open(file, formats=FORMATS) as image:
            _check_pixels(image)  # before anything is asked of it that decodes it, as the orientation of a PNG does
            yield image
    except (UnreadableError, ReadError) as error:
        raise UnreadableError(str(error)) from error
    except UnidentifiedImageError as error:
        raise UnreadableError(_foreign(data) or "no readable image") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"it has far more pixels than the {MOST_PIXELS / 1e6:,.0f} million allowed") from error
    except Exception as error:  # the readers of some formats raise whatever half a file makes of them
        raise UnreadableError(str(error) or type(error).__name__) from error


def _check_pixels(image: PillowImage) -> None:
    """Raises UnreadableError for an image with too many pixels, by its header alone."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UnreadableError(
            f"it has {width:,} x {height:,} pixels, allowed are {MOST_PIXELS / 1e6:,.0f} million: make it smaller"
        )


def _check_extent(size: tuple[int, int], extent: Sequence[int] | None) -> None:
    """Raises UnreadableError for an image (H, W) of another extent."""
    height, width = size
    if extent is not None and (height, width) != tuple(extent):
        got, expected = f"{height} x {width}", " x ".join(map(str, extent))
        raise UnreadableError(f"its extent is {got}, that of the images before it is {expected}")


def _opened(data: bytes | Path) -> BinaryIO:
    """The content for reading; of a path only a regular file."""
    return io.BytesIO(data) if isinstance(data, bytes) else open_regular(data, limit=FILE_LIMIT)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pillow's warning of images that are nearly too large for it: what is too large for us is refused."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _rgb(image: PillowImage, side: Side) -> np.ndarray:
    """The pixels (H, W, 3) of the upright image, whole, or cut around its middle and resized."""
    from PIL import Image, ImageOps

    upright = _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    if side is None:
        return np.asarray(upright)
    height, width = (side, side) if isinstance(side, int) else side
    return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR))


def _eight_bit(image: PillowImage) -> PillowImage:
    """Gray values of 16 bits as 8, which pillow would cut off at 255; any other image as it is."""
    from PIL import Image

    if image.mode == "F":
        raise UnreadableError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64) / 257
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def upright_extent(data: bytes | Path | None) -> tuple[int, int]:
    """(H, W) of the upright image, read from its header. Raises UnreadableError as `decode` does."""
    with _image(data) as image:
        return _upright(image)


def _upright(image: PillowImage) -> tuple[int, int]:
    """(H, W) of the image once it stands upright."""
    turned = image.getexif().get(_ORIENTATION, 1) in _LYING
    return image.size if turned else (image.height, image.width)


def _foreign(data: bytes | Path) -> str | None:
    """What to say of a file that begins as one of a format that pillow knows and we do not read; else None."""
    from PIL import Image

    Image.init()
    with _opened(data) as file:
        start = file.read(16)
    for name, (_, begins) in Image.OPEN.items():
        try:
            if name not in FORMATS and begins is not None and begins(start):
                return f"its format is {name}, allowed are {', '.join(FORMATS)}"
        except (SyntaxError, IndexError, TypeError, ValueError, struct.error):  # as pillow does: too short to be told
            continue
    return None


def stacked(pixels: Sequence[np.ndarray]) -> Tensor:
    """n images (H, W, 3) in uint8 -> (n, 3, H, W)."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def extent_of(raw: Encoded, side: Side) -> tuple[int, int] | None:
    """(H, W) of the first image that can be read, None where none can."""
    if side is not None:
        return (side, side) if isinstance(side, int) else side
    for data in raw.images:
        try:
            height, width = decode(data, None).shape[:2]
            return height, width
        except UnreadableError:
            continue
    return None
