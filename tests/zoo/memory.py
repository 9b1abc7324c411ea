"""Peak memory of an act, from what the operating system says about this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident() -> int | None:
    """Bytes of memory that the process occupies now, after garbage has been returned; None outside of Linux.

    The resident set counts everything: tensors, NumPy's arrays, Python's objects, scratch space inside kernels.
    Profilers that watch one allocator see only a part of it.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed pages that the allocator keeps would hide the next act's needs
    except (AttributeError, OSError):
        return None
    return _read("VmRSS")


def peak_during(act: Callable[[], object]) -> int | None:
    """The most bytes that the process occupied while `act` ran; None where it cannot be known. Drops the result."""
    if resident() is None:
        act()
        return None
    try:
        _CLEAR.write_text("5")  # the peak starts anew at the present value
    except OSError:
        act()
        return None
    act()
    return _read("VmHWM")


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """Makes the allocator return what is freed at once, so that a peak is what was in use; needs glibc.

    Usually it keeps freed blocks of up to 32 MiB for later, and a peak would be a matter of fragmentation.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 16)
    gc.freeze()  # what is there already is no garbage of the act, and looking through it takes a second each time
    try:
        yield
    finally:
        gc.unfreeze()
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 26)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers from malloc.h; the values put back are the largest usual ones


def _read(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
