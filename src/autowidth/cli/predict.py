"""autowidth predict: what a saved run says of single pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autowidth.cli.display import console_for
from autowidth.cli.door import door
from autowidth.lab.predicting import Prediction, picture_files, predicted
from autowidth.lab.saved import open_run

EXAMPLES = """[bold]Examples[/bold]

one picture, and all pictures of a folder, with the three likeliest classes of each:
  autowidth predict runs/my-run cat.jpg photos --top 3
a line of JSON for every picture:
  autowidth predict runs/my-run photos --json
"""


def command(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    images: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    top: Annotated[int, typer.Option("--top", min=1, help="classes that are named for each picture")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON object for every picture")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Tell the class of pictures, and how sure the network is."""
    with door(debug=debug):
        opened, files = open_run(run), picture_files(images)
        console = console_for(stderr=False)
        for found in predicted(opened, files, top=top):
            if as_json:
                typer.echo(json.dumps(found.as_json(), allow_nan=False))
            else:
                console.print(_line(found), soft_wrap=True, highlight=False, markup=False)


def _line(found: Prediction) -> str:
    """The prediction for people."""
    pairs = zip(found.classes, found.probabilities, strict=True)
    return f"{found.file}: {', '.join(f'{name} {chance:.1%}' for name, chance in pairs)}"
