"""What can be wrong with image sets, and what to install where a package is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from autowidth.errors import AutoWidthError


class DataError(AutoWidthError, ValueError):
    """Data that are missing, malformed, or do not fit what was asked of them."""


class CorruptImageError(DataError):
    """A file or row that holds no readable image of the expected extent."""


class UnknownDataError(AutoWidthError, ValueError):
    """A text that names no data set."""


_INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Packages that are imported by another name than the one they are installed by."""


@contextmanager
def packages_for(what: str, *, extra: Literal["lab", "hub"] = "lab") -> Iterator[None]:
    """Around imports of packages that only some data sets need. Raises DataError where one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise DataError(
            f"{what} needs the package {_INSTALLED_AS.get(package, package)}, which is not installed: "
            f"pip install 'autowidth[{extra}]'"
        ) from error
