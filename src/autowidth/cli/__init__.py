"""The command line: train, shrink, eval, predict, inspect, report, export, measure, bench."""

from __future__ import annotations

from typing import Annotated

import typer

from autowidth.cli import bench, evaluate, export, inspect, measure, predict, report, shrink, train
from autowidth.cli.logs import WithOptionalValues
from autowidth.version import __version__

app = typer.Typer(
    name="autowidth",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command that the arguments name."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autowidth {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Train a CNN once and come out with the right number of filters in every layer.

    Start with [bold]autowidth train[/bold]: it needs no arguments, no download and no GPU.
    """


app.command("train", epilog=train.EXAMPLES, cls=WithOptionalValues)(train.command)
app.command("shrink", epilog=shrink.EXAMPLES)(shrink.command)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.command)
app.command("predict", epilog=predict.EXAMPLES)(predict.command)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.command)
app.command("export", epilog=export.EXAMPLES)(export.command)
app.command("measure", epilog=measure.EXAMPLES)(measure.command)
app.command("report", epilog=report.EXAMPLES)(report.command)
app.command("bench", epilog=bench.EXAMPLES)(bench.command)
