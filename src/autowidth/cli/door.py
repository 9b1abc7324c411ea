"""What stands between a user and a traceback: mistakes become one sentence and an exit code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from autowidth.errors import AutoWidthError
from autowidth.lab.keeping import Interrupted, Terminated


class UsageError(AutoWidthError, ValueError):
    """An argument that has not the form it should have."""


MISTAKES = (AutoWidthError, OSError)
"""What a user can mend. Everything else is a bug, and shows its traceback."""


@contextmanager
def door(*, debug: bool, interrupted: str = "nothing was written") -> Iterator[None]:
    """Turns a user's mistake into one sentence on stderr and exit code 2; with `debug`, lets the traceback out.

    A training that diverged ends with code 3, Ctrl-C with 130, SIGTERM with 143.

    `interrupted` says what is left where the user breaks off.
    """
    try:
        yield
    except (Interrupted, Terminated) as stopped:
        _fail(str(stopped), stopped.exit_code)
    except KeyboardInterrupt:
        _fail(f"interrupted; {interrupted}", 130)
    except BrokenPipeError:  # whoever read the output has gone, as in `| head`; typer ends quietly
        raise
    except MISTAKES as error:
        if debug:
            traceback.print_exc()
        _fail(str(error) or type(error).__name__, getattr(error, "exit_code", 2))


def _fail(sentence: str, code: int) -> None:
    line = f"autowidth: {' '.join(sentence.split())}"
    typer.echo(line.encode(errors="backslashreplace").decode(), err=True)  # names of files need not be Unicode
    raise typer.Exit(code)
