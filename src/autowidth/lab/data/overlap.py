"""Test images that are training images too: found by their content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from autowidth.lab.data.splits import Split
from autowidth.lab.data.streaming import Pictures

_log = logging.getLogger(__name__)


def warn_of_overlap(name: str, train: Iterable[Split], test: Split) -> None:
    """Warns where test images are training images too, to the last pixel or byte, and says how many.

    `train` is all that training or choices may see. A set is not refused: many have a few duplicates, and whoever asks
    what a network knows by heart brings nothing else.
    """
    known = list(train)
    seen = _known_contents(known, test)
    found = sum(digest in seen for digest in _contents(test, _sizes(known)))
    if found:
        _log.warning(
            "%d of %d test images of %s (%.1f %%) are training images too: accuracy says that much less of new images",
            found, len(test), name, 100 * found / len(test),
        )  # fmt: skip


def _known_contents(splits: Iterable[Split], test: Split) -> set[bytes]:
    sizes = _sizes([test])
    return {digest for split in splits for digest in _contents(split, sizes)}


def _sizes(splits: Iterable[Split]) -> set[int]:
    """The lengths in bytes of all images that are streamed: only files of equal length can be equal."""
    return {_length(data) for split in splits if isinstance(split.images, Pictures) for data in split.images.encoded}


def _contents(split: Split, sizes: set[int]) -> Iterator[bytes]:
    """A digest of each image: of its pixels, or of the file where it is streamed and its length is among these."""
    if isinstance(split.images, Pictures):
        for data in split.images.encoded:
            if data is not None and _length(data) in sizes:
                yield _digest(data.read_bytes() if isinstance(data, Path) else data)
        return
    for image in split.images.cpu().numpy():
        yield _digest(image.tobytes())


def _length(data: bytes | Path | None) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data or b"")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
