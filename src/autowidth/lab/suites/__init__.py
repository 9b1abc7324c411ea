"""The suites of measurements: one file each, and one row here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from autowidth.lab.bench import BenchError, Suite
from autowidth.lab.suites.compare import RECIPES, comparison
from autowidth.lab.suites.fidelity import fidelity


class UnknownSuiteError(ValueError):
    """A name that is no suite."""


SUITES: Mapping[str, Callable[..., Suite]] = {
    "fidelity": fidelity,
    **{name: partial(comparison, name) for name in RECIPES},
}
"""The suites by name. Each takes the keywords data, models, seeds and epochs, and may take more."""


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
