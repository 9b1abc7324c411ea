"""Files from strangers: only regular ones are opened, no more is read than is allowed, and JSON is taken strictly."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from autowidth.errors import AutoWidthError

DEEPEST = 32
"""Lists and objects inside each other that JSON may have."""

MOST_VALUES = 200_000
"""Values of one JSON document: as objects they take up to 150 bytes each, whatever they take in the file."""

LARGEST_NUMBER = 2**63 - 1
"""Of integers in JSON, with either sign: what tensors count in."""


class ReadError(AutoWidthError, ValueError):
    """A file that is missing, no regular one, too large, or not the strict JSON that it should be."""


def size_of(path: Path, *, inside: Path | None = None) -> int:
    """Bytes of the regular file at `path`. Raises ReadError for anything else, without opening it.

    A link is followed, but with a folder `inside` only to a file that lies below that folder.
    """
    try:
        if inside is not None and not path.resolve(strict=True).is_relative_to(inside.resolve(strict=True)):
            raise ReadError(f"{path} is a link out of its folder, to {path.resolve()}: put the file itself there")
        found = path.stat()
    except FileNotFoundError as error:
        raise ReadError(f"{path}: there is no such file") from error
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        raise ReadError(f"{path} cannot be read: {_reason(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ReadError(f"{path} is {_kind(found.st_mode)}, expected a file: put the file itself there")
    return found.st_size


def open_regular(path: Path, *, limit: int, inside: Path | None = None) -> BinaryIO:
    """The file for reading from its start, if it is a regular one of at most `limit` bytes; else raises ReadError."""
    size_of(path, inside=inside)
    try:
        # A pipe that took the file's place meanwhile would make open() wait for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {_reason(error)}") from error
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size <= limit:
        return file
    file.close()
    if not stat.S_ISREG(found.st_mode):
        raise ReadError(f"{path} is {_kind(found.st_mode)}, expected a file: put the file itself there")
    raise ReadError(f"{path} has {found.st_size:,} bytes, allowed are {limit:,}: it is no file of ours")


@contextmanager
def opened(path: Path, *, limit: int, inside: Path | None = None) -> Iterator[BinaryIO]:
    """Around reading what `open_regular` gives: an OSError, such as that of a disk that fails, becomes a ReadError."""
    with open_regular(path, limit=limit, inside=inside) as file:
        try:
            yield file
        except OSError as error:
            raise ReadError(f"{path} cannot be read: {_reason(error)}") from error


def read_bytes(path: Path, *, limit: int, inside: Path | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ReadError."""
    with opened(path, limit=limit, inside=inside) as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))


def strict_json(data: bytes, what: str, *, most: int = MOST_VALUES) -> Any:
    """The value in a JSON document in UTF-8. Raises ReadError, which begins with `what`, for anything dubious.

    Dubious are: what JSON does not allow, NaN and infinities, a key twice in one object, more than `most` values,
    more than `DEEPEST` levels, integers above `LARGEST_NUMBER`. All this is found before it costs memory or time.
    """
    _check_extent(data, what, most)
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refused, parse_int=_integer,
            parse_float=_finite,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{what} is damaged: {_reason(error)}") from error


def _check_extent(data: bytes, what: str, most: int) -> None:
    """Raises ReadError for a document with too many values or levels: in linear time, before it is parsed."""
    if data.count(b'"') > 4 * most:
        raise ReadError(f"{what} is damaged: more than {2 * most:,} texts")
    texts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    marks = b"".join(texts[::2])  # what stands outside of texts
    if sum(map(marks.count, (b",", b"[", b"{"))) >= most:
        raise ReadError(f"{what} is damaged: {most:,} values or more")
    level = 0
    for mark in marks.translate(None, _NO_BRACKETS):
        level += 1 if mark in b"[{" else -1
        if level > DEEPEST:
            raise ReadError(f"{what} is damaged: lists and objects more than {DEEPEST} deep")


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:50]!r} stands twice in one object")
        found[key] = value
    return found


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > len(str(LARGEST_NUMBER)) + 1 or abs(int(text)) > LARGEST_NUMBER:
        raise ValueError(f"the number {text[:30]}... is too large")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:30]} is too large")
    return number


def _reason(error: BaseException) -> str:
    """What an error of the system says, without its number and the path that stands before it anyway."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _kind(mode: int) -> str:
    """What stands where a file should."""
    kinds = {
        stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }  # fmt: skip
    return next((kind for test, kind in kinds.items() if test(mode)), "no regular file")
