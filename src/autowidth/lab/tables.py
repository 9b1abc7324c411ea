"""Tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tabulate import tabulate


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their headings, every cell as it is given."""
    text: str = tabulate(rows, headers=headings, tablefmt="github", disable_numparse=True)
    return text


def spread(values: Sequence[float], *, digits: int = 2, none: str = "-", counted: bool = False) -> str:
    """Mean and, of several, standard deviation; with `counted` also how many they are; `none` for no values."""
    if not values:
        return none
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" + (f" ({len(values)})" if counted else "")
