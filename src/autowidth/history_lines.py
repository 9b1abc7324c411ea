"""What the JSON of a history file may hold: every entry of an event has its kind, and nothing is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autowidth.reading import ReadError, strict_json

LINE_LIMIT = 1 << 24
"""Bytes that a line may have."""

LINE_VALUES = 2_000_000
"""Values that a line may hold: an index map has one for each channel."""

WIDEST = 1 << 20
"""Channels that an index map in a file may speak of."""


def wrong_entry(record: Mapping[str, object]) -> str | None:
    """The first entry of an event's JSON object that is not of its kind, or None. Raises KeyError for a missing one."""
    return next((name for name, is_right in _RIGHT.items() if not is_right(record[name])), None)


def upgraded(record: dict[str, Any], schema: int) -> dict[str, Any]:
    """The record of an event as this version writes it. Raises KeyError where an entry is missing."""
    if schema >= 4:
        return record
    known: dict[str, Any] = {"filter_worths": {}, "prices": {}, "interactions": {}} | record
    if schema == 3:
        return known
    known["memory"] = {}
    if schema == 2:
        return known
    return known | {"predicted": known.pop("announced"), "target": known.pop("target_macs"), "unit": "macs"}


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ReadError, which is a ValueError, where it is none, or dubious."""
    if len(line) > LINE_LIMIT:
        raise ReadError(f"the line has {len(line):,} bytes, allowed are {LINE_LIMIT:,}")
    record = strict_json(line, "the line", most=LINE_VALUES)
    if not isinstance(record, dict):
        raise ReadError("the line is no JSON object")
    return record


def is_json(line: bytes) -> bool:
    """Whether a line holds a JSON object."""
    try:
        parsed(line)
    except ReadError:
        return False
    return True


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 0 on."""
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _is_numbers(value: object, length: int | None = None) -> bool:
    return isinstance(value, list) and all(map(_is_number, value)) and length in (None, len(value))


def _is_map(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"source", "size"} or not is_count(value["size"]):
        return False
    source = value["source"]
    return isinstance(source, list) and all(type(s) is int for s in source) and value["size"] <= WIDEST


def _is_fidelity(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"spearman", "slope", "count"}:
        return False
    return _is_number(value["spearman"]) and _is_number(value["slope"]) and is_count(value["count"])


def _each(is_right: Callable[[Any], bool]) -> Callable[[object], bool]:
    """Whether a value is an object whose entries are right."""
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_RIGHT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "total_steps", "macs_before", "macs", "params_before", "params"), is_count),
    **dict.fromkeys(("loss", "predicted", "measured", "price", "target"), _is_number),
    "unit": lambda value: isinstance(value, str),
    "widths": _each(is_count),
    "maps": _each(_is_map),
    "worths": _each(lambda value: _is_numbers(value, 3)),
    "filter_worths": _each(_is_numbers),
    "prices": _each(_is_number),
    "interactions": _each(_is_number),
    "fidelity": _is_fidelity,
    "coefficients": _is_numbers,
    "seconds": _each(_is_number),
    "memory": _each(is_count),
    "notes": lambda value: isinstance(value, list) and all(isinstance(note, str) for note in value),
}
"""Field of an event -> whether a value is one that it can have."""
