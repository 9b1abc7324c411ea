"""The one error that all of ours are."""

from __future__ import annotations


class AutoWidthError(Exception):
    """An error that its reader can mend: it says what was got, what is allowed, and what to do.

    Every exception class of the library is one of these and a builtin, so `except AutoWidthError` catches them all and
    `except ValueError` those that are about a value.
    """
