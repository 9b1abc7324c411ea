"""The size that pictures of any size are brought to where none is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from autowidth.lab.data.decoding import Encoded, UnreadableError, upright_extent

LARGEST = 512
"""The longest side of pictures that are taken as they are."""

SIDE = 224
"""The side that large pictures are brought to: that of most networks for photos."""

EIGHTH = 8
"""Sides that are chosen are multiples of this, since most networks halve them three times and more."""


def chosen_side(splits: Iterable[Encoded]) -> tuple[int | None, str]:
    """The side of the square that all pictures are brought to, and why, for people; None leaves them as they are.

    Pictures that have one size of at most `LARGEST` stay. All others become squares of the median of their shorter
    sides, at most `SIDE`. Only the headers of files are read; what cannot be read is passed over.
    """
    found = Counter(extent for raw in splits for data in raw.images if (extent := _extent(data)) is not None)
    if not found or (len(found) == 1 and max(next(iter(found))) <= LARGEST):
        return None, ""
    shorter = sorted(min(extent) for extent in found.elements())
    median = shorter[len(shorter) // 2]
    side = min(SIDE, median - median % EIGHTH if median >= EIGHTH else median)
    (height, width), _ = found.most_common(1)[0]
    why = f"all are {height} x {width}" if len(found) == 1 else f"they have {len(found)} sizes"
    return side, f"images resized to {side} x {side} ({why}; size sets another)"


def _extent(data: bytes | Path | None) -> tuple[int, int] | None:
    try:
        return upright_extent(data)
    except UnreadableError:
        return None
