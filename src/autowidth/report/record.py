"""What lies in the folder of a run, read for its page: history, settings, result, progress; of a live run too."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autowidth.checkpoint import HISTORY, RUN, CheckpointError, read_run
from autowidth.errors import AutoWidthError
from autowidth.history import History
from autowidth.report.progress import PROGRESS, Course, read_course

LIVE_HISTORY = f"live-{HISTORY}"
LIVE_PROGRESS = f"live-{PROGRESS}"
"""What a run that goes on has written so far; both are gone when it is saved."""


class RecordError(AutoWidthError, ValueError):
    """A place that holds no record of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that is on disk about one run.

    settings, result: as run.json has them, empty where it does not say or is not there. finished: whether the run was
    saved; if not, `written` says when something was last added. remarks: what a reader should know of the files.
    """

    name: str
    path: Path
    history: History
    course: Course | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    finished: bool = True
    written: datetime
    remarks: tuple[str, ...] = ()


def read_record(path: Path) -> Record:
    """The record of a run, from its folder or from a history file alone; of a folder with a live run, that run.

    Raises RecordError where there is none, HistoryError, ProgressError or CheckpointError for damaged files.
    """
    if path.is_file():
        return _of_history(path, name=path.stem)
    if not path.is_dir():
        raise RecordError(f"there is no run at {path}: name the folder of a run, or a history file")
    if (path / LIVE_HISTORY).is_file():
        return _live(path)
    if (path / RUN).is_file():
        return _saved(path)
    if (path / HISTORY).is_file():
        return _of_history(path / HISTORY, name=path.resolve().name)
    raise RecordError(
        f"{path} holds no {RUN} and no {HISTORY}: name the folder of a run, or the file that an engine was given "
        "with history="
    )


def _of_history(path: Path, *, name: str) -> Record:
    history, remarks = _read(path)
    return Record(name=name, path=path, history=history, written=_written(path), remarks=remarks)


def _live(folder: Path) -> Record:
    """A run that goes on, or that was killed."""
    history, remarks = _read(folder / LIVE_HISTORY)
    course = _course(folder / LIVE_PROGRESS)
    newest = max(_written(folder / name) for name in (LIVE_HISTORY, LIVE_PROGRESS) if (folder / name).is_file())
    return Record(
        name=folder.resolve().name, path=folder, history=history, course=course,
        settings=course.facts.settings if course else {}, versions=course.facts.versions if course else {},
        finished=False, written=newest, remarks=(*remarks, *(course.remarks if course else ())),
    )  # fmt: skip


def _saved(folder: Path) -> Record:
    """A run that was saved."""
    run = read_run(folder)
    if run.events is None:
        raise RecordError(
            f"run {folder} was saved without a history, and a report is drawn from that: save it with history="
        )
    file = run.file(HISTORY)
    if not file.is_file():
        raise CheckpointError(f"run {folder} was saved with a history, but has no {HISTORY}: copy it there")
    whole, remarks = _read(file)
    if len(whole) < run.events:
        remarks += (f"{HISTORY} holds {len(whole)} of the {run.events} reviews of the saved run",)
    history = History(whole.widths_start, layers=whole.layers)
    for event in whole.events[: run.events]:
        history.append(event)
    settings, result = _table(run.extra.get("settings")), _table(run.extra.get("result"))
    course = _course(folder / PROGRESS)
    if course is not None and not _belongs(course, settings, result):
        remarks += (f"{PROGRESS} is of another run and is left out",)
        course = None
    versions = {"autowidth": str(run.extra.get("version", "")), "torch": run.torch_version}
    return Record(
        name=folder.resolve().name, path=folder, history=history, course=course,
        settings=settings, result=result,
        versions={name: v for name, v in versions.items() if v} | (course.facts.versions if course else {}),
        written=_written(folder / RUN), remarks=(*remarks, *(course.remarks if course else ())),
    )  # fmt: skip


def _belongs(course: Course, settings: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether the progress is that of the run, not of one that was in the folder before it."""
    ends = {(epoch.macs, epoch.params) for epoch in course.epochs[-1:]}
    return course.facts.settings == settings and ends <= {(result.get("macs"), result.get("params"))}


def _read(path: Path) -> tuple[History, tuple[str, ...]]:
    """The history, and what was left out of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = History.read(path)
    return history, tuple(str(warning.message) for warning in said)


def _course(path: Path) -> Course | None:
    return read_course(path) if path.is_file() else None


def _table(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, tz=timezone.utc)
