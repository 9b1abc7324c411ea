"""One run per folder at a time: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from autowidth.errors import AutoWidthError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)


class LockedError(AutoWidthError, BlockingIOError):
    """A folder that another process is writing a run to."""


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keeps a folder, which is made if it is not there, for this run while it lasts; None locks nothing.

    The lock is on the folder itself (flock), leaves no file, and goes with the process, whatever ends it. Where the
    system or the file system has no such lock, a warning is logged and nothing stops a second run. Folders that were
    made and are still empty at the end are taken away again. Raises LockedError.
    """
    if folder is None:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder):
            yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it is not empty, or gone
                place.rmdir()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    if fcntl is None:
        _log.warning("this system has no flock: nothing stops a second run on %s", folder)
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _HELD.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockedError(
                    f"another process is writing a run to {folder}: wait for it or stop it, or name another folder"
                ) from error
            _log.warning("%s cannot be locked (%s): nothing stops a second run on it", folder, error.strerror)
        yield
    finally:
        _HELD.discard(descriptor)
        os.close(descriptor)


_HELD: set[int] = set()
"""Open descriptors of locked folders."""


def _let_go() -> None:
    """In a child: a worker that outlives the run must not go on holding its folder."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
