"""The one base class of errors that their reader can mend."""

from __future__ import annotations


class AutoWidthError(Exception):
    """An error that its reader can mend: one sentence that says what, where, what was got, what is allowed.

    Every exception of this package subclasses it, and a builtin beside it. The command turns it into that sentence and
    exit code 2; whatever else is raised is a bug and shows its traceback.
    """
