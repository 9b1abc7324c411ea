"""Packages of extras: they are imported where they are needed, and one that is missing is said in a sentence."""

from __future__ import annotations

import importlib.util

from autowidth.errors import AutoWidthError


class MissingExtraError(AutoWidthError, ImportError):
    """The packages of an extra are not installed."""


def check_extra(extra: str, packages: tuple[str, ...], *, what: str) -> None:
    """Raises MissingExtraError where one of these packages is not installed, which `what` needs and `extra` brings."""
    if missing := [name for name in packages if not _installed(name)]:
        raise MissingExtraError(
            f"{what} needs packages that are not installed here ({', '.join(missing)}): "
            f"pip install 'autowidth[{extra}]'"
        )


def _installed(name: str) -> bool:
    """Whether a top-level package can be found; one that was blocked (None in sys.modules) cannot."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return False
