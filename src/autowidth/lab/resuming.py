"""A run that was broken off, or is to go on longer: its settings, what of them may differ, and where it stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autowidth.checkpoint import CheckpointError, read_run
from autowidth.errors import AutoWidthError
from autowidth.lab.keeping import TRAINING
from autowidth.lab.settings import Settings, renamed, settings_of
from autowidth.reading import ReadError, read_bytes, strict_json
from autowidth.training import saved_trainings

LIMIT = 1 << 20
"""Bytes that the settings of a run may have."""

MAY_DIFFER = (
    "epochs", "lr", "device", "threads", "workers", "stream_above", "looks", "out", "save_every", "saves", "rescue",
    "bad_steps", "rank_timeout",
)  # fmt: skip
"""Settings that may be others when a run goes on. With another device or other threads the last bits differ."""


ROW = "row.json"
"""The file, among the trainings of a run, which says that these are the parts of one run, and its settings."""

WHOLE = "whole"
"""The part of a row that trains the whole network; its folder is that of a run."""


class ResumeError(AutoWidthError, ValueError):
    """A run that cannot be gone on with, or not with these settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A training that can be gone on with: the folder that it was saved in, and the settings of the run."""

    folder: Path
    settings: Settings
    epochs: int
    """Those that were planned."""
    finished: bool
    about: Mapping[str, Any]
    """What run.json says of model and images."""
    is_row: bool = False
    """Whether it is a row of runs: a whole network, and attempts to make it smaller."""


def unfinished_at(out: Path) -> Unfinished | None:
    """The training that was saved last in the folder of a run, or None. Raises CheckpointError, SettingsError."""
    saved = saved_trainings(out / TRAINING)
    if not saved:
        return _row_at(out)
    about = read_run(saved[-1]).extra
    if "settings" not in about:
        raise CheckpointError(f"{saved[-1]} does not say the settings of its run: it was saved by another program")
    settings = settings_of(renamed(about["settings"]))
    return Unfinished(
        folder=out / TRAINING,
        settings=settings,
        epochs=settings.epochs,
        finished=bool(about.get("finished")),
        about=about,
    )


def begin_row(out: Path, settings: Settings) -> None:
    """Writes that what is trained below this folder are the parts of one run with these settings."""
    place = out / TRAINING
    shutil.rmtree(place, ignore_errors=True)  # of an earlier run, which is finished
    place.mkdir(parents=True)
    (place / ROW).write_text(json.dumps({"settings": settings.model_dump(mode="json")}), encoding="utf-8")


def parts_of(out: Path) -> dict[str, Path]:
    """The folders of the parts of a row that have saved something, by name; none where there is no row."""
    place = out / TRAINING
    folders = sorted(place.iterdir()) if (place / ROW).is_file() else []
    return {one.name: one for one in folders if one.is_dir() and saved_trainings(one / TRAINING)}


def _row_at(out: Path) -> Unfinished | None:
    """A row of runs of which something was saved, or None. Raises CheckpointError, SettingsError."""
    if not parts_of(out):
        return None
    file = out / TRAINING / ROW
    try:
        about = strict_json(read_bytes(file, limit=LIMIT), str(file))
        settings = settings_of(about["settings"])
    except (ReadError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not say the settings of its run ({error})") from error
    return Unfinished(
        folder=out / TRAINING, settings=settings, epochs=settings.epochs, finished=False, about={}, is_row=True
    )


def settings_to_resume(out: Path, given: Settings) -> Settings:
    """The settings of the run in a folder, with what is set in `given` and may differ. Raises ResumeError by name."""
    found = unfinished_at(out)
    if found is None:
        finished = (out / "run.json").exists()
        what = "a run, but not the training that it came from" if finished else "nothing that could be gone on with"
        raise ResumeError(
            f"{out} holds {what}: no training was saved there (save_every, saves); "
            + (f"start from its weights with --weights {out}" if finished else "train without --resume")
        )
    changes: dict[str, Any] = {"out": out}
    for name in sorted(given.model_fields_set):
        was, now = getattr(found.settings, name), getattr(given, name)
        if name in MAY_DIFFER and not (found.is_row and name in ("epochs", "lr") and was != now):
            changes[name] = now
        elif was != now:
            raise ResumeError(
                f"the run in {out} has {name} = {was!r}, which cannot become {now!r} as it goes on: leave it out, or "
                f"train anew without --resume; what may differ: {', '.join(MAY_DIFFER)}"
            )
    settings = found.settings.model_copy(update=changes)
    _check_epochs(found, settings)
    return settings


def _check_epochs(found: Unfinished, settings: Settings) -> None:
    """Raises ResumeError where nothing is left to train."""
    if found.finished and settings.epochs <= found.epochs:
        raise ResumeError(
            f"the run in {found.folder.parent} is finished, with {found.epochs} of {found.epochs} epochs: "
            f"give more to go on, such as --epochs {2 * found.epochs}"
        )
    over = int(found.about.get("epoch", 0))
    if settings.epochs <= over and settings.epochs != found.epochs:
        raise ResumeError(
            f"the run in {found.folder.parent} has {over} epochs behind it: epochs = {settings.epochs} cannot be its "
            f"end; give more than {over}, or leave it out for the {found.epochs} that were planned"
        )


def check_anew(out: Path) -> None:
    """Raises ResumeError where a training that was broken off would be lost by a new run in its folder."""
    found = unfinished_at(out)
    if found is not None and not found.finished:
        raise ResumeError(
            f"{out} holds a run that was broken off: go on with `autowidth train --resume {out}`, name another folder, "
            f"or remove {out / TRAINING} to begin anew"
        )
