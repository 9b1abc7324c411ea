"""What run.json says of a saved run, in every version of its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autowidth.checkpoint.errors import CheckpointError
from autowidth.checkpoint.folder import RUN, SCHEMA, Kept, Record, damaged, path_of, read_bytes_of
from autowidth.history import LIMIT, History, HistoryError

HISTORY = "history.jsonl"

FIELDS = ("torch", "tied", "shapes", "events", "widths", "extra")
"""What every version says; the first one says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What run.json says about a saved run."""

    folder: Path
    torch_version: str
    """The version of torch that wrote the run."""
    shapes: dict[str, tuple[int, ...]]
    """Name in the model's state dict -> shape."""
    widths: dict[str, int] | None
    """Channel group name -> width, or None where the run was saved without a channel map."""
    extra: dict[str, Any]
    """What the caller gave to `save`."""
    tied: dict[str, str]
    """Name of a tensor that is not in the file -> name of the one that it is tied to."""
    events: int | None
    """How many events of the history belong to this run, or None where it was saved without a history."""
    token: str
    """Names the files that were written together."""
    schema: int = SCHEMA
    """Version of the format of run.json."""
    files: dict[str, Kept] = field(default_factory=dict)
    """File name -> its size and checksum; empty in the first version of the format."""

    @property
    def record(self) -> Record:
        """The record of the folder, for `autowidth.checkpoint.folder`."""
        return Record(folder=self.folder, schema=self.schema, token=self.token, fields={}, files=self.files)

    def file(self, name: str) -> Path:
        """Where the content of this run's file `name` lies: still under its staged name if a save was cut short."""
        return path_of(self.record, name)

    def history(self) -> History | None:
        """The history up to the moment of the save, or None where the run was saved without one.

        Events that a file in use has gained since are left out. Raises CheckpointError where it is missing, short or
        damaged.
        """
        if self.events is None:
            return None
        path = self.file(HISTORY)
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(f"run {self.folder} was saved with a history, but has no {HISTORY}: copy it there")
        try:
            if self._is_short(path):
                there = len(History.read(path))
                raise CheckpointError(f"{path} holds {there} events, but the run was saved after {self.events}")
            whole = History.parse(read_bytes_of(self.record, HISTORY, limit=LIMIT), path)
        except HistoryError as error:
            raise CheckpointError(f"{error}: restore the files of one and the same run") from error
        return self._cut(whole, path)

    def _is_short(self, path: Path) -> bool:
        """Whether the file has lost bytes that were there at the save; the first format does not say."""
        kept = self.files.get(HISTORY)
        return kept is not None and path.is_file() and path.stat().st_size < kept.size

    def _cut(self, whole: History, path: Path) -> History:
        """The events up to the save."""
        if len(whole) < (self.events or 0):
            raise CheckpointError(f"{path} holds {len(whole)} events, but the run was saved after {self.events}")
        history = History(whole.widths_start, layers=whole.layers)
        for event in whole.events[: self.events]:
            history.append(event)
        return history


def fields_of(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, object]:
    """The part of run.json that the tensors decide."""
    shapes = {name: list(tensors[tied.get(name, name)].shape) for name in (*tensors, *tied)}
    return {"torch": str(torch.__version__), "tied": dict(tied), "shapes": shapes}


def run_of(record: Record) -> Run:
    """The run of a record. Raises CheckpointError where it is none."""
    fields, path = record.fields, record.folder / RUN
    if missing := [name for name in FIELDS if name not in fields]:
        raise damaged(path, f"it does not say the {missing[0]} of the run")
    if record.schema == 1 and (more := fields.keys() - set(FIELDS)):
        raise damaged(path, f"format 1 knows no {min(more)[:50]!r}")
    if wrong := [name for name, is_right in _RIGHT.items() if not is_right(fields[name])]:
        raise damaged(path, f"its entry {wrong[0]!r} is not what it should be")
    shapes = {name: tuple(shape) for name, shape in fields["shapes"].items()}
    if wrong := [name for name, owner in fields["tied"].items() if not _is_tied(name, owner, fields)]:
        raise damaged(path, f"{wrong[0][:80]!r} is tied to what is not there")
    return Run(
        folder=record.folder, torch_version=fields["torch"], shapes=shapes, widths=fields["widths"],
        extra=fields["extra"], tied=fields["tied"], events=fields["events"], token=record.token,
        schema=record.schema, files=record.files,
    )  # fmt: skip


def _is_tied(name: str, owner: str, fields: Mapping[str, Any]) -> bool:
    shapes = fields["shapes"]
    known = name in shapes and owner in shapes and owner not in fields["tied"]
    return bool(known and shapes[name] == shapes[owner])


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_shapes(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(s, list) and all(map(_is_count, s)) for s in value.values())


def _is_widths(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_count(w) and w > 0 for w in value.values()))


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "torch": lambda value: isinstance(value, str),
    "tied": lambda value: isinstance(value, dict) and all(isinstance(owner, str) for owner in value.values()),
    "shapes": _is_shapes,
    "events": lambda value: value is None or _is_count(value),
    "widths": _is_widths,
    "extra": lambda value: isinstance(value, dict),
}
"""Entry of run.json -> whether a value is one that it can have."""
