"""Images that would fill the memory, start a program, or keep a reader waiting are refused before they are decoded."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autowidth.lab import data
from autowidth.lab.data import CorruptImageError, DataError
from autowidth.lab.data.decoding import FORMATS, HELD, MOST_PIXELS, UnreadableError, decode
from autowidth.lab.data.streaming import Pictures


def png(width: int, height: int) -> bytes:
    """A black picture of this extent, gray, as small as it can be."""
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(1 + width)) for _ in range(height)) + compressor.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("width", "height"), [(7_200, 7_000), (9_000, 9_500), (13_000, 13_000), (2**31 - 1, 2**31 - 1)]
)
@pytest.mark.parametrize("side", [None, 32])
def test_an_image_that_would_fill_the_memory_is_refused_before_it_is_decoded(width: int, height: int, side) -> None:
    whole = png(8, 8)  # the rows are never reached
    head = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    bomb = whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]
    tracemalloc.start()
    with pytest.raises(UnreadableError, match=r"pixels.* 50 million"):
        decode(bomb, side)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_large_image_within_the_limit_is_read() -> None:
    side = 3000
    assert side * side < MOST_PIXELS
    assert decode(png(side, side), 16).shape == (16, 16, 3)


def test_a_size_that_no_image_could_be_resized_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="resized to 8000 pixels, allowed are at most 7071"):
        data.folder(tmp_path, size=8000)


def test_a_batch_that_would_fill_the_memory_is_refused() -> None:
    import torch

    one = png(20, 20)
    pictures = Pictures(encoded=[one] * 3, where=["a"] * 3, side=7000, extent=(7000, 7000), pool=1, workers=0,
                        device=torch.device("cpu"))  # fmt: skip
    many = torch.zeros(HELD // (3 * 7000**2) + 1, dtype=torch.int64)
    with pytest.raises(DataError, match=r"a batch of 15 images of 7000 x 7000 would take 2\.1 GiB decoded"):
        next(pictures.batches([many]))


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    start = time.monotonic()
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path, tmp_path / "nowhere.png"):
        with pytest.raises(UnreadableError):
            decode(path, None)
    from autowidth.lab.predicting import picture_files

    with pytest.raises(DataError, match=r"pipe\.png: a pipe or a device"):
        picture_files([tmp_path / "pipe.png"])
    assert time.monotonic() - start < 30  # a pipe without a writer would be waited for for ever


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_an_image_or_unreadable(kind: str) -> None:
    chance = random.Random(kind)
    pixels = np.frombuffer(chance.randbytes(3 * 12 * 10), dtype=np.uint8).reshape(12, 10, 3)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, kind)
    refused = 0
    for number in range(150):
        damaged = bytearray(whole.getvalue())
        if number % 3:
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        else:
            del damaged[chance.randrange(len(damaged)) :]
        try:
            found = decode(bytes(damaged), 8)
        except UnreadableError:
            refused += 1
        else:
            assert found.shape == (8, 8, 3)
    assert refused > 10


def test_a_bomb_among_pictures_is_named(tmp_path: Path) -> None:
    for name in ("bee", "cow"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(png(8, 8))
    (tmp_path / "cow" / "bomb.png").write_bytes(png(8000, 7000))
    assert (tmp_path / "cow" / "bomb.png").stat().st_size < 100_000
    with pytest.raises(CorruptImageError, match=r"cow.bomb\.png: it has 8,000 x 7,000 pixels, allowed are 50 million"):
        data.folder(tmp_path)
    assert data.folder(tmp_path, skip_corrupt=True).skipped == (str(tmp_path / "cow" / "bomb.png"),)
