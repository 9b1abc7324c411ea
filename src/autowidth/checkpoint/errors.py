"""What can be wrong with a saved run, and with the disk that it goes to."""

from __future__ import annotations

from autowidth.errors import AutoWidthError


class CheckpointError(AutoWidthError, ValueError):
    """A run that cannot be written, is missing, damaged or too new, or belongs to another network."""


class WriteError(AutoWidthError, OSError):
    """A disk that refuses: full, read-only, gone. `errno` is that of the system, where it gave one."""
