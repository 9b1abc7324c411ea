"""What a run writes beside its history while it goes on: its settings, then a line per epoch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autowidth.errors import AutoWidthError

SCHEMA = 1
"""Version of the file. A reader refuses a newer one."""

PROGRESS = "progress.jsonl"


class ProgressError(AutoWidthError, ValueError):
    """A record of progress that is damaged, of another program, or written in a newer format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known when a run begins, in what JSON can hold.

    data: splits and class counts in a line. part: on which images accuracy is measured. accuracy_start: of weights that
    were brought, None where there were none. began: date and time, ISO 8601. command: as it was typed.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    data: str
    part: str
    epochs: int
    total_steps: int
    macs_start: int
    params_start: int
    accuracy_start: float | None = None
    began: str = ""
    command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """How a run stood after an epoch: loss is the mean of training, accuracy None where it was not measured."""

    epoch: int
    step: int
    loss: float | None
    accuracy: float | None
    macs: int
    params: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the file of a run says: how it began, its epochs so far, and what was left out of the file."""

    facts: Facts
    epochs: tuple[Epoch, ...] = ()
    remarks: tuple[str, ...] = ()


def begin(path: Path, facts: Facts) -> None:
    """Writes the file anew with its first line."""
    path.write_text(_line({"schema": SCHEMA} | asdict(facts)), encoding="utf-8")


def add(path: Path, epoch: Epoch) -> None:
    """Adds a line at the end of the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(asdict(epoch)))


def read_course(path: Path) -> Course:
    """What the file says. A last line that was cut short is left out with a remark. Raises ProgressError, OSError."""
    header, *lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    facts = _facts(path, header)
    epochs: list[Epoch] = []
    remarks: tuple[str, ...] = ()
    for number, line in enumerate(lines, start=2):
        try:
            epochs.append(_epoch(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) + 1:
                remarks = (f"{path.name}: the last line was cut short and is left out",)
                break
            raise ProgressError(f"{path}, line {number} is damaged: no epoch ({error}); move the file away") from error
    return Course(facts=facts, epochs=tuple(epochs), remarks=remarks)


def _facts(path: Path, line: str) -> Facts:
    """The first line of a file. Raises ProgressError."""
    try:
        record = json.loads(line)
        schema = int(record.pop("schema"))
        if schema <= SCHEMA:
            numbers = {name: int(record[name]) for name in ("epochs", "total_steps", "macs_start", "params_start")}
            tables = {name: dict(record[name]) for name in ("settings", "versions")}
            return Facts(**(record | numbers | tables))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProgressError(f"{path}, line 1: no header of a run's progress ({error}); move the file away") from error
    raise ProgressError(f"{path} has format {schema}, this version reads up to {SCHEMA}: install a newer autowidth")


def _epoch(record: dict[str, Any]) -> Epoch:
    """The epoch of a line. Raises KeyError, TypeError, ValueError or AttributeError where it is none."""
    whole = {name: int(record[name]) for name in ("epoch", "step", "macs", "params")}
    loss, accuracy = (None if record[name] is None else float(record[name]) for name in ("loss", "accuracy"))
    return Epoch(**whole, loss=loss, accuracy=accuracy, seconds=float(record["seconds"]))


def _line(record: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False, separators=(",", ":")) + "\n"
