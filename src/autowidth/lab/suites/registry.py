"""The suites of measurements by name, each entered where it is defined."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from autowidth.errors import AutoWidthError
from autowidth.lab.bench import BenchError, Suite

MakeSuite = Callable[..., Suite]
"""Takes the keywords data, models, seeds and epochs, and may take more."""

SUITES: dict[str, MakeSuite] = {}
"""The suites by name. Importing the package, not this file alone, fills it."""


class UnknownSuiteError(AutoWidthError, ValueError):
    """A name that is no suite."""


def suite(name: str) -> Callable[[MakeSuite], MakeSuite]:
    """Enters the decorated function as the suite of this name. Raises ValueError for a name taken."""

    def entered(function: MakeSuite) -> MakeSuite:
        if name in SUITES:
            raise ValueError(f"two suites are named {name!r}")
        SUITES[name] = function
        return function

    return entered


def find_suite(name: str, **asked: Any) -> Suite:
    """The suite of this name, on the data, models, seeds and whatever else is asked for; the rest is its own choice.

    Raises UnknownSuiteError with close names, BenchError for what the suite does not know, and what it raises.
    """
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UnknownSuiteError(f"no suite is named {name!r}; allowed are {', '.join(SUITES)}{hint}")
    known = inspect.signature(SUITES[name]).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not takes_all and (unknown := sorted(set(asked) - set(known))):
        raise BenchError(f"the suite {name} knows no {' and no '.join(unknown)}; allowed are {', '.join(known)}")
    return SUITES[name](**asked)
