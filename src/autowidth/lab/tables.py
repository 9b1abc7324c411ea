"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their headings, every cell as it is given."""
    text: str = tabulate(rows, headers=headings, tablefmt="github", disable_numparse=True)
    return text
