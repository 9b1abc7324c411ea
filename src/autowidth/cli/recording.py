"""What is written while a run goes on, so that its page can be drawn at any moment, and the page at its end."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy
import torch

from autowidth.engine import AutoWidth
from autowidth.errors import AutoWidthError
from autowidth.lab.keeping import TRAINING
from autowidth.lab.result import Progress
from autowidth.lab.settings import Settings
from autowidth.report.page import is_page, page_of
from autowidth.report.progress import PROGRESS, Epoch, Facts, ProgressError, add, begin, read_course
from autowidth.report.record import LIVE_HISTORY, LIVE_PROGRESS, read_record
from autowidth.report.story import story_of
from autowidth.version import __version__

REPORT = "report.html"


class Recorder:
    """Keeps the progress and the history of a run in its folder while it trains; as a context, cleans up behind it.

    A run that fails leaves the folder as it was; one that is killed, or broken off with its training saved, leaves what
    was written, and goes on with it. A disk that refuses is no reason to stop a run: it ends without a page.
    """

    def __init__(self, folder: Path, settings: Settings, *, resume: Path | None = None) -> None:
        self.folder = folder
        self.settings = settings
        self.resume = resume
        self._began = False
        self._missing: list[Path] = []  # folders that were not there, the innermost first
        self._reviews = -1
        self._accuracy: float | None = None
        self._refused: OSError | None = None

    def __enter__(self) -> Recorder:
        self._missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        return self

    def __exit__(self, *error: object) -> None:
        if not self._began or (self.folder / TRAINING).is_dir():
            return
        for name in (LIVE_HISTORY, LIVE_PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        for made in self._missing:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()

    def show(self, progress: Progress) -> None:
        """Begins the file at the start of a run, with the epochs that a run that goes on has had; adds every epoch."""
        if progress.moment == "start":
            earlier = self._earlier(progress)
            self._began = True
            self._tried(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            self._tried(lambda: begin(self.folder / LIVE_PROGRESS, self._facts(progress)))
            for epoch in earlier:
                self._tried(partial(add, self.folder / LIVE_PROGRESS, epoch))
        elif progress.moment == "epoch":
            self._tried(lambda: add(self.folder / LIVE_PROGRESS, self._epoch(progress)))

    def watch(self, engine: AutoWidth) -> None:
        """Writes the history before the first review, and after every one."""
        if len(engine.history) != self._reviews:
            self._reviews = len(engine.history)
            self._tried(lambda: engine.history.write(self.folder / LIVE_HISTORY))

    def _tried(self, act: Callable[[], object]) -> None:
        """Does what writes, until the disk refuses for the first time."""
        if self._refused is None:
            try:
                act()
            except OSError as error:
                self._refused = error

    def _earlier(self, progress: Progress) -> tuple[Epoch, ...]:
        """The epochs of the run that goes on, up to where it was saved; none where nobody wrote them."""
        for name in (LIVE_PROGRESS, PROGRESS):
            if self.resume is not None and (self.resume / name).is_file():
                try:
                    known = read_course(self.resume / name).epochs
                except (ProgressError, OSError):
                    return ()
                return tuple(epoch for epoch in known if epoch.epoch <= progress.epoch)
        return ()

    @property
    def written(self) -> str:
        """The files that this adds to a saved run."""
        return "".join(f", {name}" for name in (PROGRESS, REPORT) if (self.folder / name).exists())

    def finish(self, folder: Path) -> str | None:
        """Writes the page of the run that was saved in this folder.

        Returns why there is none, in a sentence, or None where there is one.
        """
        page, live, self.folder = folder / REPORT, self.folder / LIVE_PROGRESS, folder
        (live.parent / LIVE_HISTORY).unlink(missing_ok=True)
        try:
            if self._refused is not None:
                raise self._refused
            shutil.move(live, folder / PROGRESS)
            if page.exists() and not is_page(page):
                return f"no {REPORT}: {page} is there and is no report; autowidth report {folder} --out FILE"
            page.unlink(missing_ok=True)  # that of the run that was here before
            page.write_text(page_of(story_of(read_record(folder))), encoding="utf-8")
        except (AutoWidthError, OSError) as error:  # the run itself is saved
            live.unlink(missing_ok=True)
            return f"no {REPORT}: {error}"
        return None

    def _facts(self, progress: Progress) -> Facts:
        """What is known when training is about to start."""
        versions = {
            "autowidth": __version__, "torch": str(torch.__version__), "numpy": numpy.__version__,
            "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        }  # fmt: skip
        return Facts(
            settings=self.settings.model_dump(mode="json"), versions=versions, data=progress.data,
            part="held_out" if self.settings.holdout else "test", epochs=progress.epochs,
            total_steps=progress.total_steps, macs_start=progress.macs_start, params_start=progress.params_start,
            accuracy_start=progress.accuracy_start,
            began=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join(["autowidth", *sys.argv[1:]]),
        )  # fmt: skip

    def _epoch(self, p: Progress) -> Epoch:
        """The line of an epoch; with few looks, accuracy stands where it was measured."""
        is_new = self.settings.looks is None or p.accuracy != self._accuracy
        self._accuracy = p.accuracy
        return Epoch(
            epoch=p.epoch, step=p.step, loss=p.loss, accuracy=p.accuracy if is_new else None, macs=p.macs,
            params=p.params, seconds=p.seconds,
        )  # fmt: skip
