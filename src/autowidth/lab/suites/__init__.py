"""The suites of measurements: one file each, and one row here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from autowidth.lab.bench import Suite
from autowidth.lab.suites.fidelity import fidelity


class UnknownSuiteError(ValueError):
    """A name that is no suite."""


SUITES: Mapping[str, Callable[..., Suite]] = {"fidelity": fidelity}
"""The suites by name. Each takes the keywords data, models, seeds and epochs, and may take more."""


def find_suite(
    name: str,
    *,
    data: str | None = None,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
) -> Suite:
    """The suite of this name, on these data, models and seeds; what is not given is the suite's own choice.

    Raises UnknownSuiteError with close names, and what the suite raises.
    """
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UnknownSuiteError(f"no suite is named {name!r}; allowed are {', '.join(SUITES)}{hint}")
    return SUITES[name](data=data, models=models, seeds=seeds, epochs=epochs)
