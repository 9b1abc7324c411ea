"""A folder of files that is written as one act, and read back checked against the record that names them.

The record is run.json: fields of the caller's, and size and SHA-256 of every file and of itself. Whoever wants to keep
more files writes them through here, under names that end in .safetensors, .json or .jsonl:

    write(folder, fields={"step": 7}, files={"optimizer.safetensors": tensor_file(state), "loops.json": text.encode()})
    record = read(folder)
    record.fields["step"], read_bytes_of(record, "loops.json", limit=1 << 20)
    read_tensor_file(record, "optimizer.safetensors")

`tensor_file` and `read_tensor_file` are in tensors.py; `write_run` in saving.py writes a run that `load_` can read,
with more files and fields beside it. To keep the last few, write each to a folder of its own, then `remove` the oldest:
a folder that `read` can read is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from autowidth.checkpoint.errors import CheckpointError, WriteError
from autowidth.reading import ReadError, opened, read_bytes, size_of, strict_json

SCHEMA = 2
"""Version of run.json. A reader takes older ones, and refuses a run of a newer version.

1: no sizes and checksums; tensors and record are held together by the token alone.
"""

RUN = "run.json"

RECORD_LIMIT = 4 << 20
"""Bytes that run.json may have."""

RESERVED = ("schema", "token", "files", "sha256")
"""Fields of the record that are written here."""

_PIECE = 1 << 20
"""Bytes that are written, or read for a checksum, at once."""

_NAME = r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*"
"""Of a file of a run: no path, and not hidden."""

_TOKEN = "[0-9a-f]{16}"

_STAGED = re.compile(rf"\.(?P<name>{_NAME}\.(?:json|jsonl|safetensors))\.(?P<token>{_TOKEN})")
"""The names that only `write` gives: whatever else lies in the folder is the user's."""

Content = bytes | Callable[["Sink"], object]
"""What a file is to hold: its bytes, or a function that writes them piece by piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the record says of a file."""

    size: int
    """Bytes at the moment of the save."""
    sha256: str
    """Of these bytes, in hex."""
    grows: bool = False
    """Whether the file may have gained more bytes behind them since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What run.json says: fields of whoever wrote it, and which files belong to it."""

    folder: Path
    schema: int
    token: str
    """Names the files that were written together."""
    fields: dict[str, Any]
    files: dict[str, Kept]
    """By name; empty in the first schema, which did not say."""


# ---- writing ---------------------------------------------------------------------------------------------------------


class Sink:
    """An open file of a run: takes bytes, counts them and adds them to their checksum."""

    def __init__(self, descriptor: int, token: str) -> None:
        self.token = token
        """Of the save: a file that holds it is known to belong to its record."""
        self.size, self._descriptor, self._digest = 0, descriptor, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of the data; returns how many bytes that is."""
        whole = memoryview(data).cast("B")
        rest = whole
        while rest:
            done = os.write(self._descriptor, rest[:_PIECE])
            self._digest.update(rest[:done])
            rest = rest[done:]
        self.size += len(whole)
        return len(whole)

    def kept(self, *, grows: bool) -> Kept:
        """What the record says of the file as it is now."""
        return Kept(size=self.size, sha256=self._digest.hexdigest(), grows=grows)


def write(
    folder: Path, *, fields: Mapping[str, object], files: Mapping[str, Content], growing: Collection[str] = ()
) -> Record:
    """Writes files and the record that names them to a folder, in place of what the record there names.

    All or nothing: everything is written under staged names, `.NAME.TOKEN`, and confirmed by the disk; then the one
    rename of the record makes it count, and the other renames follow. `read` finds the old files or the new ones at
    any moment, whole. What a crash leaves behind is completed or cleared by the next `write`. Other files of the folder
    stay; files that `growing` names may gain bytes afterwards.

    `fields` are JSON values. Raises CheckpointError where the folder is a file, a folder stands where a file goes, or
    the record could not be read back; WriteError where the disk refuses. Up to the deciding rename nothing has changed.
    """
    _check_names(folder, files)
    token = secrets.token_hex(8)
    with _said(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        try:
            record = _stage(folder, token, fields, files, growing)
            os.replace(_staged(folder, RUN, token), folder / RUN)  # from here on the new files are the run
        except BaseException:
            with contextlib.suppress(OSError):  # of a disk that is gone the first error says more
                _discard(folder, token)
            raise
        _sync(folder)
        _settle(folder)
        _sync(folder)
        _sync(folder.absolute().parent)
    return record


def remove(folder: Path) -> None:
    """Takes the record and its files away, and the folder if nothing else is in it; a crash leaves no half of a run.

    Raises CheckpointError where there is no record that can be read, WriteError where the disk refuses.
    """
    record = read(folder)
    with _said(folder):
        os.unlink(folder / RUN)
        _sync(folder)
        for name in record.files:
            for path in (_staged(folder, name, record.token), folder / name):
                if path.is_file():
                    path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _check_names(folder: Path, files: Mapping[str, Content]) -> None:
    """Raises CheckpointError where something stands in the way of the files."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save a run to {folder}: it is a file; name a folder")
    for name in (RUN, *files):
        if not _STAGED.fullmatch(f".{name}.{'0' * 16}"):
            raise CheckpointError(f"cannot save {name!r} with a run: allowed are names such as part.safetensors")
        if (folder / name).is_dir():
            raise CheckpointError(f"cannot save a run to {folder}: {name} is a folder there; move it away")


def _stage(
    folder: Path, token: str, fields: Mapping[str, object], files: Mapping[str, Content], growing: Collection[str]
) -> Record:
    """Writes files and record under their staged names, and has the disk confirm them; returns the record."""
    kept = {
        name: _written(_staged(folder, name, token), content, grows=name in growing) for name, content in files.items()
    }
    record = Record(folder=folder, schema=SCHEMA, token=token, fields=dict(fields), files=kept)
    _written(_staged(folder, RUN, token), _encoded(record), grows=False)
    _sync(folder)
    return record


def _written(path: Path, content: Content, *, grows: bool) -> Kept:
    """Writes a new file, and has the disk confirm it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        sink = Sink(descriptor, path.name.rpartition(".")[2])
        if isinstance(content, bytes):
            sink.write(content)
        else:
            content(sink)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sink.kept(grows=grows)


def _encoded(record: Record) -> bytes:
    """The bytes of run.json. Raises CheckpointError where `read` would refuse them."""
    files = {
        name: {"size": kept.size, "sha256": kept.sha256} | ({"grows": True} if kept.grows else {})
        for name, kept in record.files.items()
    }
    whole = {"schema": record.schema, "token": record.token, "files": files, **record.fields}
    if clash := record.fields.keys() & set(RESERVED):
        raise CheckpointError(f"the field {min(clash)!r} of {RUN} belongs to the format: give it another name")
    data = json.dumps(whole | {"sha256": _seal(whole)}, indent=1, allow_nan=False).encode()
    if len(data) > RECORD_LIMIT:
        raise CheckpointError(
            f"{RUN} would have {len(data):,} bytes, allowed are {RECORD_LIMIT:,}: keep less in extra="
        )
    try:
        strict_json(data, RUN)
    except ReadError as error:
        raise CheckpointError(f"this cannot be kept with a run: {error}; keep less in extra=") from error
    return data


def _seal(record: Mapping[str, object]) -> str:
    """SHA-256 of what a record says, however it is spaced."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _staged(folder: Path, name: str, token: str) -> Path:
    """Where a file lies until its save is complete."""
    return folder / f".{name}.{token}"


def _settle(folder: Path) -> None:
    """Completes a save that was cut short after its record was in place, and removes what others left behind."""
    try:
        token = read(folder).token
    except CheckpointError:
        if (folder / RUN).exists():  # what lies here may be all that is left of it
            return
        token = None
    for staged, match in _leftovers(folder):
        if token is not None and match["token"] == token:
            os.replace(staged, folder / match["name"])
        else:
            staged.unlink()


def _discard(folder: Path, token: str) -> None:
    """Removes the staged files of a save that failed; one whose record is in place already is completed."""
    try:
        decided = read(folder).token == token
    except CheckpointError:
        decided = False
    for staged, match in _leftovers(folder):
        if match["token"] == token:
            os.replace(staged, folder / match["name"]) if decided else staged.unlink()


def _leftovers(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """The staged files in the folder, of whatever save."""
    found = [(path, match) for path in folder.iterdir() if (match := _STAGED.fullmatch(path.name))]
    return [(path, match) for path, match in found if path.is_file() and not path.is_symlink()]


def _sync(folder: Path) -> None:
    """Has the disk confirm the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do that for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turns the system's refusal into a WriteError that names the folder."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        said = WriteError(
            f"cannot save a run to {folder}: {error.strerror or error}; make room there, or name another folder"
        )
        said.errno = error.errno
        raise said from error


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Record:
    """The record in a folder. Raises CheckpointError where it is missing, damaged, changed or too new."""
    path = folder / RUN
    try:
        if not path.exists() and not path.is_symlink():
            what = f"has no {RUN}" if folder.is_dir() else "is no folder"
            raise CheckpointError(f"no run at {folder}: it {what}; name a folder that save() has written")
        whole = strict_json(read_bytes(path, limit=RECORD_LIMIT, inside=folder), str(path))
        return _record(folder, whole)
    except ReadError as error:
        raise CheckpointError(f"{error}: restore it, or save the run again") from error
    except (OSError, ValueError) as error:  # a folder that may not be looked into, a name that no folder can have
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"no run at {str(folder)!r}: {error}") from error


def _record(folder: Path, whole: Any) -> Record:
    """The record that this JSON is. Raises CheckpointError."""
    path = folder / RUN
    schema = whole.get("schema") if isinstance(whole, dict) else None
    if type(schema) is not int or schema < 1:
        raise damaged(path, "it names no format, a whole number from 1 on")
    if schema > SCHEMA:
        raise CheckpointError(
            f"{path} has format {schema}, this version reads up to {SCHEMA}: install a newer autowidth"
        )
    token = whole.get("token")
    if not isinstance(token, str) or not re.fullmatch(_TOKEN, token):  # it becomes part of a file name
        raise damaged(path, f"its token is {str(token)[:50]!r}, allowed are 16 hex digits")
    seal = whole.pop("sha256", None)
    if schema == 1 and (seal is not None or "files" in whole):
        raise damaged(path, "its format is 1, which has no checksums, but it holds some")
    if schema > 1 and seal != _seal(whole):
        raise damaged(path, "it is not what was saved, its checksum is another one")
    files = {} if schema == 1 else _kept_files(path, whole.get("files"))
    fields = {name: value for name, value in whole.items() if name not in RESERVED}
    return Record(folder=folder, schema=schema, token=token, fields=fields, files=files)


def _kept_files(path: Path, files: object) -> dict[str, Kept]:
    """What the record says of its files, by name. Raises CheckpointError."""
    if not isinstance(files, dict):
        raise damaged(path, "it does not say which files belong to it")
    for name, entry in files.items():
        types = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
        if {"grows": bool} | types != {"size": int, "sha256": str, "grows": bool}:
            raise damaged(path, f"what it says of the file {name[:50]!r} is no size and checksum")
        if not re.fullmatch(_NAME, name) or entry["size"] < 0 or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise damaged(path, f"what it says of the file {name[:50]!r} cannot be")
    return {name: Kept(**entry) for name, entry in files.items()}


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is there and not what it should be."""
    return CheckpointError(f"{path} is damaged ({why}): restore it, or save the run again")


def path_of(record: Record, name: str) -> Path:
    """Where the content of a file of the run lies: still under its staged name if a save was cut short."""
    staged = _staged(record.folder, name, record.token)
    return staged if os.path.lexists(staged) else record.folder / name


def checked_path(record: Record, name: str) -> Path:
    """Where a file of the run lies, found to be a regular one inside the folder with the content that was saved.

    Of a run of the first schema, which has no checksums, only the former. Raises CheckpointError.
    """
    path, kept = _there(record, name)
    if kept is not None:
        with _open(record, path) as file:
            digest, left = hashlib.sha256(), kept.size
            while left and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
        _check_digest(path, digest.hexdigest(), kept)
    return path


def read_bytes_of(record: Record, name: str, *, limit: int) -> bytes:
    """What was saved of a file of the run, of at most `limit` bytes; without what it has gained since.

    Raises CheckpointError as `checked_path` does.
    """
    path, kept = _there(record, name)
    with _open(record, path) as file:
        size = os.fstat(file.fileno()).st_size if kept is None else kept.size
        if size > limit:
            raise damaged(path, f"it has {size:,} bytes, allowed are {limit:,}")
        data = file.read(size)
    if kept is not None:
        _check_digest(path, hashlib.sha256(data).hexdigest(), kept)
    return data


def _there(record: Record, name: str) -> tuple[Path, Kept | None]:
    """A file of the run, of the size that was saved, and what the record says of it; None in the first schema."""
    path, kept = path_of(record, name), record.files.get(name)
    if record.schema > 1 and kept is None:
        raise CheckpointError(f"run {record.folder} was saved without {name}: name another run")
    if not os.path.lexists(path):
        raise CheckpointError(f"run {record.folder} has no {name}: copy it there, or name another run")
    try:
        size = size_of(path, inside=record.folder)
    except ReadError as error:
        raise CheckpointError(f"run {record.folder} cannot be read: {error}") from error
    if kept is not None and size != kept.size and not (kept.grows and size > kept.size):
        raise _other(path, f"it has {size:,} bytes, saved were {kept.size:,}")
    return path, kept


@contextlib.contextmanager
def _open(record: Record, path: Path) -> Iterator[BinaryIO]:
    """The file for reading. Raises CheckpointError."""
    try:
        with opened(path, limit=sys.maxsize, inside=record.folder) as file:
            yield file
    except ReadError as error:
        raise CheckpointError(f"run {record.folder} cannot be read: {error}") from error


def _check_digest(path: Path, digest: str, kept: Kept) -> None:
    if digest != kept.sha256:
        raise _other(path, "its checksum is another one")


def _other(path: Path, why: str) -> CheckpointError:
    """The error for a file with another content than was saved."""
    return CheckpointError(
        f"{path} is damaged: not a whole {_kind(path)}, or it does not belong to the {RUN} beside it ({why}); "
        "restore the files of one and the same run"
    )


def _kind(path: Path) -> str:
    """What a file of this name should be."""
    return "safetensors file" if ".safetensors" in path.name else "file"
