"""The one base class of errors that their reader can mend."""


class AutoWidthError(Exception):
    """Something that whoever called can mend: its message says what, where, what was got, what is allowed."""
