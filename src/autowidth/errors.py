"""The one base class of errors that their reader can mend."""

from __future__ import annotations


class AutoWidthError(Exception):
    """An error that its reader can mend."""
