"""autowidth report: the page of a run, also of one that goes on, or a comparison of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from autowidth.cli.door import UsageError, door
from autowidth.cli.recording import REPORT
from autowidth.report.page import is_page, page_of, page_of_several
from autowidth.report.record import Record, read_record
from autowidth.report.story import story_of

EXAMPLES = """[bold]Examples[/bold]

the page of a run, written to runs/demo/report.html, also while it trains:
  autowidth report runs/demo
of a history that an engine of yours has written (history="run.jsonl"):
  autowidth report run.jsonl
runs side by side, written to comparison.html:
  autowidth report runs/half runs/quarter runs/auto
to another file, in place of what is there:
  autowidth report runs/demo --out ~/demo.html --force

The page is one file that loads nothing: send it, or open it without a
network. Every run of autowidth train writes one at its end.
"""

COMPARISON = "comparison.html"


class ExistsError(UsageError, FileExistsError):
    """A file stands where a page should go, and it is no page of ours."""


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="folders of runs, or history files; several are compared", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help=f"the page; default {REPORT} in the folder of the run, {COMPARISON} for several")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is no page of ours")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Draw what happened to the widths, and why, as one page that opens in any browser."""
    with door(debug=debug):
        target = out or _target(runs)
        _check(target, force=force)
        records = [read_record(path) for path in runs]
        for record in records:
            for remark in record.remarks:
                typer.echo(f"autowidth: {remark}", err=True)
        stories = [story_of(record) for record in _renamed(records)]
        page = page_of(stories[0]) if len(stories) == 1 else page_of_several(stories)
        target.write_text(page, encoding="utf-8")
        typer.echo(f"written to {target} ({len(page.encode()) / 2**20:.1f} MiB)")


def _target(runs: list[Path]) -> Path:
    """Where the page goes if nobody says."""
    if len(runs) > 1:
        return Path(COMPARISON)
    return runs[0] / REPORT if runs[0].is_dir() else runs[0].with_suffix(".html")


def _check(target: Path, *, force: bool) -> None:
    """Raises UsageError where the page cannot go, ExistsError where another file would be lost."""
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder: name a file, such as {target / REPORT}")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent} to write {target.name} to: make it, or name another")
    if target.exists() and not force and not is_page(target):
        raise ExistsError(f"{target} is there and is no report: name another file with --out, or pass --force")


def _renamed(records: list[Record]) -> list[Record]:
    """The records under names that differ: where two are the same, with the place that they were read from."""
    names = [record.name for record in records]
    found: list[Record] = []
    for record in records:
        name = record.name if names.count(record.name) == 1 else str(record.path)
        taken = sum(other.name.split(" (")[0] == name for other in found)
        found.append(replace(record, name=f"{name} ({taken + 1})" if taken else name))
    return found
