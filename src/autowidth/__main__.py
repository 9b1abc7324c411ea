"""The command `autowidth`, also as `python -m autowidth`."""

from __future__ import annotations

import importlib
import sys

from autowidth.errors import AutoWidthError


def main() -> None:
    """Runs the command; where the packages of the laboratory are missing, says so in one sentence, with exit code 2."""
    try:
        importlib.import_module("autowidth.lab")
    except AutoWidthError as error:
        sys.stderr.write(f"autowidth: {error}\n")
        raise SystemExit(2) from None
    from autowidth.cli import main as command  # not before it is known that its packages are there

    command()


if __name__ == "__main__":
    main()
