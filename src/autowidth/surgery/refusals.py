"""What surgery refuses before anything is written."""

from __future__ import annotations

from autowidth.errors import AutoWidthError


class SurgeryError(AutoWidthError, ValueError):
    """A model, optimizer or follower that cannot be resized as it is."""


class StaleMapError(SurgeryError):
    """A model, follower or optimizer state that does not have the names or shapes of the channel map."""


class UnsupportedOptimizerError(AutoWidthError, TypeError):
    """An optimizer whose state nobody has entered in `OPTIMIZER_STATE`."""
