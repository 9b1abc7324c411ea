"""What a run keeps on disk while it trains: the training as it stands, and its result, wherever a disk takes them."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from autowidth.checkpoint import CheckpointError
from autowidth.engine import AutoWidth
from autowidth.errors import AutoWidthError
from autowidth.lab.settings import Settings
from autowidth.training import save_training

TRAINING = "training"
"""The folder in that of a run which holds the training as it stands."""

RETRY = 60.0
"""Seconds after which a disk that refused is tried again, at most."""

REFUSALS = (OSError, CheckpointError)
"""How a disk refuses; the latter where something else stands now where a folder was."""

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run behind a step; the message says what is saved and how to go on."""

    exit_code = 130


class Terminated(SystemExit):
    """SIGTERM ended a run behind a step; the message says what is saved and how to go on."""

    exit_code = 143

    def __init__(self, sentence: str) -> None:
        super().__init__(self.exit_code)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class NowhereError(AutoWidthError, OSError):
    """No disk takes what a run has come to. `result` is what could not be written, where training was over."""

    result: Any = None


class Keeper:
    """Saves the training of a run every few minutes. Where the disk refuses it says so once, and tries again.

    `parts` are the loop and all that is saved with it, `about` says what goes into run.json, `say` takes a sentence for
    the user, `named` is the folder that they know the run by, where it is another one. Without a folder, or with saves
    = 0, it does nothing.
    """

    def __init__(
        self, settings: Settings, engine: AutoWidth, *, parts: Mapping[str, Any],
        about: Callable[[], dict[str, Any]], say: Callable[[str], None], named: Path | None = None,
    ) -> None:  # fmt: skip
        self.out, self.named = settings.out, named or settings.out
        self.folder = settings.out / TRAINING if settings.out is not None and settings.saves else None
        self.keep, self.rescue = settings.saves, settings.rescue
        self.every = 60 * settings.save_every
        self.engine, self.parts, self.about, self.say = engine, parts, about, say
        self.first = True
        """Whether nothing has been saved yet: what an earlier run left here goes when the first save is whole."""
        self._next = time.perf_counter() + self.every
        self._refused = False

    def due(self) -> bool:
        """Whether it is time for another save."""
        return self.folder is not None and self.every > 0 and time.perf_counter() >= self._next

    def save(self, *, last: bool = False) -> bool:
        """Saves the training to the folder of the run; whether the disk took it. The last save is the only one kept."""
        if self.folder is None:
            return False
        try:
            self._write(self.folder, keep=1 if last or self.first else self.keep)
        except REFUSALS as error:
            self._next = time.perf_counter() + min(self.every, RETRY)
            if not self._refused:
                self.say(f"{error}; training goes on, and saving is tried again every {min(self.every, RETRY):.3g} s")
            self._refused = True
            return False
        if self._refused:
            self.say(f"the training is saved again, in {self.folder}")
        self._refused, self.first = False, False
        self._next = time.perf_counter() + self.every
        return True

    def stop(self, number: signal.Signals, where: str, *, finite: bool) -> NoReturn:
        """Saves, elsewhere if the folder of the run takes nothing, and raises Interrupted or Terminated.

        A step that was not finite is not saved: what was saved before it stays what is gone on with.
        """
        kind = Interrupted if number == signal.SIGINT else Terminated
        raise kind(f"stopped {where}; {self._said_when_stopped(finite)}")

    def _said_when_stopped(self, finite: bool) -> str:
        """Saves, and says what is on the disk now."""
        if self.out is None or self.folder is None:
            return "nothing was written"
        place = self.named or self.out
        if not finite:
            kept = "go on from the last step that was saved" if not self.first else "nothing was written"
            return f"its last losses were not finite: {kept}" + ("" if self.first else _resuming(place))
        if self.save():
            return f"go on{_resuming(place)}"
        try:
            place, _ = anywhere(self.out, self.rescue, lambda place: self._write(place / TRAINING, keep=1))
        except NowhereError as error:
            return str(error)
        return f"{self.out} took nothing, so the training was saved in {place}: go on{_resuming(place)}"

    def _write(self, folder: Path, *, keep: int) -> None:
        save_training(folder, self.engine, parts=self.parts, extra=self.about(), keep=keep)


def _resuming(folder: Path) -> str:
    return f" with: autowidth train --resume {folder}"


def anywhere(out: Path, rescue: Path | None, write: Callable[[Path], T]) -> tuple[Path, T]:
    """Writes to `out`, or else to the rescue folder, or else to a temporary one; returns where, and what `write` did.

    Raises NowhereError, which says what every place answered.
    """
    answers = []
    for place in _places(out, rescue):
        try:
            return place, write(place)
        except REFUSALS as error:
            answers.append(str(error))
            if place not in (out, rescue):
                with suppress(OSError):
                    place.rmdir()
    raise NowhereError(f"no disk takes the run: {'; '.join(answers)}")


def _places(out: Path, rescue: Path | None) -> Iterator[Path]:
    """Where a run may be written, the best place first; temporary folders are made when they are asked for."""
    yield out
    if rescue is not None:
        yield rescue
    for parent in (Path(tempfile.gettempdir()), Path("/dev/shm"), Path.home()):
        with suppress(OSError):
            yield Path(tempfile.mkdtemp(prefix="autowidth-", dir=parent))
