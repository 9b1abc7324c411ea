"""Ctrl-C and SIGTERM wait until a training step is over; a second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAsked:
    """Whether somebody asked the training to stop: false, until a signal arrives."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The one that arrived."""

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_asked() -> Iterator[StopAsked]:
    """While it lasts, a first Ctrl-C or SIGTERM is only noted: look at it after a step, save, and leave the loop.

    A second signal ends at once: Ctrl-C as it would have before, SIGTERM by ending the process. Signals that were
    ignored stay ignored. Without effect outside the main thread, to which no signal comes.

        with aw.stop_asked() as asked:
            for batch in loader:
                ...
                if asked:
                    aw.save_training("runs/own", engine)
                    raise SystemExit(128 + asked.signal)
    """
    asked = StopAsked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def arrived(number: int, frame: FrameType | None) -> None:
        if asked:
            _as_before(number, frame, before[signal.Signals(number)])
        asked.signal = signal.Signals(number)

    try:
        for number in mine:
            signal.signal(number, arrived)
        yield asked
    finally:
        for number in mine:
            signal.signal(number, before[number])


def _as_before(
    number: int, frame: FrameType | None, handler: Callable[[int, FrameType | None], Any] | int | None
) -> None:
    """What the signal would have done."""
    if callable(handler):
        handler(number, frame)
        return
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
