"""The append-only record of reviews, and its replay."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from autowidth.channels import FRESH, IndexMap
from autowidth.errors import AutoWidthError
from autowidth.history_lines import is_count, is_json, parsed, upgraded, wrong_entry
from autowidth.layers import Layer, layers_in
from autowidth.notebook import history_tables, review_table
from autowidth.reading import ReadError, read_bytes

SCHEMA = 4
"""Version of the file format. A reader takes older ones, and refuses a file of a newer version.

1: the cost aimed at was `target_macs`, whatever its unit; predictions were `announced`.
2: no `memory`.
3: the header had no `layers`; events had no `filter_worths`, `prices` and `interactions`.
"""

LIMIT = 1 << 28
"""Bytes of a history file that are read: some thousand reviews of the largest networks."""

PARTS = ("probe", "audit", "decide", "surgery")
"""What the time of a review is spent on."""


class HistoryError(AutoWidthError, ValueError):
    """A history file that is missing its header, damaged, or written in a newer format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How well the predictions of the last review held on `count` ablated filters.

    `spearman` is the rank correlation of predicted and true loss changes, `slope` their ratio (true per predicted);
    None where it is not defined. Not-finite numbers become None.
    """

    spearman: float | None
    slope: float | None
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "spearman", _finite_or_none(self.spearman))
        object.__setattr__(self, "slope", _finite_or_none(self.slope))
        object.__setattr__(self, "count", int(self.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One review: what was known, what was decided, what it cost.

    Losses are in nats per sample, and a positive change means that the loss rises. MACs are those of one sample.
    Not-finite numbers are stored as None, or as NaN inside `worths` and `coefficients`, so that what is written and
    read again is equal to what was appended.
    """

    step: int
    total_steps: int
    loss: float | None = None
    """Probe loss before surgery."""
    predicted: float | None = None
    """Predicted loss change of the plan."""
    measured: float | None = None
    """True loss change of the plan on the audit samples."""
    price: float | None = None
    """Nats per `unit` at the margin."""
    target: float | None = None
    """The cost aimed at, in `unit`."""
    unit: str = "macs"
    """What the policy bounds: macs, params or ms."""
    macs_before: int
    macs: int
    params_before: int
    params: int
    widths: dict[str, int]
    """Channel group name -> width after the review."""
    maps: dict[str, IndexMap] = field(default_factory=dict)
    """Channel group name -> index map, for the groups that were resized."""
    worths: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Channel group name -> weakest, median and strongest worth before the resize."""
    filter_worths: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Channel group name -> worth of every filter before the resize, in three digits; of maps the old indices."""
    prices: dict[str, float] = field(default_factory=dict)
    """Channel group name -> what one filter has to be worth to pay for itself after the review, nats per sample."""
    interactions: dict[str, float] = field(default_factory=dict)
    """Channel group name -> what two of its weakest filters cost together beyond what each costs alone, half of it."""
    fidelity: Fidelity | None = None
    coefficients: tuple[float, ...] = ()
    """Of (next-layer, own-layer) in the worth, as the audits had taught by then."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each of `PARTS`."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes, by what they are counted of: see `autowidth.review.memory`. Empty where nobody counted."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("step", "total_steps", "macs_before", "macs", "params_before", "params"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("loss", "predicted", "measured", "price", "target"):
            object.__setattr__(self, name, _finite_or_none(getattr(self, name)))
        object.__setattr__(self, "widths", {group: int(width) for group, width in self.widths.items()})
        object.__setattr__(self, "maps", dict(self.maps))
        object.__setattr__(self, "worths", {group: tuple(map(_finite_or_nan, w)) for group, w in self.worths.items()})
        worths = {group: tuple(map(_in_three_digits, w)) for group, w in self.filter_worths.items()}
        object.__setattr__(self, "filter_worths", worths)
        for name in ("prices", "interactions"):
            object.__setattr__(self, name, {group: _finite_or_nan(n) for group, n in getattr(self, name).items()})
        object.__setattr__(self, "coefficients", tuple(map(_finite_or_nan, self.coefficients)))
        object.__setattr__(self, "seconds", {part: _finite_or_nan(s) for part, s in self.seconds.items()})
        object.__setattr__(self, "memory", {what: int(count) for what, count in self.memory.items()})
        object.__setattr__(self, "notes", tuple(self.notes))

    def _repr_html_(self) -> str:
        return review_table(self)

    @property
    def removed(self) -> dict[str, int]:
        """Channel group name -> how many channels left, for the groups that were resized."""
        return {group: len(index_map.removed) for group, index_map in self.maps.items()}

    @property
    def inserted(self) -> dict[str, int]:
        """Channel group name -> how many fresh channels came, for the groups that were resized."""
        return {group: len(index_map.inserted) for group, index_map in self.maps.items()}

    @property
    def seconds_total(self) -> float:
        """Wall time of the whole review."""
        return sum(self.seconds.values())


class History:
    """The events of one run, oldest first, the widths that it started from, and the layers that have them.

    With a `path` the record is a file from the start: a header line, then one line per event, on disk before
    `append` returns. Raises FileExistsError where that file already exists: a record is never overwritten by accident
    (`read` it and `attach` it to go on).
    """

    def __init__(
        self,
        widths_start: Mapping[str, int],
        *,
        path: str | os.PathLike[str] | None = None,
        layers: Sequence[Layer] = (),
    ) -> None:
        self._widths_start = {group: int(width) for group, width in widths_start.items()}
        self._layers = tuple(layers)
        self._events: list[Event] = []
        self._header = len(self._head())
        self._sizes: list[int] = []  # bytes of each event's line
        self._path: Path | None = None
        if path is not None:
            if Path(path).exists():
                raise FileExistsError(
                    f"history {path} exists already: go on with History.read and attach, or choose another path"
                )
            self.attach(path)

    def __repr__(self) -> str:
        return f"History({len(self)} events, {self.removed_total} removed, {self.inserted_total} inserted)"

    def _repr_html_(self) -> str:
        return history_tables(self)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    @property
    def widths_start(self) -> dict[str, int]:
        """Channel group name -> width before the first event."""
        return dict(self._widths_start)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the starting network in the order of the forward pass; empty where they were not told."""
        return self._layers

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, oldest first."""
        return tuple(self._events)

    @property
    def path(self) -> Path | None:
        """The file that grows with the record, or None."""
        return self._path

    def append(self, event: Event) -> None:
        """Adds an event at the end; it is on disk on return where the record has a path. Whole or not at all.

        What a write that failed or a process that died left behind the last event of the file is cut off first, so that
        no two events share a line. Raises OSError where the disk refuses.
        """
        line = _line(_event_to_json(event))
        if self._path is not None:
            self._cut(self._path)
            try:
                _add(self._path, line)
            except BaseException:
                with contextlib.suppress(OSError):  # the next append cuts first, and so does a reader
                    os.truncate(self._path, self._length)
                raise
        self._sizes[len(self._events) :] = [len(line)]
        self._events.append(event)

    @property
    def _length(self) -> int:
        """Bytes that the header and all events take in the file."""
        return self._header + sum(self._sizes[: len(self._events)])

    def _cut(self, path: Path) -> None:
        """Leaves nothing in the file behind the last event; writes it anew where it is shorter or gone."""
        length = path.stat().st_size if path.is_file() else -1
        if length > self._length:
            os.truncate(path, self._length)
        elif length < self._length:
            self.write(path)

    def retract(self, event: Event) -> None:
        """Takes the event back, on disk too, if it is the last one; else nothing happens.

        For a review that fails after it was recorded. A disk that refuses to give a line back is no error: the next
        event takes its place.
        """
        if self._events and self._events[-1] is event:
            self._events.pop()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._cut(self._path)

    def attach(self, path: str | os.PathLike[str]) -> None:
        """Writes the record to `path`, in place of what is there, and adds every later event to that file.

        To go on with the record of a run that was broken off, take up its state first (`autowidth.resume_`).
        """
        self.write(path)
        self._path = Path(path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole record to `path`: the old file or the new one is there at any moment, never half of one."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.writelines(self.lines())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def lines(self) -> Iterator[bytes]:
        """What a history file holds: a header, then one line per event."""
        yield self._head()
        yield from (_line(_event_to_json(event)) for event in self._events)

    def _head(self) -> bytes:
        """The first line of a history file."""
        layers = [layer.as_json() for layer in self._layers]
        return _line({"schema": SCHEMA, "widths_start": self._widths_start, "layers": layers})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """The record that was written to `path`. It is not attached: later events stay in memory until you attach it.

        A last line that a crash cut short is dropped with a warning. Raises FileNotFoundError, and HistoryError where
        another line is damaged, the format is newer than this version of the package, or `path` is no file.
        """
        if not os.path.lexists(path):
            raise FileNotFoundError(f"history {path}: there is no such file")
        try:
            data = read_bytes(Path(path), limit=LIMIT)
        except ReadError as error:
            raise HistoryError(f"history {error}") from error
        return cls.parse(data, path)

    @classmethod
    def parse(cls, data: bytes, path: str | os.PathLike[str]) -> History:
        """The record in the content of a file; errors and warnings name the path. Raises HistoryError as `read`."""
        header, *lines = data.split(b"\n")
        while lines and not lines[-1]:
            lines.pop()
        schema, widths, layers = _header(path, header)
        history = cls(widths, layers=layers)
        if lines and not data.endswith(b"\n") and not is_json(lines[-1]):
            lines.pop()
            warnings.warn(f"history {path}: dropped the last line, which a crash cut short", stacklevel=3)
        for number, line in enumerate(lines, start=2):
            try:
                history.append(_event_from_json(upgraded(parsed(line), schema)))
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise HistoryError(f"history {path}, line {number} is damaged: no event ({error})") from error
        return history

    def replay(self) -> Iterator[tuple[int, dict[str, int]]]:
        """After each event its step and all widths, computed from the index maps alone.

        Raises ValueError where a map does not fit the width before it, or where the recorded widths disagree.
        """
        widths = self.widths_start
        for event in self._events:
            for group, index_map in event.maps.items():
                if widths.get(group) != index_map.size:
                    raise ValueError(
                        f"step {event.step}: the map of {group!r} is written for width {index_map.size}, "
                        f"but the maps before it lead to {widths.get(group, 'no group of that name')}"
                    )
                widths[group] = index_map.width
            if widths != event.widths:
                wrong = sorted(g for g in widths.keys() | event.widths.keys() if widths.get(g) != event.widths.get(g))
                raise ValueError(
                    f"step {event.step}: recorded width of {wrong[0]!r} is {event.widths.get(wrong[0])}, "
                    f"but the index maps lead to {widths.get(wrong[0])}"
                )
            yield event.step, dict(widths)

    def lineage(self) -> dict[str, IndexMap]:
        """Channel group name -> the one map from the starting network to now.

        Its inserted slots are the channels that were inserted and are still alive. Raises ValueError as `replay` does
        for a map that does not fit.
        """
        return {
            group: IndexMap(tuple(max(origin, FRESH) for origin in origins), self._widths_start[group])
            for group, origins in self._origins().items()
        }

    def survivors(self) -> tuple[dict[str, int], ...]:
        """For each event: channel group name -> how many of the fresh channels that came then are still there.

        Groups without a fresh channel are left out; a map that repeats one makes two of it. Raises ValueError for a
        map that does not fit its group.
        """
        origins = self._origins()
        return tuple(
            {group: origins[group].count(FRESH - number) for group, count in event.inserted.items() if count}
            for number, event in enumerate(self._events)
        )

    def _origins(self) -> dict[str, list[int]]:
        """Channel group name -> for each channel now the one it was at the start, or FRESH - n: it came at event n."""
        origins = {group: list(range(width)) for group, width in self._widths_start.items()}
        for number, event in enumerate(self._events):
            for group, index_map in event.maps.items():
                if group not in origins:
                    raise ValueError(f"step {event.step}: {group!r} is no channel group of the starting network")
                if len(origins[group]) != index_map.size:
                    raise ValueError(f"step {event.step}: the map of {group!r} does not fit the group")
                origins[group] = [FRESH - number if s == FRESH else origins[group][s] for s in index_map.source]
        return origins

    def digest(self) -> list[dict[str, object]]:
        """A record for each review that JSON can hold: the losses, the price, who left, who came and who stayed.

        Keys: step; loss, predicted and measured, nats per sample; price, nats per unit of the cost; macs and params
        after it; removed, inserted and, of those inserted then, alive at the end of this record, by channel group;
        spearman, how well worths had ranked the filters that were audited; notes.
        """
        return [
            {
                "step": event.step,
                "loss": event.loss,
                "predicted": event.predicted,
                "measured": event.measured,
                "price": event.price,
                "macs": event.macs,
                "params": event.params,
                "removed": {group: count for group, count in event.removed.items() if count},
                "inserted": {group: count for group, count in event.inserted.items() if count},
                "alive": alive,
                "spearman": event.fidelity and event.fidelity.spearman,
                "notes": list(event.notes),
            }
            for event, alive in zip(self._events, self.survivors(), strict=True)
        ]

    @property
    def removed_total(self) -> int:
        """How many channels left, over all events and groups."""
        return sum(sum(event.removed.values()) for event in self._events)

    @property
    def seconds_total(self) -> dict[str, float]:
        """Wall time of all reviews by part."""
        parts = dict.fromkeys(part for event in self._events for part in event.seconds)
        return {part: sum(event.seconds.get(part, 0.0) for event in self._events) for part in parts}

    @property
    def inserted_total(self) -> int:
        """How many fresh channels came, over all events and groups."""
        return sum(sum(event.inserted.values()) for event in self._events)

    @property
    def inserted_alive(self) -> int:
        """How many of the channels that came are still there."""
        return sum(len(index_map.inserted) for index_map in self.lineage().values())


def _finite_or_none(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _finite_or_nan(number: float | None) -> float:
    # math.nan itself, always: tuples and dicts that hold the same object compare equal.
    return float(number) if number is not None and math.isfinite(number) else math.nan


def _in_three_digits(number: float | None) -> float:
    return _finite_or_nan(None if number is None else float(f"{number:.3g}"))  # the largest float rounds to infinity


def _null(number: float) -> float | None:
    return None if math.isnan(number) else number


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _add(path: Path, line: bytes) -> None:
    """Adds a line at the end of a file, confirmed by the disk. It may be cut short where that raises."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(path: str | os.PathLike[str], line: bytes) -> tuple[int, dict[str, int], list[Layer]]:
    """The format, the starting widths and the layers of the file's first line. Raises HistoryError."""
    try:
        header = parsed(line)
    except ReadError as error:
        raise HistoryError(
            f"history {path}, line 1: no header with a schema version ({error}); it is no history file"
        ) from error
    schema, widths = header.get("schema"), header.get("widths_start")
    if type(schema) is not int or schema < 1:
        raise HistoryError(f"history {path}, line 1: no header with a schema version; it is no history file")
    if schema > SCHEMA:
        raise HistoryError(
            f"history {path} has format {schema}, this version reads up to {SCHEMA}: install a newer autowidth"
        )
    if not isinstance(widths, dict) or not all(map(is_count, widths.values())):
        raise HistoryError(f"history {path}, line 1: the header has no widths_start; the file is damaged")
    try:
        return schema, widths, layers_in(header.get("layers", ()), widths)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HistoryError(f"history {path}, line 1: its layers are damaged ({error})") from error


def _event_to_json(event: Event) -> dict[str, object]:
    fidelity = event.fidelity
    return {name: getattr(event, name) for name in _FIELDS} | {
        "maps": {group: {"source": list(m.source), "size": m.size} for group, m in event.maps.items()},
        "worths": {group: [_null(w) for w in worths] for group, worths in event.worths.items()},
        "filter_worths": {group: [_null(w) for w in worths] for group, worths in event.filter_worths.items()},
        "prices": {group: _null(price) for group, price in event.prices.items()},
        "interactions": {group: _null(nats) for group, nats in event.interactions.items()},
        "fidelity": fidelity and {name: getattr(fidelity, name) for name in ("spearman", "slope", "count")},
        "coefficients": [_null(c) for c in event.coefficients],
        "seconds": {part: _null(s) for part, s in event.seconds.items()},
        "notes": list(event.notes),
    }


def _event_from_json(record: dict[str, Any]) -> Event:
    """The event of one line; raises KeyError, TypeError, ValueError or AttributeError where it is none."""
    if missing := set(_FIELDS) - record.keys():
        raise KeyError(f"{min(missing)} is missing")
    if (wrong := wrong_entry(record)) is not None:
        raise ValueError(f"its {wrong} is not what it can be")
    fidelity = record["fidelity"]
    decoded = {
        "maps": {group: IndexMap(tuple(m["source"]), m["size"]) for group, m in record["maps"].items()},
        "fidelity": None if fidelity is None else Fidelity(**fidelity),
    }
    return Event(**(record | decoded))


_FIELDS = tuple(f.name for f in fields(Event))
