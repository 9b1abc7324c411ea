"""The line of the user's code: that of an error, and that which is being run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import torch

_FOLDER = os.path.dirname(os.path.dirname(__file__))
_OWN = (
    os.path.dirname(torch.__file__) + os.sep,  # not torchvision, which lies beside it
    *(os.path.join(_FOLDER, room) + os.sep for room in ("trace", "rules")),
)


def described(error: BaseException | None) -> str:
    """An error in one line, with the line of the user's code where it arose."""
    if error is None:
        return ""
    text = " ".join(str(error).split()) or type(error).__name__
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    return f"{text[:200]}{_users(reversed(frames))}"


def running_line() -> str:
    """` (file.py:12)`: the line of the user's code that is being run, or nothing."""
    frame = sys._getframe(1)
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return _users(frames)


def _users(frames: Iterable[tuple[str, int]]) -> str:
    """` (file.py:12)` of the first frame that is neither torch's nor of these rooms, or nothing."""
    for filename, number in frames:
        if not filename.startswith(_OWN) and not filename.startswith("<"):
            return f" ({os.path.basename(filename)}:{number})"
    return ""
